"""Pruning without a Trainer: one call, with statistics from a data loader where the criterion needs any."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune import schedules, scopes
from lightning_prune.criteria import Criterion, Loss, Magnitude
from lightning_prune.granularities import Granularity, Weight
from lightning_prune.masks import Masks
from lightning_prune.models.forward import Inputs, example_of
from lightning_prune.models.parameters import Target
from lightning_prune.posttraining.batch_norms import recalibrate as recalibrate_norms
from lightning_prune.posttraining.calibration import Stage, forward, stages, take, undisturbed
from lightning_prune.scopes import Scope
from lightning_prune.tensors.distributed import average_gradients
from lightning_prune.units.coupled import find_units
from lightning_prune.units.units import Units
from lightning_prune.updates import target_sparsity as goal
from lightning_prune.updates.budget import Measure
from lightning_prune.updates.decision import Allocate, joined, make_masks, score
from lightning_prune.updates.remaining import scarce, told
from lightning_prune.updates.statistics import Observation
from lightning_prune.validation.arguments import flag, integer, text
from lightning_prune.validation.instances import batches as iterable
from lightning_prune.validation.instances import function, instance
from lightning_prune.validation.values import optional, shown


def prune(
    model: nn.Module,
    sparsity: goal.Sparsity | None = None,
    *,
    criterion: Criterion = Magnitude(),
    granularity: Granularity = Weight(),
    scope: str | Scope = "global",
    targets: Sequence[str] = (),
    ignore: Sequence[str] = (),
    threshold: float | None = None,
    min_density: float = 0.0,
    of: Measure = "units",
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    rounds: int = 1,
    sequential: str | None = None,
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
        scope: How the sparsity is shared out over the targets: "global", "local", "erk", "lamp" or a callable.
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out.
        threshold: Instead of a sparsity: prune every unit that scores below it.
        min_density: Fraction of every target, rounded down, and one unit, that a scope keeps at least: no layer goes.
        of: What the sparsity is a fraction of: the "units" of the targets, or all "parameters" or "flops" of the
            model, where those count as gone that go with the pruned units. At least so many go.
        data: Batches for a criterion that observes: as many as its ``window`` says are taken, all if that is None. A
            warning says so where a default leaves some out.
        loss: ``loss(model, batch)`` for a criterion that needs gradients. Without it a batch is (inputs, targets):
            cross-entropy for integer targets, else the mean squared error. If it is given, it is also what is run on a
            batch for a criterion that needs forward passes.
        rounds: Times to score and prune the same part of what is left: after k of n, ``(1 - sparsity)**(k / n)`` stays.
            With more than one, as with ``sequential``, the batches are held.
        sequential: Name of the ModuleList or Sequential whose blocks run one after another, for a criterion that needs
            forward passes. Each block is observed behind the pruned ones, and pruned, before the next one; what is
            outside of the blocks comes last. No more than one block's input is held. The scope shares out inside each
            block, but for ``OWL``, which compares blocks: it takes one more pass over the data, before a round.
        example_inputs: For FLOPs, and for channels and heads that are coupled: a tensor, a tuple of arguments or a
            dict of keyword arguments. None takes the ``example_input_array`` of a ``LightningModule``, if it has one.
        recalibrate: From how many batches of ``data`` the statistics of batch norms are measured anew afterwards.
        distributed: Whether all ranks call it, each with as many batches of its own, for the masks of all batches.

    Raises:
        ValueError: If an argument is out of range, a pattern matches nothing, or a score is not finite.
        ImportError: If channels or heads have to be coupled, and torch-pruning is not installed.

    >>> model = nn.Linear(10, 10)
    >>> masks = prune(model, 0.75)
    >>> int((model.weight == 0).sum())
    75
    """
    _check_arguments(model, criterion, data, loss, sequential, distributed)
    goal.check(sparsity, threshold, granularity, min_density, of)
    sparsity, threshold, min_density = goal.amount(sparsity), goal.level(threshold), goal.density(min_density)
    rounds = integer("rounds", rounds, 1, most=goal.MOST_ROUNDS)
    recalibrate = integer("recalibrate", recalibrate, 0)
    _check_data(criterion, data, sequential, recalibrate)
    allocator = scopes.resolve(scope)
    found = goal.find_targets(model, sparsity, targets, ignore)
    if not found:
        raise ValueError(
            "the model must have a prunable parameter, got uninitialised ones only: run a batch through it"
        )
    inputs = example_of(model, example_inputs)
    units, _ = find_units(found, model, granularity, inputs, distributed)
    budget = goal.budget_of(sparsity, of, granularity, units, model, inputs, distributed)
    if sequential is not None and budget is not None:
        raise ValueError(f"sequential must be None for {granularity} and of={of!r}, got {sequential!r}")
    masks = Masks()
    # also while a loader is asked for batches, which may draw random numbers
    with undisturbed(model, criterion.batch_statistics):
        batches = _batches(criterion, data, model)
        batches = list(batches) if rounds > 1 or sequential else batches
        parts = partial(_stages, criterion, model, batches, loss, distributed)
        for done in (number / rounds for number in range(1, rounds + 1)):
            part = None if sparsity is None else goal.after(sparsity, done)
            due = schedules.exponential(done) if sparsity is None else 1.0
            allocate = goal.allocation(found, part, threshold, criterion, allocator, due, min_density, budget)
            if sequential and getattr(allocator, "compares_blocks", False):
                (whole,) = parts()
                allocate = _settled(units, criterion, allocate, whole, masks, distributed)
            _prune(model, units, criterion, allocate, parts(sequential), masks, distributed)
    if data is not None and recalibrate:
        recalibrate_norms(model, data, recalibrate)
    if few := scarce(units, masks):
        warnings.warn(told("prune", few), stacklevel=2)
    return masks


def _prune(
    model: nn.Module,
    units: Sequence[Units],
    criterion: Criterion,
    allocate: Allocate,
    parts: Iterable[Stage],
    masks: Masks,
    distributed: bool,
) -> None:
    """Prune the units that each part has, one part after the other, and write down the masks."""
    left = list(units)
    for stage in parts:
        inside = set(stage.part.parameters())
        now = [unit for unit in left if unit.parameter in inside]
        left = [unit for unit in left if unit.parameter not in inside]
        if now:
            _observe(now, criterion, stage, distributed)
            masks.update(joined(masks, make_masks(now, criterion, allocate, masks)))
            masks.apply(model)


def _settled(
    units: Sequence[Units], criterion: Criterion, allocate: Allocate, whole: Stage, masks: Masks, distributed: bool
) -> Allocate:
    """Return how many units each target keeps by the scores of all, before any part is pruned."""
    _observe(units, criterion, whole, distributed)
    keep = allocate(score(units, criterion, {unit.name: unit.kept(masks) for unit in units}))
    return lambda scores: {name: keep[name] for name in scores}


def observed_units(
    model: nn.Module,
    found: Sequence[Target],
    criterion: Criterion,
    granularity: Granularity,
    data: Iterable[Any] | None,
    loss: Loss | None,
) -> list[Units]:
    """Return the units of every target, ready to be scored: the criterion has observed what it needs.

    Raises:
        ValueError: If the criterion needs data, and there are none.
    """
    _check_data(criterion, data)
    units, _ = find_units(found, model, granularity, example_of(model, None))
    with undisturbed(model, criterion.batch_statistics):
        (stage,) = _stages(criterion, model, _batches(criterion, data, model), loss)
        _observe(units, criterion, stage)
    return units


def _check_arguments(
    model: Any, criterion: Any, data: Any, loss: Any, sequential: Any = None, distributed: Any = False
) -> None:
    instance("model", model, nn.Module)
    instance("criterion", criterion, Criterion)
    optional(iterable, "data", data)
    optional(function, "loss", loss, "model", "batch")
    optional(text, "sequential", sequential, "the name of a container of blocks")
    if flag("distributed", distributed) and not torch.distributed.is_initialized():
        raise ValueError(f"distributed must be False where there is no process group, got {distributed}")


def _check_data(
    criterion: Criterion, data: Iterable[Any] | None, sequential: str | None = None, recalibrate: int = 0
) -> None:
    if recalibrate and data is None:
        raise ValueError(f"data must be given to recalibrate batch norms, got recalibrate={recalibrate} and data=None")
    name, needs = type(criterion).__name__, criterion.needs
    if data is None and needs != "weights":
        raise ValueError(f"data must be given: {name} needs {needs}, got None")
    if sequential is not None and needs != "forwards":
        raise ValueError(f"sequential must go with a criterion that needs forwards, got {name}, which needs {needs}")


def _batches(criterion: Criterion, data: Iterable[Any] | None, model: nn.Module) -> Iterable[Any]:
    """Return as many batches as the criterion looks at."""
    field, window = getattr(type(criterion), "__dataclass_fields__", {}).get("window"), criterion.window
    given = 0 if data is None else length_hint(data)
    if window is not None and field is not None and field.default == window < given:
        name = type(criterion).__name__
        warnings.warn(
            f"{name} takes {window} of the {given} batches of data: say {name}(window={given}) for all of them",
            stacklevel=3,
        )
    return take(data, window, model)


def _stages(
    criterion: Criterion,
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None,
    distributed: bool = False,
    sequential: str | None = None,
) -> Iterator[Stage]:
    """Yield the parts of a model, with the passes that the criterion observes."""
    if criterion.needs == "gradients":
        average = average_gradients if distributed else _alone
        yield Stage(model, partial(criterion.passes, model, batches, partial(_loss_of, loss or _default_loss), average))
    else:
        run = partial(forward, model) if loss is None else torch.no_grad()(partial(loss, model))
        yield from stages(model, batches, run, sequential)


def _alone(model: nn.Module) -> None:
    """Leave the gradients, which are those of all ranks."""


def _observe(units: Sequence[Units], criterion: Criterion, stage: Stage, distributed: bool = False) -> None:
    """Let the criterion observe these units while a stage is run."""
    observation = Observation(criterion, units, several=distributed)
    if not observation.needed:
        return
    observation.reset()
    ids = {id(unit.parameter) for unit in units}
    observation.open()
    try:
        for _ in stage.passes():
            observation.gradients(ids)
            observation.step()
        if not observation.steps:
            raise ValueError("data, or samples, must have a batch, got none")
        observation.finish()
    finally:
        observation.close()


def _loss_of(loss: Loss, model: nn.Module, batch: Any) -> Tensor:
    found: Any = loss(model, batch)
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise TypeError(f"loss must return one number, a tensor, got {shown(found)}")
    return found


def _default_loss(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise ValueError(f"loss must be given where a batch is not (inputs, targets), got a {type(batch).__name__}")
    output, target = model(batch[0]), batch[1]
    return (
        nn.functional.mse_loss(output, target)
        if target.is_floating_point()
        else nn.functional.cross_entropy(output, target)
    )
