"""Selection: which k of the unit scores of all targets are the lowest, exactly; equal scores fall in a fixed order."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor
from typing_extensions import override


class Scores(Mapping[str, Tensor]):
    """Unit scores by target name; a unit that is pruned already scores lowest, ``-inf``.

    Small models have their scores in memory (``HeldScores``); those of large or sharded models are computed again at
    each pass (``StreamedScores``). Both select the same units.

    Attributes:
        sizes: Number of units of each target, on all ranks.
        shapes: Shape of the whole weight of each target.
        names: Names of all targets, also where these are only some of them.

    >>> scores = Scores.of({"a": torch.tensor([0.1, 0.9]), "b": torch.tensor([0.2, 0.3])})
    >>> scores.counts(3)
    {'a': 1, 'b': 2}
    >>> scores.lowest("a", 1)
    tensor([ True, False])
    """

    sizes: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    names: tuple[str, ...]

    @staticmethod
    def of(scores: Mapping[str, Tensor]) -> "HeldScores":
        """Return scores that are tensors of one process already."""
        return HeldScores(scores, {name: tuple(values.shape) for name, values in scores.items()})

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    @override
    def __len__(self) -> int:
        return len(self.sizes)

    @abstractmethod
    def only(self, names: Iterable[str]) -> "Scores":
        """Return the scores of these targets alone."""

    @abstractmethod
    def raw(self, name: str) -> Tensor:
        """Return what the criterion gave to all units of a target, 0 to those that are pruned; all ranks call it."""

    @abstractmethod
    def within_targets(self, values: Callable[[Tensor], Tensor]) -> "Scores":
        """Return other scores, float64: what ``values`` gives for those of all units of a target, one at a time."""

    @abstractmethod
    def pruned(self) -> dict[str, int]:
        """Return how many units of each target are pruned already, on all ranks."""

    @abstractmethod
    def below(self, level: float) -> int:
        """Return how many units score below ``level``, on all ranks."""

    @abstractmethod
    def at_least(self, name: str, level: float) -> Tensor:
        """Return which units of this rank (bool, of the shape of these scores) score ``level`` or more."""

    @abstractmethod
    def counts(self, k: int) -> dict[str, int]:
        """Return how many of the k lowest units lie in each target; equal scores fall in the order of the targets."""

    @abstractmethod
    def lowest(self, name: str, k: int) -> Tensor:
        """Return a bool tensor of the shape of these scores: True at the k lowest, ties in flat order."""


class HeldScores(Scores):
    """Scores that are in memory, all of one process.

    Args:
        values: Finite scores by target name; those of pruned units are ``-inf``.
        shapes: Shape of the whole weight of each target.
        raw: What the criterion gave, where ``values`` are ranks of it, without a value for pruned units.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        raw: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._values = dict(values)
        self._raw = dict(raw or {})
        self.sizes = {name: found.numel() for name, found in values.items()}
        self.shapes = dict(shapes)
        self.names = tuple(values)

    @override
    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    @override
    def only(self, names: Iterable[str]) -> "HeldScores":
        names = list(names)
        raw = {name: self._raw[name] for name in names if name in self._raw}
        found = HeldScores({n: self._values[n] for n in names}, {n: self.shapes[n] for n in names}, raw)
        found.names = self.names
        return found

    @override
    def raw(self, name: str) -> Tensor:
        values = self._values[name]
        found = self._raw.get(name, values).view_as(values)
        return found.masked_fill(values == -torch.inf, 0.0)

    @override
    def within_targets(self, values: Callable[[Tensor], Tensor]) -> "HeldScores":
        found = {n: values(self.raw(n)).masked_fill(self._values[n] == -torch.inf, -torch.inf) for n in self._values}
        return HeldScores(found, self.shapes)

    @override
    def pruned(self) -> dict[str, int]:
        flags = [(values == -torch.inf).sum() for values in self._values.values()]
        found: list[int] = torch.stack(flags).tolist() if flags else []
        return dict(zip(self._values, found, strict=True))

    @override
    def below(self, level: float) -> int:
        return sum(int((values < level).sum()) for values in self._values.values())

    @override
    def at_least(self, name: str, level: float) -> Tensor:
        return self._values[name] >= level

    @override
    def counts(self, k: int) -> dict[str, int]:
        if k == 0:
            return dict.fromkeys(self._values, 0)
        host = next(iter(self._values.values())).device  # layers may be on several devices
        values = [values.reshape(-1).to(host) for values in self._values.values()]
        cut = torch.cat(values).kthvalue(k).values
        found = torch.stack([torch.stack([(v < cut).sum(), (v == cut).sum()]) for v in values])
        below, equal = found.unbind(1)
        ties = k - below.sum() - (equal.cumsum(0) - equal)  # what is left of them for each target
        shares: list[int] = (below + torch.minimum(equal, ties.clamp(min=0))).tolist()
        return dict(zip(self._values, shares, strict=True))

    @override
    def lowest(self, name: str, k: int) -> Tensor:
        values = self._values[name]
        if k in (0, values.numel()):
            return torch.full_like(values, k > 0, dtype=torch.bool)
        flat = values.reshape(-1)
        cut = flat.kthvalue(k).values
        found, ties = flat < cut, flat == cut
        found[ties.nonzero().squeeze(1)[: k - found.sum()]] = True
        return found.view_as(values)
