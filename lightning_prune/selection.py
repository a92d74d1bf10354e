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


def keys(scores: Tensor, bits: int = 32, kept: Tensor | None = None) -> Tensor:
    """Return signed integers of 32 or 64 bits that order as the floats do (-0.0 equals 0.0).

    Where ``kept`` (bool) is False, the key is the lowest of all, whatever the score.

    >>> keys(torch.tensor([-1.0, -0.0, 0.0, 2.0])).diff().sign().tolist()
    [1, 0, 1]
    """
    floats, integer = (torch.float32, torch.int32) if bits == 32 else (torch.float64, torch.int64)
    most = torch.iinfo(integer).max
    key = (scores.to(floats) + 0.0).view(integer)
    if key.numel() and int(key.amin()) < 0:  # negative floats order backwards: flip all their bits but the sign
        key.bitwise_xor_(key.bitwise_right_shift(bits - 1).bitwise_and_(most))
    if kept is not None:  # zero or minus one, flipped: the greatest or the lowest integer; no branch on single entries
        torch.minimum(key, kept.view(torch.int8).sub(1).to(integer).bitwise_xor_(most), out=key)
    return key


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
        kept: Which of this rank's units (bool) are not pruned yet; pruned ones come first. None means all.
    """

    compute: Callable[[], Tensor]
    size: int
    shape: tuple[int, ...]
    counts: bool = True
    index: Callable[[], Tensor] | None = None
    kept: Tensor | None = None

    @property
    def pruned(self) -> int:
        """The number of this rank's units that are not kept."""
        return 0 if self.kept is None else self.kept.numel() - int(self.kept.sum())


@dataclass(frozen=True)
class _Cut:
    """The lowest units of a target: keys below ``key``, and the first ``ties`` of the ``equal`` ones at it."""

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
        self._selected: dict[tuple[str, int], tuple[Tensor, _Cut]] = {}  # by name and number, ties not yet broken
        self.sizes = {name: source.size for name, source in self._sources.items()}
        self.shapes = {name: source.shape for name, source in self._sources.items()}

    @classmethod
    def of(cls, scores: Mapping[str, Tensor]) -> "Scores":
        """Return scores that are already there, as one process holds them."""
        sources = {n: Source(partial(torch.clone, s), s.numel(), tuple(s.shape)) for n, s in scores.items()}
        return cls(sources, bits=64 if any(s.dtype == torch.float64 for s in scores.values()) else 32)

    @override
    def __getitem__(self, name: str) -> Tensor:
        scores, kept = self._computed(name), self._sources[name].kept
        return scores if kept is None else scores.masked_fill(~kept.view_as(scores), -torch.inf)

    def _computed(self, name: str) -> Tensor:
        scores = self._sources[name].compute()
        return scores if scores.dtype == torch.float64 else scores.float()

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    @override
    def __len__(self) -> int:
        return len(self._sources)

    def pruned(self) -> dict[str, int]:
        """Return how many units of each target are not kept, on all ranks."""
        found = [source.pruned if source.counts else 0 for source in self._sources.values()]
        return dict(zip(self, self._reduce(torch.tensor(found)).tolist(), strict=True))

    def below(self, level: float) -> int:
        """Return how many units score below ``level``, on all ranks."""
        mark = int(keys(torch.tensor([level], dtype=torch.float64), self._bits)) - 1
        found = [self._at_most(name, mark)[1] for name in self]
        return int(self._reduce(torch.tensor(found)).sum())

    def counts(self, k: int) -> dict[str, int]:
        """Return how many of the k lowest units lie in each target; equal scores fall in the order of the targets."""
        if k == 0:
            return dict.fromkeys(self, 0)
        key, ties, _ = self._kth(list(self), k)
        selected = {name: self._at_most(name, key) for name in self}
        found = self._reduce(torch.tensor([counted for _, *counted in selected.values()])).tolist()
        shares = {}
        for (name, (picked, *_)), (at_most, equal) in zip(selected.items(), found, strict=True):
            cut = _Cut(key, min(ties, equal), equal)
            ties -= cut.ties
            shares[name] = at_most - equal + cut.ties
            self._selected[name, shares[name]] = picked, cut
        return shares

    def lowest(self, name: str, k: int) -> Tensor:
        """Return a bool tensor of the shape of these scores: True at the k lowest, ties in flat order."""
        if k in (0, self.sizes[name]):
            return torch.full_like(self._computed(name), k > 0, dtype=torch.bool)
        if (name, k) in self._selected:
            picked, cut = self._selected.pop((name, k))
        else:
            cut = _Cut(*self._kth([name], k))
            picked = self._at_most(name, cut.key)[0]
        if cut.ties < cut.equal:
            self._break_ties(name, picked, cut)
        return picked

    def _keys_of(self, name: str, scores: Tensor) -> Iterator[Tensor]:
        kept = self._sources[name].kept
        if kept is None:
            return (keys(part, self._bits) for part in chunks(scores))
        return (keys(part, self._bits, left) for part, left in zip(chunks(scores), chunks(kept), strict=True))

    def _kth(self, names: list[str], k: int) -> tuple[int, int, int]:
        def stream() -> Iterator[Tensor]:
            for name in names:  # all ranks compute scores, since that may be a common effort; one counts them
                scores = self._computed(name)
                yield from self._keys_of(name, scores) if self._sources[name].counts else ()

        return kth(stream, k, self._bits, self._reduce)

    def _at_most(self, name: str, mark: int) -> tuple[Tensor, int, int]:
        """Return which units of a target have keys up to a mark, how many this rank counts, and how many at it."""
        counts = self._sources[name].counts
        scores, at_most, equal = self._computed(name), 0, 0
        picked = torch.empty_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)
        for out, key in zip(chunks(picked), self._keys_of(name, scores), strict=True):
            torch.le(key, mark, out=out)
            if counts:
                at_most += int(out.sum())
                equal += int((key == mark).sum())
        return picked, at_most, equal

    def _break_ties(self, name: str, picked: Tensor, cut: _Cut) -> None:
        """Unpick all equal scores but the first ``cut.ties`` in the flat order of the whole target."""
        source = self._sources[name]
        at = torch.cat([key == cut.key for key in self._keys_of(name, self._computed(name))])
        place = at.nonzero().squeeze(1)
        flat = picked.view(-1)
        if source.index is None:
            flat[place[cut.ties :]] = False
            return
        index = source.index().reshape(-1)[place]
        stream = [index] if source.counts else []
        last = kth(lambda: stream, cut.ties, 64, self._reduce)[0] if cut.ties else -1
        flat[place[index > last]] = False
