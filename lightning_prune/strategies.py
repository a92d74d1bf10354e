"""Strategies: the named methods, as presets of ``Pruning``; every other argument is passed on."""

from typing import Any, Literal

from lightning_prune.criteria import Entropy, Magnitude, Random, Sensitivity
from lightning_prune.granularities import Channel, Granularity
from lightning_prune.pruning import Pruning


class MagnitudePruning(Pruning):
    """Prune the weights of smallest magnitude, ``|w|``; a ``threshold`` zeroes exactly those with ``|w| < threshold``.

    Args:
        sparsity: Fraction of zeros at the end, in [0, 1), or ``{pattern: fraction}`` per layer.
        **kwargs: All other arguments of ``Pruning``.

    Reference: Han et al., 2015, arXiv:1506.02626; gradual: Zhu and Gupta, 2017, arXiv:1710.01878.

    >>> MagnitudePruning(0.9).criterion
    Magnitude()
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
        super().__init__(sparsity, criterion=Random(seed), granularity=granularity, **kwargs)
        self.seed = seed


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
        super().__init__(sparsity, criterion=Entropy(prune, bins, window), granularity=granularity, **kwargs)
        self.prune = prune
        self.bins = bins
        self.window = window


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
        super().__init__(sparsity, criterion=Sensitivity(window), granularity=granularity, **kwargs)
        self.window = window
