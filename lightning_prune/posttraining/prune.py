"""Pruning without a Trainer: one call, with statistics from a data loader where the criterion needs any."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_prune import scopes
from lightning_prune.criteria import Criterion, Loss, Magnitude
from lightning_prune.granularities import Granularity, Weight
from lightning_prune.masks import Masks
from lightning_prune.models.forward import Inputs
from lightning_prune.models.kept_norms import follow_masks
from lightning_prune.models.parameters import Target, named_parameters
from lightning_prune.posttraining.allocation_search import searched
from lightning_prune.posttraining.batch_norms import recalibrate as recalibrate_norms
from lightning_prune.posttraining.fitting import Reconstruction
from lightning_prune.posttraining.observing import check_data
from lightning_prune.posttraining.recovery import recipe_of
from lightning_prune.posttraining.rounds import rounds_of
from lightning_prune.scopes import Scope, Search
from lightning_prune.tensors.distributed import local
from lightning_prune.units.units import Units
from lightning_prune.updates.budget import Measure
from lightning_prune.updates.decision import Allocate, Decision, check_channels, decide
from lightning_prune.updates.latency import LatencyTable
from lightning_prune.updates.output_neurons import UNKNOWN, without_outputs
from lightning_prune.updates.remaining import told
from lightning_prune.updates.statistics import scorable
from lightning_prune.updates.target_sparsity import MOST_ROUNDS, Sparsity, SparsityTarget
from lightning_prune.validation.arguments import explain_renamed, integer
from lightning_prune.validation.instances import instance
from lightning_prune.validation.warning import warn

_log = logging.getLogger("lightning.pytorch.lightning_prune")  # as callbacks do


@explain_renamed
def prune(
    model: nn.Module,
    sparsity: Sparsity | None = None,
    *,
    criterion: Criterion = Magnitude(),
    granularity: Granularity = Weight(),
    scope: scopes.ScopeName | Scope | None = None,
    targets: Sequence[str] = (),
    ignore: Sequence[str] = (),
    threshold: float | None = None,
    min_density: float | None = None,
    of: Measure | LatencyTable = "units",
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    rounds: int = 1,
    sequential: str | None = None,
    refine: int = 0,
    reconstruct: bool | Reconstruction = False,
    example_inputs: Inputs = None,
    recalibrate: int = 0,
    distributed: bool = False,
) -> Masks:
    """Prune a model in place and return the masks; ``masks.apply(model)`` keeps the zeros while it trains on.

    Args:
        model: Any module.
        sparsity: Fraction of zeros among the targets, in [0, 1), or ``{pattern: fraction}`` per layer.
        criterion: Scores the units; the lowest go.
        granularity: Which weights form a unit.
        scope: How the sparsity is shared out over the targets: "global", "local", "erk", "lamp" or a callable. None is
            "global" for single weights and blocks, and "local" for channels and heads, which keeps every layer alive.
            ``Evolve()`` tries allocations on the data.
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out.
        threshold: Instead of a sparsity: prune every unit that scores below it.
        min_density: Fraction of every target, rounded down, and one unit, that a scope keeps at least: no layer goes.
            None is 0 for single weights and blocks; for channels and heads it is 0.1, but at most half of what the
            sparsity leaves, and gives way where there is no room for it.
        of: What the sparsity is a fraction of: the "units" of the targets, or all "parameters", "flops" or "latency" of
            the model, where those count as gone that go with the pruned units. At least so many go. The latency of
            ``example_inputs`` is measured, or that of a ``LatencyTable``, which ``measure_latency`` makes.
        data: Batches for a criterion that observes: as many as its ``window`` says are taken, all if that is None. A
            warning says so where a default leaves some out. Keyword arguments, as tokenizers return them, are fine.
        loss: ``loss(model, batch)`` for a criterion that needs gradients. Without it a batch is (inputs, targets):
            cross-entropy for integer targets, else the mean squared error; or keyword arguments with labels, for models
            that return their loss. If it is given, it is also what is run on a batch for a criterion that needs
            forward passes.
        rounds: Times to score and prune the same part of what is left: after k of n, ``(1 - sparsity)**(k / n)`` stays.
            With more than one, as with ``sequential``, the batches are held.
        sequential: Name of the ModuleList or Sequential whose blocks run one after another, for a criterion that needs
            forward passes. Each block is observed behind the pruned ones, and pruned, before the next one; what is
            outside of the blocks comes last. No more than one block's input is held. The scope shares out inside each
            block, but for ``OWL`` and ``Evolve``, which compare blocks, after one more pass over the data. With
            ``refine`` or ``reconstruct`` any criterion will do.
        refine: How many swaps at most refine the mask of each row, or of each group of ``SharedFanIn``: a pruned weight
            takes the place of a kept one of its row, with ``NM`` of its group, if that lowers the error of the layer's
            outputs on the data. 0 leaves the masks as the criterion chose them.
        reconstruct: Whether the weights that are left, biases and norms are fitted to the outputs of the dense model on
            the data, block by block with ``sequential``, otherwise through the whole model. No block's error on these
            data is larger afterwards. How many steps it takes is up to ``Reconstruction(steps=...)``.
        example_inputs: For FLOPs and latency, and for channels and heads that are coupled: a tensor, a tuple of
            arguments or a dict of keyword arguments. None takes the ``example_input_array`` of a ``LightningModule``,
            if it has one.
        recalibrate: From how many batches of ``data`` the statistics of batch norms are measured again afterwards.
        distributed: Whether all ranks call it, each with as many batches of its own, for the masks of all batches.

    Raises:
        ValueError: If an argument is out of range, a pattern matches nothing, or a score is not finite.
        ImportError: If channels or heads have to be coupled, and torch-pruning is not installed.

    >>> model = nn.Linear(10, 10)
    >>> masks = prune(model, 0.75)
    >>> int((model.weight == 0).sum())
    75
    """
    _check_types(model, criterion)
    target = SparsityTarget(sparsity, threshold, min_density, of).for_granularity(granularity)
    rounds = integer("rounds", rounds, 1, most=MOST_ROUNDS)
    recalibrate = integer("recalibrate", recalibrate, 0)
    refine = integer("refine", refine, 0)
    recipe = None
    if (
        distributed is not False
        or refine
        or reconstruct is not False
        or criterion.needs != "weights"
        or any(given is not None for given in (data, loss, sequential))
        or recalibrate
    ):
        recipe = recipe_of(granularity, refine, reconstruct)
        check_data(criterion, data, loss, sequential, recalibrate, distributed, recipe is not None)
    share_out = scopes.resolve(granularity.default_scope if scope is None else scope)

    found = target.find(model, targets, ignore)
    if not found:
        raise ValueError(
            "the model must have a prunable parameter, got uninitialised ones only: run a batch through it"
        )
    inputs = getattr(model, "example_input_array", None) if example_inputs is None else example_inputs
    units, reasons = granularity.find_units(found, model, inputs, distributed)
    named = not granularity.follows or targets or isinstance(sparsity, Mapping)
    units = units if named else _without_outputs(units, model, granularity)
    units = _scorable(units, criterion, found, reasons)
    budget = target.budget(granularity, units, model, inputs, distributed)
    counted = budget is not None and criterion.needs == "forwards"  # over all blocks, which are pruned one by one
    if sequential is not None and (counted or not granularity.within_blocks):
        raise ValueError(f"sequential must be None for {granularity} and of={of!r}, got {sequential!r}")

    targets_of = (target.round(number / rounds) for number in range(1, rounds + 1))
    allocations = [
        partial(part.allocate, found=found, criterion=criterion, scope=share_out, due=due, budget=budget)
        for part, due in targets_of
    ]
    data, allocations = (
        searched(allocations, target, share_out, granularity, model, units, criterion, data, loss, distributed)
        if isinstance(share_out, Search)
        else (data, allocations)
    )
    masks, keep = Masks(), dict[str, int]()
    ready: Iterable[tuple[Sequence[Units], Allocate]] = zip(repeat(units), allocations, strict=False)
    if criterion.needs != "weights" or recipe is not None:
        ready = rounds_of(model, units, criterion, allocations, data, loss, sequential, distributed, masks, recipe)
    for now, allocate in ready:  # all units, or those of one block after another
        decision = decide(now, criterion, allocate, masks)
        keep.update(decision.keep)
        _enforce(model, masks, decision.masks, granularity.normalized)
    if recalibrate and data is not None:
        recalibrate_norms(model, data, recalibrate)
    if few := Decision(masks, keep).scarce(units):
        warn(told("prune", few))
    return masks


def _log_others(found: Sequence[Target], reasons: Mapping[str, str]) -> None:
    """Log it if most weights are left out, since they lie in no unit."""
    total = sum(target.parameter.numel() for target in found)
    others = {target.name: reasons[target.name] for target in found if target.name in reasons}
    dense = sum(target.parameter.numel() for target in found if target.name in others)
    if dense > total / 2:
        first = "; ".join(f"{name}: {reason}" for name, reason in list(others.items())[:3])
        _log.info(f"prune leaves out {dense / total:.0%} of the weights: {first}")


def _without_outputs(units: Sequence[Units], model: nn.Module, granularity: Granularity) -> list[Units]:
    """Return the units that are no outputs of the model, and warn where these are unknown."""
    found, outputs, known = without_outputs(units, model, granularity)
    if not found:
        raise ValueError(f"targets must name {list(outputs)[:5]} to prune the outputs of the model, got none")
    if not known:
        warn(f"prune: {UNKNOWN}")
    return found


def _scorable(
    units: Sequence[Units], criterion: Criterion, targets: Sequence[Target], without: Mapping[str, str]
) -> list[Units]:
    """Return the units that a criterion can score, and warn of the others."""
    if without:
        _log_others(targets, without)
    if criterion.needs == "weights" and not criterion.by_channel:
        return list(units)
    check_channels(units, criterion)
    found, unscored = scorable(units, criterion)
    if unscored:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(unscored.items())[:5])
        warn(f"prune leaves out what {type(criterion).__name__} cannot score: {reasons}")
    return found


def _check_types(model: Any, criterion: Any) -> None:
    if not isinstance(model, nn.Module):
        instance("model", model, nn.Module)  # raises
    if not isinstance(criterion, Criterion):
        instance("criterion", criterion, Criterion)


@torch.no_grad()
def _enforce(model: nn.Module, masks: Masks, new: Masks, normalized: bool) -> None:
    """Zero what new masks prune, and add them to those until now; units may share a parameter.

    Args:
        model: The model.
        masks: The masks until now.
        new: What is pruned in addition.
        normalized: Whether norms take statistics over the units.
    """
    parameters = named_parameters(model)
    for name, mask in new.items():
        masks[name] = masks[name] & mask if name in masks else mask
        parameter = parameters[name]
        shard = local(parameter) if isinstance(parameter, DTensor) else parameter.detach()
        shard.masked_fill_(~masks[name], 0.0)
    if normalized:
        follow_masks(model, masks)
