"""Decision: one update of the masks, from scores to which units stay."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_prune.criteria.criterion import Criterion
from lightning_prune.masks import Masks
from lightning_prune.tensors.boolean import slices
from lightning_prune.tensors.distributed import over_ranks
from lightning_prune.tensors.radix import identity
from lightning_prune.tensors.selection import HeldScores, Scores
from lightning_prune.tensors.sources import Placement, Source
from lightning_prune.tensors.streaming import StreamedScores
from lightning_prune.units.units import Units
from lightning_prune.validation.arguments import real

Allocate = Callable[[Scores], Mapping[str, int]]

HELD = 1 << 18  # units: the scores of no more than so many are held in memory, and computed once an update
HELD_EACH = 1 << 10  # units of a target
_WRONG_SHAPE = 1 << 31


class Decision(NamedTuple):
    """What an update decides: masks by parameter name, and how many units of each target they keep."""

    masks: Masks
    keep: dict[str, int]

    def scarce(self, units: Sequence[Units]) -> dict[str, int]:
        """Return how many units are left of the targets that keep none, or one of several."""
        return {unit.name: left for unit in units if (left := self.keep[unit.name]) < min(unit.size, 2)}


@torch.no_grad()
def decide(units: Sequence[Units], criterion: Criterion, allocate: Allocate, held: Mapping[str, Tensor]) -> Decision:
    """Score the units, share out what is due, select exactly that many, and expand the choice to masks.

    Units that ``held`` has pruned stay pruned.

    Args:
        units: The targets.
        criterion: Scores them.
        allocate: From all scores to the number of units that each target keeps.
        held: The masks until now.

    Raises:
        ValueError: If a score is NaN or infinite, or the allocation is not one of these targets.
    """
    scores = score(units, criterion, {unit.name: unit.kept(held) for unit in units})
    wanted = allocate(scores)
    _check_allocation(wanted, scores.sizes)
    due = {unit.name: unit.size - round_keep(unit, int(wanted[unit.name])) for unit in units}
    due = stay_pruned(due, scores.pruned(), units)
    masks = Masks()
    for unit in units:
        for name, mask in unit.masks(scores.lowest(unit.name, due[unit.name]).logical_not_()).items():
            masks[name] = masks[name] & mask if name in masks else mask  # units may share a parameter
    return Decision(masks, {unit.name: unit.size - due[unit.name] for unit in units})


def score(units: Sequence[Units], criterion: Criterion, kept: Mapping[str, Tensor | None]) -> Scores:
    """Return the scores of the units by target name; those that are not ``kept`` come first, None keeps all.

    ``criterion.scores`` is called once for each target of a model with up to 262,144 units, or 1,024 a target. Those of
    larger models are not held in memory but computed at each of some five passes, of single weights a part at a time
    if they are element-wise.

    Raises:
        ValueError: If a score is NaN or infinite.
    """
    check_channels(units, criterion)
    # many small targets are held, too: each has a cost of its own at every pass
    held = HELD and max(HELD, HELD_EACH * len(units))
    if any(unit.sharded for unit in units) or sum(unit.size for unit in units) > held:
        return _streamed(units, criterion, kept)
    values, raw, finite = {}, {}, []
    for unit in units:
        found, mask = criterion.scores(unit), kept[unit.name]
        if found.numel() != unit.size:
            raise ValueError(_wrong_shape(unit, criterion))
        finite.append(found.isfinite().all())
        compared = unit.compared(found, mask, criterion.by_row)
        if compared is not found:
            raw[unit.name] = found
        compared = compared if compared.dtype == torch.float64 else compared.float()
        values[unit.name] = compared if mask is None else compared.masked_fill(~mask.view_as(compared), -torch.inf)
    for unit, flag in zip(units, finite, strict=True):
        if not flag:
            raise ValueError(_not_finite(unit, criterion))
    return HeldScores(values, {unit.name: tuple(unit.parameter.shape) for unit in units}, raw)


def _streamed(units: Sequence[Units], criterion: Criterion, kept: Mapping[str, Tensor | None]) -> Scores:
    distributed = any(unit.sharded for unit in units)
    reduce = over_ranks if distributed else identity
    faults, types = zip(*(_faults(unit, criterion) for unit in units), strict=True)
    # all ranks learn what one has found, since they have to raise together
    for unit, fault in zip(units, reduce(torch.tensor(faults)).tolist(), strict=True):
        if fault:
            raise ValueError((_wrong_shape if fault >= _WRONG_SHAPE else _not_finite)(unit, criterion))
    sources = {
        unit.name: Source(
            partial(unit.compared_stream, criterion, kept[unit.name]),
            unit.size,
            tuple(unit.parameter.shape),
            kept[unit.name],
            partial(criterion.scores, unit),
            unit.placement if distributed else Placement(),
        )
        for unit in units
    }
    wide = torch.float64 in types or any(unit.ranks(criterion.by_row) for unit in units)
    return StreamedScores(sources, reduce, 64 if wide else 32)


def _faults(unit: Units, criterion: Criterion) -> tuple[int, torch.dtype]:
    """Return what is wrong with the scores of a target, 0 for nothing, and their type."""
    scores, part = unit.stream(criterion)
    dtype = part(slice(0)).dtype
    index = unit.placement.index
    size = unit.size if index is None else index().numel()
    if scores.numel() != size:
        return _WRONG_SHAPE, dtype
    return int(not all(_is_finite(part(chunk)) for chunk in slices(size, scores.device))), dtype


def _is_finite(scores: Tensor) -> bool:
    return not scores.numel() or all(bool(end.isfinite()) for end in scores.aminmax())


def _wrong_shape(unit: Units, criterion: Criterion) -> str:
    return (
        f"{criterion} must give one score for each of the {unit.size} units of {unit.name!r}: pool what weights give "
        f"with units.sum or units.mean"
    )


def _not_finite(unit: Units, criterion: Criterion) -> str:
    return f"scores must be finite, got NaN or infinity from {criterion} for {unit.name!r}"


def check_channels(units: Sequence[Units], criterion: Criterion) -> None:
    """Reject units that scores of output channels cannot tell apart.

    Raises:
        ValueError: If the criterion scores output channels, and a unit has weights of all of them.
    """
    for unit in units:
        if criterion.by_channel and unit.crosses:
            raise ValueError(
                f"granularity must have units of output channels, which {type(criterion).__name__} scores, got "
                f"{unit.label} for {unit.name!r}"
            )


def _check_allocation(keep: Mapping[str, int], sizes: Mapping[str, int]) -> None:
    """Reject what does not say how many units each target keeps."""
    if not isinstance(keep, Mapping) or keep.keys() != sizes.keys():
        raise ValueError(f"scope must return the number of units to keep for each of {list(sizes)}, got {keep}")
    for name, size in sizes.items():
        given = keep[name] if type(keep[name]) is int else real(f"scope()[{name!r}]", keep[name])
        if not 0 <= given <= size or given != int(given):
            raise ValueError(
                f"scope must keep a whole number of units, at most all, of each of {dict(sizes)}, got {keep}"
            )


def round_keep(unit: Units, keep: int) -> int:
    """Return how many units of a target really stay where so many are to be kept."""
    step = unit.round_to
    return min(unit.size, max(unit.minimum, (keep + (step // 2 if unit.even else step - 1)) // step * step))


def stay_pruned(due: dict[str, int], pruned: Mapping[str, int], units: Sequence[Units]) -> dict[str, int]:
    """Let no target have fewer pruned units than before; those with most new ones make up for it, in whole steps."""
    surplus = sum(max(0, pruned[name] - count) for name, count in due.items())
    if not surplus:
        return due
    steps = {unit.name: unit.round_to for unit in units}
    settled = {name: max(count, pruned[name]) for name, count in due.items()}
    for name in sorted(settled, key=lambda name: pruned[name] - settled[name]):
        back = min(surplus, settled[name] - pruned[name]) // steps[name] * steps[name]
        settled[name] -= back
        surplus -= back
    return settled
