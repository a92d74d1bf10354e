"""Presets of ``Pruning`` that prune single weights, unless another granularity is given."""

from collections.abc import Sequence
from typing import Literal

from lightning_prune import scopes
from lightning_prune.criteria import SNIP, Magnitude, Movement, Wanda
from lightning_prune.granularities import Granularity, Weight
from lightning_prune.schedules import Schedule, ScheduleName
from lightning_prune.training.pruning import Pruning
from lightning_prune.updates.budget import Measure
from lightning_prune.updates.latency import LatencyTable


class MagnitudePruning(Pruning):
    """Prune the weights of smallest magnitude, ``|w|``; a ``threshold`` zeroes exactly those with ``|w| < threshold``.

    Args:
        sparsity: Fraction of zeros at the end, in [0, 1), or ``{pattern: fraction}`` per layer.

    The other arguments are those of ``Pruning``, and are given by name.

    Reference: Han et al., 2015, arXiv:1506.02626; gradual: Zhu and Gupta, 2017, arXiv:1710.01878.

    >>> MagnitudePruning(0.9).criterion
    Magnitude(p=1)
    """

    def __init__(
        self,
        sparsity: float | dict[str, float] | None = None,
        *,
        granularity: Granularity = Weight(),
        scope: scopes.ScopeName | scopes.Scope | None = None,
        schedule: ScheduleName | Schedule = "cubic",
        start: int | float = 0.1,
        end: int | float = 0.7,
        interval: Literal["step", "epoch"] = "step",
        frequency: int | None = None,
        targets: Sequence[str] = (),
        ignore: Sequence[str] = (),
        threshold: float | None = None,
        log_layers: bool = False,
        min_density: float | None = None,
        of: Measure | LatencyTable = "units",
        shrink_at_end: bool = False,
        initial: float = 0.0,
    ) -> None:
        super().__init__(
            sparsity,
            criterion=Magnitude(),
            granularity=granularity,
            scope=scope,
            schedule=schedule,
            start=start,
            end=end,
            interval=interval,
            frequency=frequency,
            targets=targets,
            ignore=ignore,
            threshold=threshold,
            log_layers=log_layers,
            min_density=min_density,
            of=of,
            shrink_at_end=shrink_at_end,
            initial=initial,
        )


class MovementPruning(Pruning):
    """Prune the weights that move towards zero while a pretrained model is fine-tuned.

    Args:
        sparsity: Fraction of zeros at the end, in [0, 1), or ``{pattern: fraction}`` per layer.
        window: Number of optimizer steps observed before the first update; all that follow are, too.

    The other arguments are those of ``Pruning``, and are given by name.

    Reference: Sanh et al., 2020, arXiv:2005.07683.

    >>> MovementPruning(0.9).criterion
    Movement(window=32)
    """

    def __init__(
        self,
        sparsity: float | dict[str, float] | None = None,
        window: int = 32,
        *,
        granularity: Granularity = Weight(),
        scope: scopes.ScopeName | scopes.Scope | None = None,
        schedule: ScheduleName | Schedule = "cubic",
        start: int | float = 0.1,
        end: int | float = 0.7,
        interval: Literal["step", "epoch"] = "step",
        frequency: int | None = None,
        targets: Sequence[str] = (),
        ignore: Sequence[str] = (),
        threshold: float | None = None,
        log_layers: bool = False,
        min_density: float | None = None,
        of: Measure | LatencyTable = "units",
        shrink_at_end: bool = False,
        initial: float = 0.0,
    ) -> None:
        criterion = Movement(window)
        super().__init__(
            sparsity,
            criterion=criterion,
            granularity=granularity,
            scope=scope,
            schedule=schedule,
            start=start,
            end=end,
            interval=interval,
            frequency=frequency,
            targets=targets,
            ignore=ignore,
            threshold=threshold,
            log_layers=log_layers,
            min_density=min_density,
            of=of,
            shrink_at_end=shrink_at_end,
            initial=initial,
        )
        self.window = criterion.window


class WandaPruning(Pruning):
    """Prune the weights that contribute least to their output channel: ``|w|`` times the size of their input.

    Args:
        sparsity: Fraction of zeros at the end, in [0, 1), or ``{pattern: fraction}`` per layer.
        window: Number of optimizer steps observed before an update; None is 16.

    The other arguments are those of ``Pruning``, and are given by name.

    Reference: Sun et al., 2023, arXiv:2306.11695.

    >>> WandaPruning(0.5).criterion.window
    16
    """

    def __init__(
        self,
        sparsity: float | dict[str, float] | None = None,
        window: int | None = 16,
        *,
        granularity: Granularity = Weight(),
        scope: scopes.ScopeName | scopes.Scope | None = None,
        schedule: ScheduleName | Schedule = "cubic",
        start: int | float = 0.1,
        end: int | float = 0.7,
        interval: Literal["step", "epoch"] = "step",
        frequency: int | None = None,
        targets: Sequence[str] = (),
        ignore: Sequence[str] = (),
        threshold: float | None = None,
        log_layers: bool = False,
        min_density: float | None = None,
        of: Measure | LatencyTable = "units",
        shrink_at_end: bool = False,
        initial: float = 0.0,
    ) -> None:
        criterion = Wanda(window)
        super().__init__(
            sparsity,
            criterion=criterion,
            granularity=granularity,
            scope=scope,
            schedule=schedule,
            start=start,
            end=end,
            interval=interval,
            frequency=frequency,
            targets=targets,
            ignore=ignore,
            threshold=threshold,
            log_layers=log_layers,
            min_density=min_density,
            of=of,
            shrink_at_end=shrink_at_end,
            initial=initial,
        )
        self.window = criterion.window


class SNIPPruning(Pruning):
    """Prune a network at its initialisation, in one shot, by how sensitive the loss is to each connection.

    The scores are of the gradients of the first optimizer step, and the masks come into force right after it:
    ``PruningAtInit`` takes a pass more, and prunes before.

    Args:
        sparsity: Fraction of zeros, in [0, 1), or ``{pattern: fraction}`` per layer.
        window: Number of optimizer steps observed; from the second one on the network has begun to train.
        schedule: From progress to the fraction that is due, all in one shot by default.
        start: First update: an int counts intervals, a float in [0, 1] is a fraction of the run.

    The other arguments are those of ``Pruning``, and are given by name.

    Reference: Lee et al., 2019, arXiv:1810.02340.

    >>> SNIPPruning(0.9).schedule
    'one_shot'
    """

    def __init__(
        self,
        sparsity: float | dict[str, float] | None = None,
        window: int = 1,
        schedule: ScheduleName | Schedule = "one_shot",
        start: int | float = 0,
        *,
        granularity: Granularity = Weight(),
        scope: scopes.ScopeName | scopes.Scope | None = None,
        end: int | float = 0.7,
        interval: Literal["step", "epoch"] = "step",
        frequency: int | None = None,
        targets: Sequence[str] = (),
        ignore: Sequence[str] = (),
        threshold: float | None = None,
        log_layers: bool = False,
        min_density: float | None = None,
        of: Measure | LatencyTable = "units",
        shrink_at_end: bool = False,
        initial: float = 0.0,
    ) -> None:
        criterion = SNIP(window)
        super().__init__(
            sparsity,
            criterion=criterion,
            granularity=granularity,
            scope=scope,
            schedule=schedule,
            start=start,
            end=end,
            interval=interval,
            frequency=frequency,
            targets=targets,
            ignore=ignore,
            threshold=threshold,
            log_layers=log_layers,
            min_density=min_density,
            of=of,
            shrink_at_end=shrink_at_end,
            initial=initial,
        )
        self.window = criterion.window
