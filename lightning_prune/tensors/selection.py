"""Selection: which k of n scores are the lowest, exactly, without sorting, concatenating or gathering them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.tensors.boolean import count, exceeds, places, slices
from lightning_prune.tensors.radix import Reduce, identity, keys, kth, likely
from lightning_prune.tensors.ranking import Part

_FEW = 1 << 18  # units: to count the digits of fewer takes no longer than to look at a sample first
_ROOM = 16  # one of so many units, at most, is noted while the range of the k-th is wider than one key


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
        part: Returns some of these scores, by flat position; None if no score can be had without the others.
        like: A tensor of the shape and on the device of what ``compute`` returns; needed with ``part``.
        within: Turns a part of the scores, and a tensor on their device, into one that compares units with those of
            their group only.
        raw: Returns what the criterion gave, where ``compute`` only says how units rank in their group or row.
        whole: Returns values of this rank's units as values of all units; all ranks call it.
        piece: Returns values of all units as values of this rank's units.
    """

    compute: Callable[[], Tensor]
    size: int
    shape: tuple[int, ...]
    counts: bool = True
    index: Callable[[], Tensor] | None = None
    kept: Tensor | None = None
    part: Part | None = None
    like: Tensor | None = None
    within: Callable[[Tensor, Part], Part] | None = None
    raw: Callable[[], Tensor] | None = None
    whole: Callable[[Tensor], Tensor] = identity
    piece: Callable[[Tensor], Tensor] = identity

    def open(self) -> tuple[Tensor, Part]:
        """Return a tensor of the shape of these scores, and a function that gives some of them by flat position."""
        if self.part is not None and self.like is not None:
            like, part = self.like, self.part
        else:
            like = self.compute()
            part = like.reshape(-1).__getitem__
        return like, part if self.within is None else self.within(like, part)

    @property
    def pruned(self) -> int:
        """The number of this rank's units that are not kept."""
        return 0 if self.kept is None else self.kept.numel() - count(self.kept)

    def keys(self, bits: int, step: int = 1) -> Iterator[Tensor]:
        """Yield the keys of every ``step``-th unit of this rank, a piece at a time; pruned units have the lowest."""
        like, part = self.open()
        kept = None if self.kept is None else self.kept.reshape(-1)
        for piece in slices(like.numel(), like.device, step):
            yield keys(part(piece), bits, None if kept is None else kept[piece])


@dataclass
class _Found:
    """What one pass over this rank's units of a target has found out about a range of keys.

    Args:
        picked: Which units (bool) have keys in the range or below it.
        at_most: How many these are.
        inside: How many have keys in the range.
        places: Flat positions of those inside; empty if they were too many to note.
        keys: Their keys.
        noted: Whether places were to be noted, which is the same on all ranks.
    """

    picked: Tensor
    at_most: int
    inside: int
    places: Tensor
    keys: Tensor
    noted: bool

    def narrow(self, key: int) -> None:
        """Reduce the range to one key."""
        above, at = self.places[self.keys > key], self.keys == key
        self.picked.view(-1)[above] = False
        self.at_most -= above.numel()
        self.places, self.keys = self.places[at], self.keys[at]
        self.inside = self.places.numel()


@dataclass(frozen=True)
class _Cut:
    """The lowest units of some targets: all below a key, and the first ``ties`` of those at it."""

    key: int
    ties: int


class Scores(Mapping[str, Tensor]):
    """Unit scores by target name, computed each time they are asked for and never held together.

    Args:
        sources: Where the scores of each target come from, in the order that decides between equal scores.
        reduce: Sums a vector of counters over the ranks.
        bits: 64 to tell float64 scores apart, 32 for all others.

    Attributes:
        names: Of all targets, also those that ``only`` has left out.

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
        self._selected: dict[tuple[str, int], tuple[_Found, _Cut, int]] = {}  # by name and number, ties not yet broken
        self.sizes = {name: source.size for name, source in self._sources.items()}
        self.shapes = {name: source.shape for name, source in self._sources.items()}
        self.names = list(self._sources)

    @classmethod
    def of(cls, scores: Mapping[str, Tensor]) -> "Scores":
        """Return scores that are already there, as one process holds them."""
        sources = {n: Source(partial(torch.clone, s), s.numel(), tuple(s.shape)) for n, s in scores.items()}
        return cls(sources, bits=64 if any(s.dtype == torch.float64 for s in scores.values()) else 32)

    def only(self, names: Iterable[str]) -> "Scores":
        """Return the scores of these targets alone."""
        found = Scores({name: self._sources[name] for name in names}, self._reduce, self._bits)
        found.names = self.names
        return found

    def raw(self, name: str) -> Tensor:
        """Return what the criterion gave to all units of a target, 0 to those that are pruned; all ranks call it."""
        source = self._sources[name]
        found = (source.raw or source.compute)()
        found = found if source.kept is None else found.masked_fill(~source.kept.view_as(found), 0.0)
        return source.whole(found)

    def within_targets(self, values: Callable[[Tensor], Tensor]) -> "Scores":
        """Return other scores, float64: what ``values`` gives for those of all units of a target, one at a time."""
        sources = {
            name: replace(
                source, compute=partial(self._within, name, values), raw=None, part=None, like=None, within=None
            )
            for name, source in self._sources.items()
        }
        return Scores(sources, self._reduce, 64)

    def _within(self, name: str, values: Callable[[Tensor], Tensor]) -> Tensor:
        return self._sources[name].piece(values(self.raw(name)))

    @override
    def __getitem__(self, name: str) -> Tensor:
        like, part = self._sources[name].open()
        scores, kept = part(slice(0, like.numel(), 1)).view(like.shape), self._sources[name].kept
        scores = scores if scores.dtype == torch.float64 else scores.float()
        return scores if kept is None else scores.masked_fill(~kept.view_as(scores), -torch.inf)

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
        return sum(at_most for at_most, _ in self._totals({name: self._survey(name, mark, mark) for name in self}))

    def at_least(self, name: str, level: float) -> Tensor:
        """Return which units of this rank (bool, of the shape of these scores) score ``level`` or more."""
        like, part = self._sources[name].open()
        found = torch.empty_like(like, dtype=torch.bool, memory_format=torch.contiguous_format)
        for piece in slices(found.numel(), found.device):
            torch.ge(part(piece), level, out=found.view(-1)[piece])
        return found

    def counts(self, k: int) -> dict[str, int]:
        """Return how many of the k lowest units lie in each target; equal scores fall in the order of the targets."""
        if k == 0:
            return dict.fromkeys(self, 0)
        found, totals, cut = self._select(list(self), k)
        shares, ties = {}, cut.ties
        for (name, one), (at_most, equal) in zip(found.items(), totals, strict=True):
            mine = min(ties, equal)
            ties -= mine
            shares[name] = at_most - equal + mine
            self._selected[name, shares[name]] = one, _Cut(cut.key, mine), equal
        return shares

    def lowest(self, name: str, k: int) -> Tensor:
        """Return a bool tensor of the shape of these scores: True at the k lowest, ties in flat order."""
        if k in (0, self.sizes[name]):
            return torch.full_like(self._sources[name].open()[0], k > 0, dtype=torch.bool)
        if (name, k) in self._selected:
            one, cut, equal = self._selected.pop((name, k))
        else:
            found, totals, cut = self._select([name], k)
            one, equal = found[name], totals[0][1]
        if cut.ties < equal:
            self._break_ties(name, one, cut)
        return one.picked

    def _select(self, names: list[str], k: int) -> tuple[dict[str, _Found], list[list[int]], _Cut]:
        """Find the k-th lowest unit: return what is at its key, per target and in numbers over all ranks."""
        most = sum(self.sizes[name] for name in names) // _ROOM
        for low, high in self._ranges(names, k):
            found = {name: self._survey(name, low, high, most if low < high else 0) for name in names}
            totals = self._totals(found)
            at_most, inside = map(sum, zip(*totals, strict=True))
            left = k - (at_most - inside)
            if 0 < left <= inside and (low == high or inside <= most):
                break
        if low == high:
            return found, totals, _Cut(low, left)
        key, ties, _ = kth(
            lambda: [found[n].keys for n in names if self._sources[n].counts], left, self._bits, self._reduce
        )
        for one in found.values():
            one.narrow(key)
        return found, self._totals(found), _Cut(key, ties)

    def _ranges(self, names: list[str], k: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of keys for the k-th lowest: one that is likely and holds few units, then the key itself."""
        sources, size = [self._sources[name] for name in names], sum(self.sizes[name] for name in names)
        if size >= _FEW:
            step = round(size ** (1 / 3)) | 1  # a larger sample takes as long as it saves; odd, to hit all columns
            sample = [key for source in sources for key in source.keys(self._bits, step) if source.counts]
            yield likely(sample, k / size, self._bits, self._reduce)

        # scores are computed on all ranks, since that may be a common effort; one rank counts them
        def stream() -> Iterator[Tensor]:
            return (key for source in sources for key in source.keys(self._bits) if source.counts)

        key = kth(stream, k, self._bits, self._reduce)[0]
        yield key, key

    def _totals(self, found: Mapping[str, _Found]) -> list[list[int]]:
        """Return for each target how many units are picked and how many are inside the range, on all ranks."""
        counted = [[o.at_most, o.inside] if self._sources[n].counts else [0, 0] for n, o in found.items()]
        totals: list[list[int]] = self._reduce(torch.tensor(counted).view(-1)).view(-1, 2).tolist()
        return totals

    def _survey(self, name: str, low: int, high: int, room: int = 0) -> _Found:
        """Look for the keys of a target in a range, both ends included, and note up to so many of them."""
        source = self._sources[name]
        least = -(1 << (self._bits - 1))  # the key of what is pruned, which does not exceed any
        like, part = source.open()
        picked = torch.empty_like(like, dtype=torch.bool, memory_format=torch.contiguous_format)
        within, kept = torch.empty_like(picked).view(-1), None if source.kept is None else source.kept.reshape(-1)
        at_most = inside = 0
        for piece in slices(picked.numel(), picked.device):
            key, above, reach = keys(part(piece), self._bits), picked.view(-1)[piece], within[piece]
            exceeds(key, high, above)
            exceeds(key, low - 1, reach) if low > least else reach.fill_(True)
            if kept is not None:
                above.logical_and_(kept[piece])
                reach.logical_and_(kept[piece]) if low > least else reach
            at_most += count(above.logical_not_())
            inside += count(reach.logical_and_(above))
        at = places(within if inside <= room else within[:0])
        among = keys(part(at), self._bits, None if kept is None else kept[at])
        return _Found(picked, at_most, inside, at, among, room > 0)

    def _break_ties(self, name: str, one: _Found, cut: _Cut) -> None:
        """Unpick all units at the cut but the first ``cut.ties`` in the flat order of the whole target."""
        source = self._sources[name]
        place = one.places
        if not one.noted:  # all ranks compute the scores once more, or none
            place = torch.cat([key == cut.key for key in source.keys(self._bits)]).nonzero().squeeze(1)
        flat = one.picked.view(-1)
        if source.index is None:
            flat[place[cut.ties :]] = False
            return
        index = source.index().reshape(-1)[place]
        stream = [index] if source.counts else []
        last = kth(lambda: stream, cut.ties, 64, self._reduce)[0] if cut.ties else -1
        flat[place[index > last]] = False
