"""Presets of ``Pruning`` that prune neurons, unless another granularity is given."""

from collections.abc import Sequence
from typing import Literal

from lightning_prune import scopes
from lightning_prune.criteria import Entropy, Random, Sensitivity
from lightning_prune.granularities import Channel, Granularity
from lightning_prune.schedules import Schedule, ScheduleName
from lightning_prune.training.pruning import Pruning
from lightning_prune.updates.budget import Measure
from lightning_prune.updates.latency import LatencyTable


class RandomPruning(Pruning):
    """Prune neurons at random: the baseline that every other strategy has to beat.

    Args:
        sparsity: Fraction of neurons pruned at the end, in [0, 1), or ``{pattern: fraction}`` per layer.
        seed: Another seed prunes other neurons; the same on every rank.
        granularity: Which weights form a unit.

    The other arguments are those of ``Pruning``, and are given by name.

    >>> RandomPruning(0.5, seed=1).criterion
    Random(seed=1)
    """

    def __init__(
        self,
        sparsity: float | dict[str, float] | None = None,
        seed: int = 0,
        granularity: Granularity = Channel(),
        *,
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
        criterion = Random(seed)
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
        self.seed = criterion.seed


class EntropyPruning(Pruning):
    """Prune neurons by the entropy ``H = -sum p log p`` of their output over a window of training steps.

    Args:
        sparsity: Fraction of neurons pruned at the end, in [0, 1), or ``{pattern: fraction}`` per layer.
        prune: Which neurons go first: those of "high" or of "low" entropy. With a ``threshold``, in nats: "high"
            prunes every neuron above it, "low" every one below it.
        bins: Number of bins of the histogram of a neuron's output.
        window: Number of optimizer steps observed before an update.
        granularity: Which weights form a unit.

    The other arguments are those of ``Pruning``, and are given by name.

    Reference: Luo and Wu, 2017, arXiv:1706.05791.

    >>> EntropyPruning(0.5, prune="low", bins=16).criterion.bins
    16
    """

    def __init__(
        self,
        sparsity: float | dict[str, float] | None = None,
        prune: Literal["high", "low"] = "high",
        bins: int = 32,
        window: int = 16,
        granularity: Granularity = Channel(),
        *,
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
        criterion = Entropy(prune, bins, window)
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
        self.prune = criterion.prune
        self.bins = criterion.bins
        self.window = criterion.window


class SensitivityPruning(Pruning):
    """Prune neurons by their contribution to the loss, ``(sum w * dL/dw)**2`` averaged over a window of steps.

    Args:
        sparsity: Fraction of neurons pruned at the end, in [0, 1), or ``{pattern: fraction}`` per layer.
        window: Number of optimizer steps observed before an update.
        granularity: Which weights form a unit; ``Weight()`` for single weights.

    The other arguments are those of ``Pruning``, and are given by name.

    Reference: Molchanov et al., 2019, arXiv:1906.10771.

    >>> SensitivityPruning(0.5).criterion
    Sensitivity(window=16)
    """

    def __init__(
        self,
        sparsity: float | dict[str, float] | None = None,
        window: int = 16,
        granularity: Granularity = Channel(),
        *,
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
        criterion = Sensitivity(window)
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
