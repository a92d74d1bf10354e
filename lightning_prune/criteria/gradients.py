"""Criteria that watch gradients over a window of optimizer steps."""

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
    """The abstract base of criteria that are a mean, over a window of optimizer steps: a subclass says ``term``.

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
        """Return what one step adds for each unit, from its own weights and their gradients."""
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
    """The contribution of each unit to the loss, to first order: the mean over the window of ``(sum w * dL/dw)**2``.

    The mean runs over optimizer steps, the sum over the gate of a channel: factor and shift of the norm that follows
    its layer, or else its weights and its bias; coupled channels have the gates of all layers that make them. Of other
    units, the sum runs over their weights. Needs gradients.

    Args:
        window: Number of optimizer steps observed before an update.

    Raises:
        ValueError: If the window is shorter than one step; when it observes channels, if a norm that normalises by the
            batch follows, and has no trainable factors.

    Reference: Molchanov et al., 2019, "Importance Estimation for Neural Network Pruning", arXiv:1906.10771.
    """

    window: int = 16

    @override
    def term(self, units: Units) -> Tensor:
        return units.contribution().square_()


@dataclass(frozen=True)
class Movement(GradientMean):
    """How far weights move away from zero: the sum over the run of ``-w * dL/dw``, with its sign. Needs gradients.

    A weight that shrinks while it is trained goes before one that grows, whatever their size. What is observed adds up
    until the last update, as in the paper; it is divided by the number of steps. Pruned weights are zero, do not move,
    and stay pruned; the paper, which keeps them under straight-through gradients, lets some come back. Of larger units,
    the mean; a channel moves with its gate, as for ``Sensitivity``.

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
    """Connection sensitivity: the absolute value of the mean of ``sum w * dL/dw``, over the unit. Needs gradients.

    The sum of a channel runs over its gate, as for ``Sensitivity``.

    It is for a network at its initialisation: ``PruningAtInit`` trains the pruned initialisation, as the paper does. In
    ``Pruning`` the gradients are those of the first optimizer step, and the masks come into force right after it. The
    paper divides by the sum of all scores, which leaves their order as it is.

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
    """What pruning costs to second order: ``sum w**2 * h / 2``, over the unit, h the diagonal of the empirical Fisher.

    h stands for the Hessian's diagonal and is the mean over the window of ``(dL/dw)**2``, where a gradient is that of
    an optimizer step, a mean over its batch: small batches come closer to the Fisher information of single samples.
    Of a channel it is the sum over its weights, also where a norm follows; what Theis et al. take of feature maps is
    half of what ``Sensitivity`` is for batches of one sample. Needs gradients.

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
