"""SparseGPT: prune a trained model layer by layer, and let the weights that stay make up for those that go."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune import scopes
from lightning_prune.criteria import Wanda
from lightning_prune.granularities import Granularity, Weight
from lightning_prune.masks import Masks
from lightning_prune.models.layer_inputs import input_of, is_readable, windows
from lightning_prune.models.orientation import as_rows
from lightning_prune.models.parameters import Target, fractions
from lightning_prune.posttraining.calibration import Stage, forward, stages, take, undisturbed
from lightning_prune.posttraining.observing import observed_units
from lightning_prune.posttraining.reconstruction import Choice, reconstruct, second_moments
from lightning_prune.tensors.distributed import is_sharded
from lightning_prune.units.finding import make_units
from lightning_prune.updates.decision import score
from lightning_prune.updates.remaining import scarce, told
from lightning_prune.updates.target_sparsity import Sparsity, SparsityTarget
from lightning_prune.validation.arguments import fractions as fractions_in
from lightning_prune.validation.arguments import integer, number, text
from lightning_prune.validation.instances import batches, instance
from lightning_prune.validation.values import optional


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
    """Prune every target by its own sparsity and reconstruct what it outputs for the data, in place; return the masks.

    Weights go column by column. The error that a pruned weight makes is spread, as the inverse of the input's second
    moments says, over the weights of its row in the columns that are still to come. Weights that are zero already stay
    zero, and count; those of inputs that are zero in all of the data become zero, too, and are the first to be pruned.

    Args:
        model: Any module; the targets belong to linear layers and convolutions, with groups or without.
        sparsity: Fraction of zeros among the targets, in [0, 1), or ``{pattern: fraction}`` per layer. More go where
            more are zero already.
        data: Batches to calibrate with; all of them are taken. A batch is the model's input, or has it in front.
        granularity: ``Weight()``, or ``NM(n, m)`` to choose in groups of m inputs.
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out.
        blocksize: Columns over which weights are chosen together; every block gets its share of zeros.
        damping: Added to the second moments of every input, as a fraction of their mean.
        sequential: Name of the ModuleList or Sequential whose blocks run one after another; each one is then calibrated
            behind the pruned ones, and no more than one block's input is held.
        scope: How one sparsity is shared out over the targets: "local" gives it to each; any other scope, such as
            ``OWL()``, goes by the scores of ``Wanda`` for the model as it is. That takes one more pass over the data,
            which are held.

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
    goal = SparsityTarget(fractions_in("sparsity", sparsity))
    goal.check_granularity(granularity)
    if not granularity.single:
        raise ValueError(f"granularity must be Weight() or NM(n, m), got {granularity}")
    allocate = scopes.resolve(scope)
    if granularity.group is not None and allocate is not scopes.local:
        raise ValueError(f'scope must be "local" for {granularity}, which leaves nothing to share out, got {scope!r}')
    blocksize = integer("blocksize", blocksize, 1)
    damping = number("damping", damping, "[0, inf)")
    found = goal.find(model, targets, ignore)
    _check_layers(found)
    data = data if allocate is scopes.local else list(data)
    shares = _shares(model, found, goal, allocate, data)
    masks = Masks()
    with undisturbed(model):
        for stage in stages(model, take(data, None, model), partial(forward, model), sequential):
            inside = set(stage.part.parameters())
            now = [target for target in found if target.parameter in inside and target.name not in masks]
            moments = _moments(now, stage)
            for target in now:
                choice = Choice(shares[target.name], granularity.group, blocksize)
                masks[target.name] = _prune(target, moments.pop(target.name), choice, damping)
    if few := scarce(make_units(found, model, granularity), masks):
        warnings.warn(told("sparsegpt", few), stacklevel=2)
    return masks


def _shares(
    model: nn.Module, found: Sequence[Target], target: SparsityTarget, scope: scopes.Scope, data: Iterable[Any]
) -> dict[str, float]:
    """Return the fraction of each target that goes."""
    if isinstance(target.sparsity, Mapping) or scope is scopes.local:
        return fractions(target.sparsity if isinstance(target.sparsity, Mapping) else {"*": target.final}, found)
    units = observed_units(model, found, Wanda(), Weight(), data, None)
    scores = score(units, Wanda(), {unit.name: None for unit in units})
    keep = scope(scores, target.final)
    return {name: 1.0 - keep[name] / size for name, size in scores.sizes.items()}


def _check_layers(found: Sequence[Target]) -> None:
    for target in found:
        kinds = [type(module).__name__ for module in target.modules if not is_readable(module)]
        if kinds:
            raise ValueError(
                f"targets must belong to linear layers and convolutions, got {target.name!r} of {kinds[0]}"
            )
        if is_sharded(target.parameter):
            raise ValueError(f"targets must not be sharded over ranks, got {target.name!r}")


def _moments(found: Sequence[Target], stage: Stage) -> dict[str, Tensor]:
    """Run the stage and return, by name, the sums of x x^T over what each target met: (groups, columns, columns)."""
    moments: dict[str, Tensor] = {}

    def add(target: Target, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        seen = windows(module, input_of(inputs, target.name))
        moments[target.name] = second_moments(seen, target.parameter.ndim, moments.get(target.name))

    handles = [module.register_forward_hook(partial(add, target)) for target in found for module in target.modules]
    try:
        for _ in stage.passes() if found else ():
            pass
    finally:
        for handle in handles:
            handle.remove()
    for target in found:
        if target.name not in moments:
            raise ValueError(
                f"data must lead through the layer of {target.name!r}, got no forward pass of it: ignore it"
            )
        if not bool(moments[target.name].isfinite().all()):
            raise ValueError(f"inputs must be finite, got NaN or infinity at the layer of {target.name!r}")
    return moments


def _prune(target: Target, moments: Tensor, choice: Choice, damping: float) -> Tensor:
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
