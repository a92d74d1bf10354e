"""Rounds: the units of a model as the criterion has observed them, all together or block by block, round by round."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from lightning_prune.criteria import Criterion, Loss
from lightning_prune.masks import Masks
from lightning_prune.posttraining.calibration import Stage, take, undisturbed
from lightning_prune.posttraining.observing import batches_of, forward_stages, observed, stages_of
from lightning_prune.posttraining.recovery import Recipe, Recovery
from lightning_prune.tensors.selection import Scores
from lightning_prune.units.units import Units
from lightning_prune.updates.decision import Allocate, score

Ready = Iterator[tuple[Sequence[Units], Allocate]]


def rounds_of(
    model: nn.Module,
    units: Sequence[Units],
    criterion: Criterion,
    allocations: Sequence[partial[Mapping[str, int]]],
    data: Iterable[Any] | None,
    loss: Loss | None,
    sequential: str | None,
    distributed: bool,
    masks: Masks,
    recipe: Recipe | None,
) -> Ready:
    """Yield units that are ready to be scored, with how many of them to keep, for each round; then recover.

    Where the criterion watches forward passes and there is one round, each block is recovered once it is pruned,
    before the next one is observed. Otherwise all masks are chosen first.
    """
    observe = partial(_observed, model, units, criterion, allocations, loss=loss, distributed=distributed, masks=masks)
    if recipe is None:
        yield from observe(data=data, sequential=sequential)
    elif criterion.needs == "forwards" and len(allocations) == 1 and not criterion.batch_statistics:
        yield from observe(data=data, sequential=sequential, recovery=Recovery(model, units, masks, recipe))
    else:
        recovery = Recovery(model, units, masks, recipe)
        with undisturbed(model):
            held = list(take(data, None, model) if criterion.needs == "weights" else batches_of(criterion, data, model))
        if not held:
            raise ValueError("data must have a batch, got none")
        dense = recovery.copies()
        if criterion.needs == "weights":
            yield from ((units, allocate) for allocate in allocations)
        else:
            yield from observe(data=held, sequential=sequential if criterion.needs == "forwards" else None)
        with undisturbed(model):
            recovery.afterwards(forward_stages(model, held, loss, sequential, recovery.fitted), dense)


def _observed(
    model: nn.Module,
    units: Sequence[Units],
    criterion: Criterion,
    allocations: Sequence[partial[Mapping[str, int]]],
    *,
    data: Iterable[Any] | None,
    loss: Loss | None,
    sequential: str | None,
    distributed: bool,
    masks: Masks,
    recovery: Recovery | None = None,
) -> Ready:
    """Yield units when the criterion has observed them, with how many of them to keep, for each round."""
    # also while a loader is asked for batches, which may draw random numbers
    with undisturbed(model, criterion.batch_statistics):
        batches = batches_of(criterion, data, model)
        batches = list(batches) if len(allocations) > 1 or sequential or recovery else batches
        stages = partial(stages_of, criterion, model, batches, loss, distributed)
        names = tuple(unit.name for unit in units)
        for allocate in allocations:
            keep: Allocate = partial(_among, names, allocate)
            if sequential and getattr(allocate.keywords["scope"], "compares_blocks", False):
                keep = _settled(units, criterion, allocate, stages(), masks, distributed)
            parts = stages(sequential)
            if recovery is not None:
                parts = recovery.around(stages(sequential, recovery.fitted))
            for now in observed(units, criterion, parts, distributed):
                yield now, keep


def _among(names: tuple[str, ...], allocate: Allocate, scores: Scores) -> Mapping[str, int]:
    """Return how many units each target of a block keeps, when a scope is told the names of the targets of all."""
    scores.names = names
    return allocate(scores)


def _settled(
    units: Sequence[Units],
    criterion: Criterion,
    allocate: Allocate,
    stages: Iterable[Stage],
    masks: Masks,
    distributed: bool,
) -> Allocate:
    """Return how many units each target keeps by the scores of all, before any block is pruned."""
    for _ in observed(units, criterion, stages, distributed):
        keep = allocate(score(units, criterion, {unit.name: unit.kept(masks) for unit in units}))
    return lambda scores: {name: keep[name] for name in scores}
