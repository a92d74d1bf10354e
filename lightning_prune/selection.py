"""Selection: which k of n scores are the lowest, exactly, without sorting, concatenating or gathering them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from typing_extensions import override

Reduce = Callable[[Tensor], Tensor]

_DIGIT = 16  # bits a pass: 2**16 counters stay in the cache
_CHUNK = 1 << 20  # elements: temporaries of this size are reused by the allocator instead of being mapped anew


def identity(counts: Tensor) -> Tensor:
    """Return the counters as they are: the sum over one process."""
    return counts


def chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the entries of a tensor in flat order, a cache-sized piece at a time; views where it is contiguous."""
    flat = tensor.reshape(-1)
    return (flat[begin : begin + _CHUNK] for begin in range(0, max(1, flat.numel()), _CHUNK))


def keys(scores: Tensor, bits: int = 32) -> Tensor:
    """Return signed integers of 32 or 64 bits that order as the floats do (-0.0 equals 0.0).

    >>> keys(torch.tensor([-1.0, -0.0, 0.0, 2.0])).diff().sign().tolist()
    [1, 0, 1]
    """
    floats, integer = (torch.float32, torch.int32) if bits == 32 else (torch.float64, torch.int64)
    raw = (scores.to(floats) + 0.0).view(integer)
    # negative floats order backwards: flip all their bits but the sign
    return raw.bitwise_xor_(raw.bitwise_right_shift(bits - 1).bitwise_and_(torch.iinfo(integer).max))


def _histogram(key: Tensor, shift: int, prefix: int | None) -> Tensor:
    """Count the 16-bit digits at ``shift`` of the keys that begin with ``prefix``."""
    if prefix is None:
        digits = key.bitwise_right_shift(shift).add_(1 << (_DIGIT - 1))  # signed: the lowest key gets digit 0
    else:
        inside = key[key.bitwise_right_shift(shift + _DIGIT) == prefix]
        digits = inside.bitwise_right_shift_(shift).bitwise_and_((1 << _DIGIT) - 1)
    return torch.bincount(digits, minlength=1 << _DIGIT)


def kth(stream: Callable[[], Iterable[Tensor]], k: int, bits: int, reduce: Reduce = identity) -> tuple[int, int, int]:
    """Return the k-th smallest key, how many keys equal to it are among the k smallest, and how many there are.

    Args:
        stream: Gives the keys, integer tensors of any number and size, anew at each pass.
        k: From 1 to the number of keys on all ranks.
        bits: Width of the keys: 32 or 64.
        reduce: Sums a vector of counters over the ranks.

    >>> kth(lambda: [torch.tensor([3, 1], dtype=torch.int32), torch.tensor([1, 1], dtype=torch.int32)], 2, 32)
    (1, 2, 3)
    """
    prefix: int | None = None
    left, present = k, 0
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        total = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        for key in stream():
            total = total.to(key.device).add_(_histogram(key, shift, prefix))
        counts = reduce(total).cpu()
        below = counts.cumsum(0)
        digit = int(torch.searchsorted(below, left))
        present = int(counts[digit])
        left -= int(below[digit]) - present
        prefix = digit - (1 << (_DIGIT - 1)) if prefix is None else (prefix << _DIGIT) | digit
    assert prefix is not None
    return prefix, left, present


@dataclass(frozen=True)
class Source:
    """Where the unit scores of one target come from.

    Args:
        compute: Returns the scores of the units that this rank holds, a float tensor.
        size: Number of units on all ranks.
        shape: Shape of the whole weight, for scopes that look at shapes.
        counts: Whether this rank counts its units; False where another rank counts a copy of them.
        index: Returns the flat position of this rank's units in the whole (int64); None if it holds all of them.
    """

    compute: Callable[[], Tensor]
    size: int
    shape: tuple[int, ...]
    counts: bool = True
    index: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class _Cut:
    """The lowest ``count`` of one target: keys below ``key``, and the first ``ties`` of the ``equal`` ones at it."""

    count: int
    key: int
    ties: int
    equal: int


class Scores(Mapping[str, Tensor]):
    """Unit scores by target name, computed each time they are asked for and never held together.

    Args:
        sources: Where the scores of each target come from, in the order that decides between equal scores.
        reduce: Sums a vector of counters over the ranks.
        bits: 64 to tell float64 scores apart, 32 for all others.

    >>> scores = Scores.of({"a": torch.tensor([0.1, 0.9]), "b": torch.tensor([0.2, 0.3])})
    >>> scores.counts(3)
    {'a': 1, 'b': 2}
    >>> scores.lowest("a", 1)
    tensor([ True, False])
    """

    def __init__(self, sources: Mapping[str, Source], reduce: Reduce = identity, bits: int = 32) -> None:
        self._sources = dict(sources)
        self._reduce = reduce
        self._bits = bits
        self._cuts: dict[str, _Cut] = {}
        self.sizes = {name: source.size for name, source in self._sources.items()}
        self.shapes = {name: source.shape for name, source in self._sources.items()}

    @classmethod
    def of(cls, scores: Mapping[str, Tensor]) -> "Scores":
        """Return scores that are already there, as one process holds them."""
        sources = {n: Source(partial(torch.clone, s), s.numel(), tuple(s.shape)) for n, s in scores.items()}
        return cls(sources, bits=64 if any(s.dtype == torch.float64 for s in scores.values()) else 32)

    @override
    def __getitem__(self, name: str) -> Tensor:
        scores = self._sources[name].compute()
        return scores if scores.dtype == torch.float64 else scores.float()

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    @override
    def __len__(self) -> int:
        return len(self._sources)

    def below(self, level: float) -> int:
        """Return how many units score below ``level``, on all ranks."""
        found = [int((self._counted(name) < level).sum()) for name in self]
        return int(self._reduce(torch.tensor(found)).sum())

    def counts(self, k: int) -> dict[str, int]:
        """Return how many of the k lowest units lie in each target; equal scores fall in the order of the targets."""
        if k == 0:
            return dict.fromkeys(self, 0)
        key, ties, _ = self._kth(list(self), k)
        found = torch.tensor([self._around(name, key) for name in self])
        shares = {}
        for name, (under, at) in zip(self, self._reduce(found).tolist(), strict=True):
            taken = min(ties, at)
            ties -= taken
            shares[name] = under + taken
            self._cuts[name] = _Cut(shares[name], key, taken, at)
        return shares

    def lowest(self, name: str, k: int) -> Tensor:
        """Return a bool tensor of the shape of these scores: True at the k lowest, ties in flat order."""
        scores = self[name]
        if k in (0, self.sizes[name]):
            return torch.full_like(scores, k > 0, dtype=torch.bool)
        cut = self._cuts.get(name)
        if cut is None or cut.count != k:
            cut = _Cut(k, *self._kth([name], k))
        picked = torch.empty_like(scores, dtype=torch.bool).reshape(-1)
        for out, key in zip(chunks(picked), self._keys(scores), strict=True):
            torch.le(key, cut.key, out=out)
        if cut.ties < cut.equal:
            self._break_ties(name, scores, picked, cut)
        return picked.view_as(scores)

    def _keys(self, scores: Tensor) -> Iterator[Tensor]:
        return (keys(chunk, self._bits) for chunk in chunks(scores))

    def _kth(self, names: list[str], k: int) -> tuple[int, int, int]:
        def stream() -> Iterator[Tensor]:
            return (key for name in names for key in self._keys(self._counted(name)))

        return kth(stream, k, self._bits, self._reduce)

    def _counted(self, name: str) -> Tensor:
        """Return the scores that this rank counts; all ranks compute them, since that may be a common effort."""
        scores = self[name]
        return scores if self._sources[name].counts else scores[:0]

    def _around(self, name: str, level: int) -> tuple[int, int]:
        """Count this rank's units of one target below and at a key."""
        under = at = 0
        for key in self._keys(self._counted(name)):
            under += int((key < level).sum())
            at += int((key == level).sum())
        return under, at

    def _break_ties(self, name: str, scores: Tensor, picked: Tensor, cut: _Cut) -> None:
        """Unpick all equal scores but the first ``cut.ties`` in the flat order of the whole target."""
        source = self._sources[name]
        at = torch.cat([key == cut.key for key in self._keys(scores)])
        place = at.nonzero().squeeze(1)
        if source.index is None:
            picked[place[cut.ties :]] = False
            return
        index = source.index().reshape(-1)[place]
        stream = [index] if source.counts else []
        last = kth(lambda: stream, cut.ties, 64, self._reduce)[0] if cut.ties else -1
        picked[place[index > last]] = False
