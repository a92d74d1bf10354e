"""RigL: SET, with new weights where the gradient is largest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from typing_extensions import override

from lightning_prune import scopes
from lightning_prune.criteria import Criterion
from lightning_prune.criteria.gradients import GradientMean
from lightning_prune.granularities import Granularity, Weight
from lightning_prune.methods.dynamic_sparse import SET, DecayName
from lightning_prune.units.units import Units
from lightning_prune.validation.arguments import integer

__all__ = ["SET", "Gradient", "RigL"]  # the former module of this name had all three


class RigL(SET):
    """Train sparse from the first step: now and then drop the smallest weights, and grow where the gradient is largest.

    The gradient of all weights, pruned ones too, is looked at in the ``window`` optimizer steps before an update only.
    These steps are taken as any other, and the masks change right after the last of them (in the paper the update takes
    the place of a step, which costs a step without saving anything here). What is said of masks and of new weights in
    ``SET`` holds here, too. The authors' code lets weights that have just been dropped grow again: ``regrow=True``.

    Args:
        sparsity: Fraction of zeros among the targets, in [0, 1), drawn at random when training starts, or
            ``{pattern: fraction}`` per layer; None keeps as many zeros as each target has.
        drop_fraction: Fraction of the weights of every target that the first update exchanges, in (0, 1].
        decay: What becomes of the drop fraction between ``start`` and ``end``: "constant", or it falls to nothing along
            a "linear" or "cosine" curve; or a callable from progress to what is left of it, 0 to 1.
        window: Number of optimizer steps whose gradients are summed up for an update: more than one for small batches.

    The other arguments are those of ``SET``, and are given by name.

    Raises:
        ValueError: As ``SET``, and if a target gets no gradient.

    Reference: Evci et al., 2020, "Rigging the Lottery: Making All Tickets Winners", arXiv:1911.11134.

    >>> RigL(0.9, frequency=100).growth(100)
    Gradient(window=1)
    """

    grow_inits: ClassVar[tuple[str, ...]] = ("zeros", "random", "gradient")

    def __init__(
        self,
        sparsity: float | dict[str, float] | None = None,
        drop_fraction: float = 0.3,
        decay: DecayName | Callable[[float], float] = "cosine",
        window: int = 1,
        *,
        scope: scopes.ScopeName | scopes.Scope = "erk",
        seed: int = 0,
        start: int | float = 0,
        end: int | float = 0.75,
        interval: Literal["step", "epoch"] = "step",
        frequency: int | None = None,
        targets: Sequence[str] = (),
        ignore: Sequence[str] = (),
        log_layers: bool = False,
        grow_init: Literal["zeros", "random", "gradient"] = "zeros",
        regrow: bool = False,
        granularity: Granularity = Weight(),
    ) -> None:
        self.window = integer("window", window, 1)
        super().__init__(
            sparsity,
            drop_fraction,
            decay,
            scope=scope,
            seed=seed,
            start=start,
            end=end,
            interval=interval,
            frequency=frequency,
            targets=targets,
            ignore=ignore,
            log_layers=log_layers,
            grow_init=grow_init,
            regrow=regrow,
            granularity=granularity,
        )
        self.criterion = Gradient(self.window)

    @override
    def growth(self, position: int) -> Criterion:
        return Gradient(self.window)


@dataclass(frozen=True)
class Gradient(GradientMean):
    """The size of the gradient of a weight, pruned or not, summed over a window: ``|sum dL/dw|``. Needs gradients.

    Of larger units, the sizes of the gradients of their weights are summed: ``sum |dL/dw|``.

    Args:
        window: Number of optimizer steps observed before an update.

    Raises:
        ValueError: If the window is shorter than one step.
    """

    window: int = 1

    @override
    def term(self, units: Units) -> Tensor:
        return units.sum(_gradient if units.single else _size)

    @override
    def scores(self, units: Units) -> Tensor:
        assert units.statistic is not None
        return units.statistic.abs()


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad


def _size(weight: Tensor) -> Tensor:
    return _gradient(weight).abs()
