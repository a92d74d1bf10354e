"""Streaming selection: scores that are computed again at each pass, and never sorted, concatenated or gathered."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.tensors.boolean import count, exceeds, places, slices
from lightning_prune.tensors.radix import Reduce, identity, keys, kth, likely
from lightning_prune.tensors.ranking import Part
from lightning_prune.tensors.selection import Scores
from lightning_prune.tensors.sources import Source, opened

_FEW = 1 << 18  # units: to count the digits of fewer takes no longer than to look at a sample first
_ROOM = 16  # one of so many units, at most, is noted while the range of the k-th is wider than one key


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


class StreamedScores(Scores):
    """Scores that are computed each time they are needed and never in memory together.

    Args:
        sources: Where the scores of each target come from, in the order that decides between equal scores.
        reduce: Sums a vector of counters over the ranks.
        bits: 64 to tell float64 scores apart, 32 for all others.

    >>> scores = torch.tensor([0.1, 0.9])
    >>> StreamedScores({"a": Source.computed(lambda: scores, 2, (2,))}).lowest("a", 1)
    tensor([ True, False])
    """

    def __init__(self, sources: Mapping[str, Source], reduce: Reduce = identity, bits: int = 32) -> None:
        self._sources = dict(sources)
        self._reduce = reduce
        self._bits = bits
        self._selected: dict[tuple[str, int], tuple[_Found, _Cut, int]] = {}  # by name and number, ties not yet broken
        self.sizes = {name: source.size for name, source in self._sources.items()}
        self.shapes = {name: source.shape for name, source in self._sources.items()}
        self.names = tuple(self._sources)

    @override
    def only(self, names: Iterable[str]) -> "StreamedScores":
        found = StreamedScores({name: self._sources[name] for name in names}, self._reduce, self._bits)
        found.names = self.names
        return found

    @override
    def raw(self, name: str) -> Tensor:
        source = self._sources[name]
        found = self._computed(name) if source.raw is None else source.raw()
        found = found if source.kept is None else found.masked_fill(~source.kept.view_as(found), 0.0)
        return source.placement.full(found)

    @override
    def within_targets(self, values: Callable[[Tensor], Tensor]) -> "StreamedScores":
        def compute(name: str) -> tuple[Tensor, Part]:
            return opened(lambda: self._sources[name].placement.local(values(self.raw(name))))

        sources = {
            name: replace(source, open=partial(compute, name), raw=None) for name, source in self._sources.items()
        }
        return StreamedScores(sources, self._reduce, 64)

    @override
    def __getitem__(self, name: str) -> Tensor:
        scores, kept = self._computed(name), self._sources[name].kept
        scores = scores if scores.dtype == torch.float64 else scores.float()
        return scores if kept is None else scores.masked_fill(~kept.view_as(scores), -torch.inf)

    def _computed(self, name: str) -> Tensor:
        """Return the scores of all units of this rank."""
        like, part = self._sources[name].open()
        return part(slice(0, like.numel(), 1)).view(like.shape)

    @override
    def pruned(self) -> dict[str, int]:
        found = [source.pruned if source.placement.counts else 0 for source in self._sources.values()]
        return dict(zip(self, self._reduce(torch.tensor(found)).tolist(), strict=True))

    @override
    def below(self, level: float) -> int:
        mark = int(keys(torch.tensor([level], dtype=torch.float64), self._bits)) - 1
        return sum(at_most for at_most, _ in self._totals({name: self._survey(name, mark, mark) for name in self}))

    @override
    def at_least(self, name: str, level: float) -> Tensor:
        like, part = self._sources[name].open()
        found = torch.empty_like(like, dtype=torch.bool, memory_format=torch.contiguous_format)
        for piece in slices(found.numel(), found.device):
            torch.ge(part(piece), level, out=found.view(-1)[piece])
        return found

    @override
    def counts(self, k: int) -> dict[str, int]:
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

    @override
    def lowest(self, name: str, k: int) -> Tensor:
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
            lambda: [found[n].keys for n in names if self._sources[n].placement.counts], left, self._bits, self._reduce
        )
        for one in found.values():
            one.narrow(key)
        return found, self._totals(found), _Cut(key, ties)

    def _ranges(self, names: list[str], k: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of keys for the k-th lowest: one that is likely and holds few units, then the key itself."""
        sources, size = [self._sources[name] for name in names], sum(self.sizes[name] for name in names)
        if size >= _FEW:
            step = round(size ** (1 / 3)) | 1  # a larger sample takes as long as it saves; odd, to hit all columns
            sample = [key for source in sources for key in source.keys(self._bits, step) if source.placement.counts]
            yield likely(sample, k / size, self._bits, self._reduce)

        # scores are computed on all ranks, since that may be a common effort; one rank counts them
        def stream() -> Iterator[Tensor]:
            return (key for source in sources for key in source.keys(self._bits) if source.placement.counts)

        key = kth(stream, k, self._bits, self._reduce)[0]
        yield key, key

    def _totals(self, found: Mapping[str, _Found]) -> list[list[int]]:
        """Return for each target how many units are picked and how many are inside the range, on all ranks."""
        counted = [[o.at_most, o.inside] if self._sources[n].placement.counts else [0, 0] for n, o in found.items()]
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
        if source.placement.index is None:
            flat[place[cut.ties :]] = False
            return
        index = source.placement.index().reshape(-1)[place]
        stream = [index] if source.placement.counts else []
        last = kth(lambda: stream, cut.ties, 64, self._reduce)[0] if cut.ties else -1
        flat[place[index > last]] = False
