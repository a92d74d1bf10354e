"""Searching scopes: those that have to try an allocation on the model before they can say how good it is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from torch import nn

from lightning_prune.tensors.selection import Scores


class Room(NamedTuple):
    """How many units of a target may stay.

    Args:
        low: The fewest.
        high: The most.
        step: What two such numbers differ by is a multiple of this.
    """

    low: int
    high: int
    step: int = 1


class Trial(NamedTuple):
    """What a search wants to know: how good a model is that keeps so many units of each target.

    Args:
        keep: How many units each target keeps.
        batches: The numbers of the batches to try it on.
        generation: How far the search is.
    """

    keep: dict[str, int]
    batches: tuple[int, ...]
    generation: int


class Search(ABC):
    """A scope that tries allocations on the model. Called like any other, it returns the one that it begins with.

    Attributes:
        generations: Where the search ends.
        metric: What is measured of a trial.
        mode: Whether a lower ("min") or higher ("max") metric is better.
        path: A file for the results of all trials, from which a search resumes.
        progress: Whether to show a progress bar.
    """

    compares_blocks: ClassVar[bool] = True

    generations: int
    metric: Literal["kl", "mse"] | Callable[[nn.Module, Any], float]
    mode: Literal["min", "max"]
    path: Any
    progress: bool

    @abstractmethod
    def __call__(self, scores: Scores, sparsity: float) -> dict[str, int]:
        """Return how many units each target keeps in the allocation that the search begins with."""

    @abstractmethod
    def trials(
        self, start: Mapping[str, int], rooms: Mapping[str, Room], batches: int
    ) -> Generator[Trial, float, dict[str, int]]:
        """Yield trials, whose losses are sent back, and return the best allocation, with as many units as the first.

        Args:
            start: The allocation that the search begins with.
            rooms: How many units of each target may stay.
            batches: How many there are.
        """


def without_search(owner: str, scope: object) -> None:
    """Reject a scope that tries allocations on the model, where there are no data to try them on.

    Raises:
        ValueError: If it is one.
    """
    if isinstance(scope, Search):
        raise ValueError(
            f"scope must not try allocations on the model in {owner}, which holds no data, got {scope}: call "
            f"prune(copy.deepcopy(model), ..., scope={type(scope).__name__}(...), data=batches) first, and pass "
            f"sparsity=masks.sparsities() of the masks that it returns"
        )
