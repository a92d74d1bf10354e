"""Criteria that observe gradients over a window of optimizer steps."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.criteria.criterion import Criterion
from lightning_prune.units.gates import weight_times_gradient
from lightning_prune.units.units import Units
from lightning_prune.validation.arguments import integer
from lightning_prune.validation.instances import settle


@dataclass(frozen=True)
class GradientMean(Criterion):
    """The abstract base of criteria that average over a window of optimizer steps; a subclass defines ``term``.

    Args:
        window: Number of optimizer steps observed before an update.

    Raises:
        ValueError: If the window is shorter than one step.
    """

    needs: ClassVar[Literal["weights", "gradients", "forwards"]] = "gradients"
    elementwise: ClassVar[bool] = True

    window: int = 16

    def __post_init__(self) -> None:
        """Check the arguments."""
        settle(self, window=integer("window", self.window, 1))

    def term(self, units: Units) -> Tensor:
        """Return the term of one step for each unit, from its weights and their gradients."""
        raise NotImplementedError

    @override
    def observe(self, units: Units, inputs: tuple[Any, ...] = (), output: Any = None) -> Tensor:
        if units.statistic is None:
            return torch.cat([self.term(part) for part in units.parts()])
        for part in units.parts():
            part.add(self.term(part))
        return units.statistic

    @override
    def scores(self, units: Units) -> Tensor:
        assert units.statistic is not None
        return units.statistic / units.steps


@dataclass(frozen=True)
class Sensitivity(GradientMean):
    """The first-order contribution of each unit to the loss: the mean of ``(sum w * dL/dw)**2``. Needs gradients.

    The mean is over the optimizer steps of the window. For a channel the sum is over its gate: scale and shift of the
    norm that follows the layer, or its weights and bias if none does; coupled channels have the gates of all layers
    that produce them. For other units it is over their weights.

    Args:
        window: Number of optimizer steps observed before an update.

    Raises:
        ValueError: If the window is shorter than one step; while observing channels, if a norm follows that normalises
            by the batch and has no trainable scale.

    Reference: Molchanov et al., 2019, "Importance Estimation for Neural Network Pruning", arXiv:1906.10771.
    """

    window: int = 16

    @override
    def term(self, units: Units) -> Tensor:
        return units.contribution().square_()


@dataclass(frozen=True)
class Movement(GradientMean):
    """How far weights move away from zero: the mean of ``-w * dL/dw`` over the run, signed. Needs gradients.

    Weights that shrink in training go before weights that grow, whatever their size. The sum accumulates until the last
    update, as in the paper, and is divided by the number of steps. Pruned weights are zero, do not move and stay
    pruned; in the paper straight-through gradients let some come back. Larger units score the mean; a channel moves
    with its gate, as in ``Sensitivity``.

    Args:
        window: Number of optimizer steps observed before the first update.

    Raises:
        ValueError: If the window is shorter than one step.

    Reference: Sanh et al., 2020, "Movement Pruning", arXiv:2005.07683.
    """

    accumulates: ClassVar[bool] = True

    window: int = 32

    @override
    def term(self, units: Units) -> Tensor:
        return units.per_weight(units.contribution()).neg_()


@dataclass(frozen=True)
class SNIP(GradientMean):
    """Connection sensitivity: the absolute value of the mean of ``sum w * dL/dw`` over the unit. Needs gradients.

    For a channel the sum is over its gate, as in ``Sensitivity``.

    It is meant for networks at initialisation: ``PruningAtInit`` trains the pruned initialisation, as the paper does.
    In ``Pruning`` the gradients are those of the first optimizer step, and the masks apply right after it. The paper
    divides by the sum of all scores, which does not change their order.

    Args:
        window: Number of optimizer steps, or batches, observed; the paper takes one large batch.

    Raises:
        ValueError: If the window is shorter than one step.

    Reference: Lee et al., 2019, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", arXiv:1810.02340.
    """

    elementwise: ClassVar[bool] = True
    batch_statistics: ClassVar[bool] = True

    window: int = 1

    @override
    def term(self, units: Units) -> Tensor:
        return units.contribution()

    @override
    def scores(self, units: Units) -> Tensor:
        return super().scores(units).abs()


@dataclass(frozen=True)
class Fisher(GradientMean):
    """The second-order cost of pruning: ``sum w**2 * h / 2`` over the unit, h the empirical Fisher's diagonal.

    h approximates the diagonal of the Hessian by the mean of ``(dL/dw)**2`` over the window. The gradients are those of
    optimizer steps, means over a batch; the smaller the batch, the closer to the Fisher information of single samples.
    For a channel the sum is over its weights, also if a norm follows. The criterion of Theis et al. for feature maps is
    half of ``Sensitivity`` for batches of one sample. Needs gradients.

    Args:
        window: Number of optimizer steps observed before an update.

    Raises:
        ValueError: If the window is shorter than one step.

    Reference: LeCun et al., 1990, "Optimal Brain Damage"; Theis et al., 2018, arXiv:1801.05787.
    """

    elementwise: ClassVar[bool] = True

    window: int = 16

    @override
    def term(self, units: Units) -> Tensor:
        return units.sum(lambda weight: weight_times_gradient(weight).square_())

    @override
    def scores(self, units: Units) -> Tensor:
        return super().scores(units) / 2
