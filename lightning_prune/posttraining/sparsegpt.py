"""SparseGPT: prunes a trained model layer by layer, and updates the remaining weights to compensate."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune import scopes
from lightning_prune.criteria import Wanda
from lightning_prune.granularities import Granularity, Weight
from lightning_prune.masks import Masks
from lightning_prune.models.orientation import as_rows
from lightning_prune.models.parameters import Target, fractions
from lightning_prune.posttraining.allocation_search import searched
from lightning_prune.posttraining.calibration import forward, stages, take, undisturbed
from lightning_prune.posttraining.layer_moments import check_layers, moments_of
from lightning_prune.posttraining.observing import observed_units
from lightning_prune.posttraining.reconstruction import Choice, EvenChoice, make_choice, reconstruct
from lightning_prune.tensors.boolean import count
from lightning_prune.updates.decision import score
from lightning_prune.updates.remaining import told
from lightning_prune.updates.target_sparsity import Sparsity, SparsityTarget
from lightning_prune.validation.arguments import explain_renamed, integer, number
from lightning_prune.validation.arguments import fractions as fractions_in
from lightning_prune.validation.instances import batches, instance, text
from lightning_prune.validation.values import optional
from lightning_prune.validation.warning import warn


@explain_renamed
def sparsegpt(
    model: nn.Module,
    sparsity: Sparsity,
    *,
    data: Iterable[Any],
    granularity: Granularity = Weight(),
    targets: Sequence[str] = (),
    ignore: Sequence[str] = (),
    blocksize: int = 128,
    damping: float = 0.01,
    sequential: str | None = None,
    scope: scopes.ScopeName | scopes.Scope = "local",
) -> Masks:
    """Prune every target, reconstruct its outputs on the data in place, and return the masks.

    Weights are pruned column by column. The error of a pruned weight is distributed over the remaining columns of its
    row by the inverse of the input's second moments. Weights that are already zero stay zero and count. Weights of
    inputs that are zero in all of the data become zero as well, and are pruned first.

    Args:
        model: Any module; the targets belong to linear layers and convolutions, with groups or without.
        sparsity: Fraction of zeros among the targets, in [0, 1), or ``{pattern: fraction}`` per layer. A layer that has
            more zeros already keeps them.
        data: Batches to calibrate with, all of which are used. A batch is the model's input, or a sequence that begins
            with it.
        granularity: ``Weight()``, ``NM(n, m)`` to choose in groups of m inputs, or ``SharedFanIn(rows)``.
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out.
        blocksize: Number of columns to choose weights from together; every block is pruned to the same sparsity.
        damping: Added to the second moments of every input, as a fraction of their mean.
        sequential: Name of the ModuleList or Sequential whose blocks run one after another. Each block is then
            calibrated on the outputs of the pruned blocks before it, and only one block's inputs are held in memory.
        scope: How the sparsity is allocated to the targets: "local" gives the same to each; any other scope, such as
            ``OWL()``, uses the scores of ``Wanda`` for the dense model. That takes one more pass over the data, which
            are then held in memory. ``Evolve()`` tries allocations with masks by these scores.

    Raises:
        ValueError: If an argument is out of range, a target belongs to another kind of layer, or an input is not
            finite.

    Reference: Frantar and Alistarh, 2023, "SparseGPT", arXiv:2301.00774.

    >>> layer = nn.Linear(8, 4)
    >>> masks = sparsegpt(layer, 0.5, data=[torch.randn(32, 8)])
    >>> int((layer.weight == 0).sum())
    16
    """
    instance("model", model, nn.Module)
    batches("data", data)
    optional(text, "sequential", sequential, "the name of a container of blocks")
    instance("granularity", granularity, Granularity)
    goal = SparsityTarget(fractions_in("sparsity", sparsity)).for_granularity(granularity)
    if granularity.coupled or not (granularity.single or granularity.even):
        raise ValueError(f"granularity must be Weight(), NM(n, m) or SharedFanIn(rows), got {granularity}")
    allocate = scopes.resolve(scope)
    if granularity.even and allocate is not scopes.local:
        raise ValueError(f'scope must be "local" for {granularity}, whose layers are all equally sparse, got {scope!r}')
    blocksize = integer("blocksize", blocksize, 1)
    damping = number("damping", damping, "[0, inf)")
    found = goal.find(model, targets, ignore)
    check_layers(found)
    data = data if allocate is scopes.local else list(data)
    shares = _shares(model, found, goal, allocate, data)
    masks = Masks()
    with undisturbed(model):
        for stage in stages(model, take(data, None, model), partial(forward, model), sequential):
            inside = set(stage.part.parameters())
            now = [target for target in found if target.parameter in inside and target.name not in masks]
            moments = moments_of(now, stage)
            for target in now:
                choice = make_choice(shares[target.name], granularity, blocksize)
                masks[target.name] = _prune(target, moments.pop(target.name), choice, damping)
    left = {target.name: count(masks[target.name]) for target in found}
    if few := {t.name: left[t.name] for t in found if left[t.name] <= 1 < t.parameter.numel()}:
        warn(told("sparsegpt", few))
    return masks


def _shares(
    model: nn.Module, found: Sequence[Target], target: SparsityTarget, scope: scopes.Scope, data: Iterable[Any]
) -> dict[str, float]:
    """Return the fraction of each target that goes."""
    if isinstance(target.sparsity, Mapping) or scope is scopes.local:
        return fractions(target.sparsity if isinstance(target.sparsity, Mapping) else {"*": target.final}, found)
    units = observed_units(model, found, Wanda(), Weight(), data, None)
    scores = score(units, Wanda(), {unit.name: None for unit in units})
    allocate = partial(target.allocate, found=found, criterion=Wanda(), scope=scope)
    if isinstance(scope, scopes.Search):
        _, (allocate,) = searched([allocate], target, scope, Weight(), model, units, Wanda(), data, None, False)
    keep = allocate(scores)
    return {name: 1.0 - keep[name] / size for name, size in scores.sizes.items()}


def _prune(target: Target, moments: Tensor, choice: Choice | EvenChoice, damping: float) -> Tensor:
    """Prune and reconstruct one target in place; return its mask."""
    module = target.modules[0]
    weight = as_rows(target.parameter.detach(), module)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rows = weight.reshape(len(moments), -1, moments.shape[1]).to(dtype)
    order, spans = choice.order(weight.shape[1], weight.shape[2:].numel())
    order = order.to(weight.device)
    inner = moments[:, order][:, :, order]
    new, pruned = reconstruct(rows[..., order], inner, choice, spans, choice.blocksize, damping)
    back = order.argsort()
    weight.copy_(new[..., back].reshape(weight.shape))
    return as_rows(~pruned[..., back].reshape(weight.shape), module).contiguous()
