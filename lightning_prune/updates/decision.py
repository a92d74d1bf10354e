"""Decision: one update of the masks, from scores to which units stay."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_prune.criteria import Criterion
from lightning_prune.masks import Masks
from lightning_prune.tensors.boolean import slices
from lightning_prune.tensors.distributed import is_sharded, over_ranks
from lightning_prune.tensors.radix import Reduce, identity
from lightning_prune.tensors.selection import Scores, Source
from lightning_prune.units.units import Units
from lightning_prune.validation.arguments import real

Allocate = Callable[[Scores], Mapping[str, int]]


def joined(masks: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the other masks, without what these prune: units may share a parameter.

    >>> joined({"a": torch.tensor([True, False])}, {"a": torch.tensor([False, True])})
    {'a': tensor([False, False])}
    """
    return {name: masks[name] & mask if name in masks else mask for name, mask in others.items()}


@torch.no_grad()
def make_masks(units: Sequence[Units], criterion: Criterion, allocate: Allocate, held: Mapping[str, Tensor]) -> Masks:
    """Return new masks: score the units, share out what is due, select exactly that many, expand.

    Units that ``held`` has pruned stay pruned.

    Args:
        units: The targets.
        criterion: Scores them.
        allocate: From all scores to the number of units that each target keeps.
        held: The masks until now.

    Raises:
        ValueError: If a score is NaN or infinite, or the allocation is not one of these targets.
    """
    kept = {unit.name: unit.kept(held) for unit in units}
    scores = score(units, criterion, kept)
    wanted = _due(allocate(scores), scores.sizes)
    due = _settle({unit.name: unit.size - unit.bound(unit.size - wanted[unit.name]) for unit in units}, scores.pruned())
    masks = Masks()
    for unit in units:
        masks.update(joined(masks, unit.masks(scores.lowest(unit.name, due[unit.name]).logical_not_())))
    return masks


@torch.no_grad()
def score(units: Sequence[Units], criterion: Criterion, kept: Mapping[str, Tensor | None]) -> Scores:
    """Return the scores of the units by target name; those that are not ``kept`` come first, None keeps all.

    Raises:
        ValueError: If a score is NaN or infinite.
    """
    several = any(is_sharded(unit.parameter) for unit in units)
    reduce = over_ranks if several else identity
    sources = {u.name: u.source(criterion.scores, kept[u.name], several, criterion.entrywise) for u in units}
    types = _check_scores(units, sources, criterion, reduce)
    wide = torch.float64 in types or any(unit.ranks(criterion.by_row) for unit in units)
    compared = {unit.name: unit.compared(sources[unit.name], criterion.by_row) for unit in units}
    return Scores(compared, reduce, 64 if wide else 32)


def _check_scores(
    units: Sequence[Units], sources: Mapping[str, Source], criterion: Criterion, reduce: Reduce
) -> set[torch.dtype]:
    """Refuse scores that are none, and return the types of the others."""
    faults, types = zip(*(_look(sources[unit.name], unit.held) for unit in units), strict=True)
    # all ranks learn of what one has found, since they have to raise together
    for unit, fault in zip(units, reduce(torch.tensor(faults)).tolist(), strict=True):
        if fault >= _WRONG_SHAPE:
            raise ValueError(
                f"{criterion} must give one score for each of the {unit.size} units of {unit.name!r}: pool what "
                f"weights give with units.sum or units.mean"
            )
        if fault:
            raise ValueError(f"scores must be finite, got NaN or infinity from {criterion} for {unit.name!r}")
    return set(types)


_WRONG_SHAPE = 1 << 31


def _look(source: Source, size: int) -> tuple[int, torch.dtype]:
    """Return what is wrong with the scores of a target, 0 for nothing, and their type."""
    scores, part = source.open()
    dtype = part(slice(0)).dtype
    if scores.numel() != size:
        return _WRONG_SHAPE, dtype
    return int(not all(_is_finite(part(piece)) for piece in slices(size, scores.device))), dtype


def _is_finite(scores: Tensor) -> bool:
    return not scores.numel() or all(bool(end.isfinite()) for end in scores.aminmax())


def _due(keep: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, int]:
    if not isinstance(keep, Mapping) or keep.keys() != sizes.keys():
        raise ValueError(f"scope must return the number of units to keep for each of {list(sizes)}, got {keep}")
    if not all(
        float(real(f"scope()[{name!r}]", keep[name])).is_integer() and 0 <= keep[name] <= sizes[name] for name in sizes
    ):
        raise ValueError(f"scope must keep a whole number of units, at most all, of each of {dict(sizes)}, got {keep}")
    return {name: size - int(keep[name]) for name, size in sizes.items()}


def _settle(due: dict[str, int], pruned: Mapping[str, int]) -> dict[str, int]:
    """Let no target have fewer pruned units than before; what that adds is taken from those with most to prune anew."""
    surplus = sum(max(0, pruned[name] - count) for name, count in due.items())
    settled = {name: max(count, pruned[name]) for name, count in due.items()}
    for name in sorted(settled, key=lambda name: pruned[name] - settled[name]):
        back = min(surplus, settled[name] - pruned[name])
        settled[name] -= back
        surplus -= back
    return settled
