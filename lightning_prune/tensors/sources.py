"""Sources: where the unit scores of one target come from, when they are computed again at each pass."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lightning_prune.tensors.boolean import count, slices
from lightning_prune.tensors.radix import identity, keys
from lightning_prune.tensors.ranking import Part


@dataclass(frozen=True)
class Placement:
    """Where the units of a target lie among ranks; one process has them all.

    Args:
        counts: Whether this rank counts its units; False where another rank counts a copy of them.
        index: Returns the flat position of this rank's units in the full target (int64); None if it has all of them.
        full: Returns values of this rank's units as values of all units; all ranks call it.
        local: Returns values of all units as values of this rank's units.
    """

    counts: bool = True
    index: Callable[[], Tensor] | None = None
    full: Callable[[Tensor], Tensor] = identity
    local: Callable[[Tensor], Tensor] = identity


@dataclass(frozen=True)
class Source:
    """Where the unit scores of one target come from.

    Args:
        open: Returns a tensor of the shape of this rank's scores, and a function that returns some of the scores by
            flat position.
        size: Number of units on all ranks.
        shape: Shape of the whole weight, for scopes that look at shapes.
        kept: Which of this rank's units (bool) are not pruned yet; pruned ones come first. None means all.
        raw: Returns what the criterion gave, where the scores only say how units rank in their group or row.
        placement: Where the units lie among ranks.
    """

    open: Callable[[], tuple[Tensor, Part]]
    size: int
    shape: tuple[int, ...]
    kept: Tensor | None = None
    raw: Callable[[], Tensor] | None = None
    placement: Placement = Placement()

    @classmethod
    def computed(cls, compute: Callable[[], Tensor], *args: Any, **kwargs: Any) -> "Source":
        """Return a source of scores that are computed all together at each pass."""
        return cls(partial(opened, compute), *args, **kwargs)

    @property
    def pruned(self) -> int:
        """The number of this rank's units that are not kept."""
        return 0 if self.kept is None else self.kept.numel() - count(self.kept)

    def keys(self, bits: int, step: int = 1) -> Iterator[Tensor]:
        """Yield the keys of every ``step``-th unit of this rank, a chunk at a time; pruned units have the lowest."""
        like, part = self.open()
        kept = None if self.kept is None else self.kept.reshape(-1)
        for chunk in slices(like.numel(), like.device, step):
            yield keys(part(chunk), bits, None if kept is None else kept[chunk])


def opened(compute: Callable[[], Tensor]) -> tuple[Tensor, Part]:
    """Compute scores, and return them with a function that returns some of them by flat position."""
    scores = compute()
    return scores, scores.reshape(-1).__getitem__
