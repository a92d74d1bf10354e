"""Masks: bool tensors, True = kept, under the names of the parameters, and how scores become masks."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.arguments import real
from lightning_prune.criteria import Criterion
from lightning_prune.flags import count, slices
from lightning_prune.instances import instance
from lightning_prune.radix import Reduce, identity
from lightning_prune.selection import Scores, Source
from lightning_prune.shards import is_sharded, local, over_ranks
from lightning_prune.targets import named_parameters
from lightning_prune.units import Units
from lightning_prune.zeroing import zero_pruned

Allocate = Callable[[Scores], Mapping[str, int]]


class Masks(dict[str, Tensor]):
    """Masks by qualified parameter name: bool, of the parameter's shape, True = kept.

    >>> model = nn.Linear(2, 1)
    >>> masks = Masks(weight=torch.tensor([[True, False]]))
    >>> masks.apply(model)
    >>> int((model.weight == 0).sum()), masks.sparsity
    (1, 0.5)
    """

    @property
    def sparsity(self) -> float:
        """The fraction of zeros among all masked entries."""
        total = sum(mask.numel() for mask in self.values())
        return 1.0 - sum(count(mask) for mask in self.values()) / total if total else 0.0

    def apply(self, model: nn.Module) -> None:
        """Zero the pruned entries of the model's parameters, in place.

        Raises:
            ValueError: If the model lacks a parameter, or it has another shape.
        """
        parameters = named_parameters(instance("model", model, nn.Module))
        self.check(parameters)
        zero_pruned((local(parameters[name]), mask) for name, mask in self.items())

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        """Refuse parameters that the masks do not fit.

        Raises:
            ValueError: If a name is missing or a shape differs.
        """
        for name, mask in self.items():
            if name not in parameters:
                raise ValueError(f"the model must have the masked parameter {name!r}, got none of that name")
            if local(parameters[name]).shape != mask.shape:
                shapes = f"{tuple(local(parameters[name]).shape)} for a mask of {tuple(mask.shape)}"
                raise ValueError(f"the parameter {name!r} must have the shape of its mask, got {shapes}")


def pack(mask: Tensor) -> dict[str, Any]:
    """Return a mask as one bit an entry: ``{"shape": [...], "bits": uint8 tensor on the CPU}``.

    >>> pack(torch.tensor([True, False, True]))
    {'shape': [3], 'bits': tensor([160], dtype=torch.uint8)}
    """
    flat = mask.reshape(-1).to("cpu", torch.uint8)
    flat = nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    place = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)
    return {"shape": list(mask.shape), "bits": (flat * place).sum(1, dtype=torch.uint8)}


def unpack(packed: Mapping[str, Any]) -> Tensor:
    """Return the mask that ``pack`` packed.

    Raises:
        ValueError: If there are not exactly as many bits as the shape needs.

    >>> unpack(pack(torch.tensor([True, False, True])))
    tensor([ True, False,  True])
    """
    shape, bits = torch.Size(packed["shape"]), packed["bits"]
    size = -(-shape.numel() // 8)
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.shape != (size,) or min(shape, default=0) < 0:
        found = f"{bits.dtype} {tuple(bits.shape)}" if isinstance(bits, Tensor) else type(bits).__name__
        raise ValueError(f"a packed mask of shape {tuple(shape)} must have {size} bytes, got {found}")
    shift = torch.tensor([7, 6, 5, 4, 3, 2, 1, 0], dtype=torch.uint8)
    flat: Tensor = (bits[:, None] >> shift).bitwise_and_(1).bool().view(-1)
    return flat[: shape.numel()].view(shape)


def pack_all(masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return masks by name as ``{"shapes": {name: [...]}, "bits": uint8 tensor}``; one tensor, since each has a cost.

    >>> pack_all({"weight": torch.tensor([True, False, True])})
    {'shapes': {'weight': [3]}, 'bits': tensor([160], dtype=torch.uint8)}
    """
    packed = {name: pack(mask) for name, mask in masks.items()}
    bits = [part["bits"] for part in packed.values()]
    return {
        "shapes": {name: part["shape"] for name, part in packed.items()},
        "bits": torch.cat(bits) if bits else torch.empty(0, dtype=torch.uint8),
    }


def unpack_all(packed: Mapping[str, Any]) -> Masks:
    """Return the masks that ``pack_all`` packed.

    Raises:
        ValueError: If bits are missing, of the parameter that is named, or left over.

    >>> unpack_all(pack_all({"weight": torch.tensor([True, False, True])}))
    {'weight': tensor([ True, False,  True])}
    """
    masks, begin = Masks(), 0
    for name, shape in packed["shapes"].items():
        end = begin + -(-math.prod(shape) // 8)
        try:
            masks[name] = unpack({"shape": shape, "bits": packed["bits"][begin:end]})
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"the state must hold a whole mask of {name!r}, got: {error}") from error
        begin = end
    if begin != len(packed["bits"]):
        raise ValueError(f"the state must hold {begin} bytes of masks for {list(masks)}, got {len(packed['bits'])}")
    return masks


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
