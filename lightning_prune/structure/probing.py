"""Probing: which channels of earlier outputs an activation depends on, by the gradients of parts of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reach:
    """What the units of an activation depend on.

    Args:
        size: How many successive channels form a unit.
        units: For every dimension of a tensor, by the number of the tensor and the dimension: the unit that depends on
            each index, -1 for none, -2 for all.
    """

    size: int
    units: dict[tuple[int, int], Tensor]


def reach(
    values: Tensor, read: int, sources: Sequence[Tensor], dims: Sequence[Sequence[int]], made: int, size: int = 1
) -> Reach | None:
    """Return the smallest units of an activation that depend on channels of their own; None if there are none.

    A unit is a channel, or as many successive channels as depend on the same others, such as a head of an attention.

    Args:
        values: The activation.
        read: Its dimension with the channels.
        sources: What it may depend on.
        dims: The dimensions of each source that may hold its channels.
        made: How many of the sources, the first ones, are outputs of weights. One of them must have such channels.
        size: The number of channels in a unit is a multiple of this.

    >>> earlier = torch.rand(2, 3, requires_grad=True)
    >>> reach(earlier.exp(), -1, [earlier], [[1]], 1)
    Reach(size=1, units={(0, 1): tensor([0, 1, 2])})
    """
    count = values.shape[read]
    if _mixes(values, read, sources[:made]):
        return None
    for width in divisors(count)[:-1]:
        if width % size == 0:
            found = _decoded(_Probe(values, read, sources, dims, width), made)
            if found is not None:
                return Reach(width, found)
    return None


def divisors(number: int) -> list[int]:
    """Return all divisors of a number in ascending order.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [d for d in range(1, number + 1) if number % d == 0]


def touched(
    values: Sequence[Tensor], sources: Sequence[Tensor], weights: Sequence[Tensor] | None = None
) -> list[Tensor | None]:
    """Return where activations depend on elements of sources (bool); None for a source that they do not depend on.

    >>> earlier, other = torch.rand(3, requires_grad=True), torch.rand(3, requires_grad=True)
    >>> touched([earlier[:2] * 2], [earlier, other])
    [tensor([ True,  True, False]), None]
    """
    if weights is None:
        generator = torch.Generator().manual_seed(1)
        weights = [torch.rand(v.shape, generator=generator).to(v) + 0.5 for v in values]
    found = torch.autograd.grad(values, sources, weights, retain_graph=True, allow_unused=True)
    return [None if grad is None or not grad.any() else grad != 0 for grad in found]


def _mixes(values: Tensor, read: int, sources: Sequence[Tensor]) -> bool:
    """Return whether a single channel depends on all that any does, as behind a norm over all of them."""
    first = torch.zeros_like(values)
    first.narrow(read, 0, 1).fill_(1.0)
    pairs = zip(touched([values], sources, [first]), touched([values], sources), strict=True)
    return all(one is other or (one is not None and other is not None and one.equal(other)) for one, other in pairs)


def any_along(hit: Tensor, dim: int) -> Tensor:
    """Return at which indices of a dimension any element is true.

    >>> any_along(torch.tensor([[True, False], [True, False]]), 1)
    tensor([ True, False])
    """
    return hit.movedim(dim, 0).reshape(hit.shape[dim], -1).any(1)


class _Probe:
    """Asks for the gradients of some units of an activation, by the bits of their numbers."""

    def __init__(
        self, values: Tensor, read: int, sources: Sequence[Tensor], dims: Sequence[Sequence[int]], size: int
    ) -> None:
        self.values, self.sources, self.dims = values, sources, dims
        self.number = torch.arange(values.shape[read], device=values.device) // size
        self.shape = [-1 if d == read % values.ndim else 1 for d in range(values.ndim)]
        bits = range(max(1, (values.shape[read] // size - 1).bit_length()))
        self.bits = [bits[0], *reversed(bits[1:])]  # in this order, units of a wrong size contradict each other early
        self.weights = torch.rand(values.shape, generator=torch.Generator().manual_seed(2)).to(values) + 0.5

    def hits(self, bit: int, value: int) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Yield which indices (bool) of every dimension the units with that value of a bit depend on."""
        chosen = ((self.number >> bit) & 1) == value
        weights = self.weights * chosen.view(self.shape)
        found = torch.autograd.grad(self.values, self.sources, weights, retain_graph=True, allow_unused=True)
        for place, (source, grad) in enumerate(zip(self.sources, found, strict=True)):
            hit = torch.zeros_like(source, dtype=torch.bool) if grad is None else grad != 0
            for dim in self.dims[place]:
                yield (place, dim), any_along(hit, dim)


def _decoded(probe: _Probe, made: int) -> dict[tuple[int, int], Tensor] | None:
    """Return the unit of every index; None if the units are not of that size."""
    both: dict[tuple[int, int], Tensor] = {}  # at which indices units of both values of some bit meet,
    one: dict[tuple[int, int], Tensor] = {}  # and at which those of one value alone
    units: dict[tuple[int, int], Tensor] = {}
    for number, bit in enumerate(probe.bits):
        for (key, off), (_, on) in zip(probe.hits(bit, 0), probe.hits(bit, 1), strict=True):
            # an index that units of both values depend on belongs to all units, or to none
            both[key] = (off & on) if number == 0 else both[key] | (off & on)
            one[key] = (off ^ on) if number == 0 else one[key] | (off ^ on)
            units[key] = units.get(key, 0) + (on.long() << bit)
        if _contradictory(probe, both, one) or not _any_alone(both, one, made):
            return None
    found = {}
    for key, unit in units.items():
        if not (both[key] & one[key]).any():
            found[key] = unit.masked_fill(both[key], -2).masked_fill(~both[key] & ~one[key], -1)
    return found if any((unit >= 0).any() for (place, _), unit in found.items() if place < made) else None


def _any_alone(both: dict[tuple[int, int], Tensor], one: dict[tuple[int, int], Tensor], made: int) -> bool:
    """Return whether any channel that a weight makes may still belong to a single unit."""
    return any((one[key] & ~both[key]).any() for key in one if key[0] < made)


def _contradictory(probe: _Probe, both: dict[tuple[int, int], Tensor], one: dict[tuple[int, int], Tensor]) -> bool:
    """Return whether a source has indices in every dimension that some, but not all, units depend on."""
    return any(
        bool(dims) and all((both[place, dim] & one[place, dim]).any() for dim in dims)
        for place, dims in enumerate(probe.dims)
    )
