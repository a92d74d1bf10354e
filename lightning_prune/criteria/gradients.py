"""Criteria that watch gradients over a window of optimizer steps."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor
from typing_extensions import override

from lightning_prune.criteria.criterion import Criterion, check_at_least
from lightning_prune.units import Units


@dataclass(frozen=True)
class Sensitivity(Criterion):
    """The contribution of each unit to the loss, to first order: the mean over the window of ``(sum w * dL/dw)**2``.

    The sum runs over the weights of the unit, the mean over optimizer steps. Needs gradients.

    Args:
        window: Number of optimizer steps observed before an update.

    Raises:
        ValueError: If the window is shorter than one step.

    Reference: Molchanov et al., 2019, "Importance Estimation for Neural Network Pruning", arXiv:1906.10771.
    """

    needs: ClassVar[Literal["weights", "gradients", "forwards"]] = "gradients"
    entrywise: ClassVar[bool] = True

    window: int = 16

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_at_least("window", self.window, 1)

    @override
    def observe(self, units: Units, inputs: tuple[Any, ...] = (), output: Any = None) -> Tensor:
        return units.add(units.sum(weight_times_gradient).square())

    @override
    def scores(self, units: Units) -> Tensor:
        assert units.statistic is not None
        return units.statistic / units.steps


def weight_times_gradient(weight: Tensor) -> Tensor:
    """Return ``w * dL/dw``: minus the first-order change of the loss when the weight becomes zero."""
    assert weight.grad is not None
    return weight * weight.grad
