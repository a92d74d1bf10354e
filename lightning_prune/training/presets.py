"""Strategies: the named methods, as presets of ``Pruning``; every other argument is passed on."""

from collections.abc import Callable
from typing import Any, Literal

from lightning_prune.criteria import SNIP, Entropy, Magnitude, Movement, Random, Sensitivity, Wanda
from lightning_prune.granularities import Channel, Granularity
from lightning_prune.training.pruning import Pruning, ScheduleName


class MagnitudePruning(Pruning):
    """Prune the weights of smallest magnitude, ``|w|``; a ``threshold`` zeroes exactly those with ``|w| < threshold``.

    Args:
        sparsity: Fraction of zeros at the end, in [0, 1), or ``{pattern: fraction}`` per layer.
        **kwargs: All other arguments of ``Pruning``.

    Reference: Han et al., 2015, arXiv:1506.02626; gradual: Zhu and Gupta, 2017, arXiv:1710.01878.

    >>> MagnitudePruning(0.9).criterion
    Magnitude(p=1)
    """

    def __init__(self, sparsity: float | dict[str, float] | None = None, **kwargs: Any) -> None:
        super().__init__(sparsity, criterion=Magnitude(), **kwargs)


class RandomPruning(Pruning):
    """Prune neurons at random: the baseline that every other strategy has to beat.

    Args:
        sparsity: Fraction of neurons pruned at the end, in [0, 1), or ``{pattern: fraction}`` per layer.
        seed: Another seed prunes other neurons; the same on every rank.
        granularity: Which weights form a unit.
        **kwargs: All other arguments of ``Pruning``.

    >>> RandomPruning(0.5, seed=1).criterion
    Random(seed=1)
    """

    def __init__(
        self,
        sparsity: float | dict[str, float] | None = None,
        seed: int = 0,
        granularity: Granularity = Channel(),
        **kwargs: Any,
    ) -> None:
        criterion = Random(seed)
        super().__init__(sparsity, criterion=criterion, granularity=granularity, **kwargs)
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
        **kwargs: All other arguments of ``Pruning``.

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
        **kwargs: Any,
    ) -> None:
        criterion = Entropy(prune, bins, window)
        super().__init__(sparsity, criterion=criterion, granularity=granularity, **kwargs)
        self.prune = criterion.prune
        self.bins = criterion.bins
        self.window = criterion.window


class SensitivityPruning(Pruning):
    """Prune neurons by their contribution to the loss, ``(sum w * dL/dw)**2`` averaged over a window of steps.

    Args:
        sparsity: Fraction of neurons pruned at the end, in [0, 1), or ``{pattern: fraction}`` per layer.
        window: Number of optimizer steps observed before an update.
        granularity: Which weights form a unit; ``Weight()`` for single weights.
        **kwargs: All other arguments of ``Pruning``.

    Reference: Molchanov et al., 2019, arXiv:1906.10771.

    >>> SensitivityPruning(0.5).criterion
    Sensitivity(window=16)
    """

    def __init__(
        self,
        sparsity: float | dict[str, float] | None = None,
        window: int = 16,
        granularity: Granularity = Channel(),
        **kwargs: Any,
    ) -> None:
        criterion = Sensitivity(window)
        super().__init__(sparsity, criterion=criterion, granularity=granularity, **kwargs)
        self.window = criterion.window


class MovementPruning(Pruning):
    """Prune the weights that move towards zero while a pretrained model is fine-tuned.

    Args:
        sparsity: Fraction of zeros at the end, in [0, 1), or ``{pattern: fraction}`` per layer.
        window: Number of optimizer steps observed before the first update; all that follow are, too.
        **kwargs: All other arguments of ``Pruning``.

    Reference: Sanh et al., 2020, arXiv:2005.07683.

    >>> MovementPruning(0.9).criterion
    Movement(window=32)
    """

    def __init__(self, sparsity: float | dict[str, float] | None = None, window: int = 32, **kwargs: Any) -> None:
        criterion = Movement(window)
        super().__init__(sparsity, criterion=criterion, **kwargs)
        self.window = criterion.window


class WandaPruning(Pruning):
    """Prune the weights that contribute least to their output channel: ``|w|`` times the size of their input.

    Args:
        sparsity: Fraction of zeros at the end, in [0, 1), or ``{pattern: fraction}`` per layer.
        window: Number of optimizer steps observed before an update; None is 16.
        **kwargs: All other arguments of ``Pruning``.

    Reference: Sun et al., 2023, arXiv:2306.11695.

    >>> WandaPruning(0.5).criterion.window
    16
    """

    def __init__(
        self, sparsity: float | dict[str, float] | None = None, window: int | None = 16, **kwargs: Any
    ) -> None:
        criterion = Wanda(window)
        super().__init__(sparsity, criterion=criterion, **kwargs)
        self.window = criterion.window


class SNIPPruning(Pruning):
    """Prune a network at its initialisation, at once, by how sensitive the loss is to each connection.

    The scores are of the gradients of the first optimizer step, and the masks come into force right after it:
    ``PruningAtInit`` takes a pass more, and prunes before.

    Args:
        sparsity: Fraction of zeros, in [0, 1), or ``{pattern: fraction}`` per layer.
        window: Number of optimizer steps observed; from the second one on the network has begun to train.
        schedule: From progress to the fraction that is due, all at once unless told otherwise.
        start: First update: an int counts intervals, a float in [0, 1] is a fraction of the run.
        **kwargs: All other arguments of ``Pruning``.

    Reference: Lee et al., 2019, arXiv:1810.02340.

    >>> SNIPPruning(0.9).schedule
    'one_shot'
    """

    def __init__(
        self,
        sparsity: float | dict[str, float] | None = None,
        window: int = 1,
        schedule: ScheduleName | Callable[[float], float] = "one_shot",
        start: int | float = 0,
        **kwargs: Any,
    ) -> None:
        criterion = SNIP(window)
        super().__init__(sparsity, criterion=criterion, schedule=schedule, start=start, **kwargs)
        self.window = criterion.window
