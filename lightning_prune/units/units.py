"""Units: what one decision prunes together, of one target."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lightning_prune.models.parameters import Target
from lightning_prune.tensors.ranking import Part
from lightning_prune.tensors.sources import Placement, opened
from lightning_prune.units.scored import Norms, ScoredUnits
from lightning_prune.validation.instances import function, instance

if TYPE_CHECKING:  # criteria stand above the units that they score
    from lightning_prune.criteria.criterion import Criterion


@dataclass(eq=False, repr=False)
class Units(ScoredUnits):
    """The units of one target. A granularity makes them, of one of three kinds: single weights, pooled, or coupled.

    Attributes:
        weights: The weights whose zeros count as sparsity, by name.
        minimum: How many of these units always stay.
        round_to: The number of units that stay is a multiple of this.
        even: Whether that is the nearest multiple, for groups that keep as many units each, and not the next higher.
    """

    weights: dict[str, nn.Parameter] = field(init=False)
    minimum = 0
    round_to = 1
    even = False

    @property
    @abstractmethod
    def shares(self) -> dict[tuple[str, int], float]:
        """The part, 0 to 1, that one unit takes of a dimension of a parameter, by name and dimension."""

    @property
    def placement(self) -> Placement:
        """Where these units lie among ranks."""
        return Placement()

    def ranks(self, by_row: bool) -> bool:
        """Whether units are compared within groups or rows, by float64 scores."""
        return False

    def compared(self, scores: Tensor, kept: Tensor | None, by_row: bool) -> Tensor:
        """Return scores that compare units with those of their group or row only, if they are to be."""
        return scores

    def stream(self, criterion: "Criterion") -> tuple[Tensor, Part]:
        """Return a tensor of the shape of the scores, and a function that gives some of them by flat position."""
        return opened(lambda: criterion.scores(self))

    def compared_stream(self, criterion: "Criterion", kept: Tensor | None) -> tuple[Tensor, Part]:
        """Return likewise scores that compare units with those of their group or row only, if they are to be."""
        return opened(lambda: self.compared(criterion.scores(self), kept, criterion.by_row))

    @abstractmethod
    def kept(self, masks: Mapping[str, Tensor]) -> Tensor | None:
        """Return which units (bool) the masks keep; None where there is no mask yet."""

    @abstractmethod
    def masks(self, keep: Tensor) -> dict[str, Tensor]:
        """Return the masks, of this rank's shards, that follow from a decision on units (bool, True = kept)."""


def check_target(target: Target, norms: Norms) -> None:
    """Reject what is not a target, or cannot find norms.

    Raises:
        TypeError: If it is not.
    """
    instance("target", target, Target)
    if norms is not dict:
        function("norms", norms)
