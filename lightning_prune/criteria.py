"""Criteria: how much each unit matters. The units with the lowest scores are pruned first."""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.selection import chunks
from lightning_prune.shards import Operation, local, output_rows
from lightning_prune.units import Units

OverRanks = Callable[[Tensor, Operation], Tensor]


class Criterion:
    """A score for every unit; a subclass with the one method ``scores`` is a new criterion.

    A criterion holds no state: what it observes is kept as ``units.statistic`` by whoever drives it.

    Attributes:
        needs: What it observes during ``window`` optimizer steps before an update: nothing beyond the weights, the
            gradients (``observe`` is called once a step), or forward passes (once a forward of the weight's module).
        window: How many optimizer steps it observes.

    >>> class Squared(Criterion):
    ...     def scores(self, units):
    ...         return units.mean(torch.square)
    """

    needs: ClassVar[Literal["weights", "gradients", "forwards"]] = "weights"
    window: int = 0

    def scores(self, units: Units) -> Tensor:
        """Return a finite score for each unit: ``units.sum`` and ``units.mean`` pool values of single weights."""
        raise NotImplementedError

    def observe(self, units: Units, inputs: tuple[Any, ...] = (), output: Any = None) -> Tensor:
        """Return the new ``units.statistic``; inputs and output are those of the module, for forward passes."""
        raise NotImplementedError

    def conclude(self, units: Units, over_ranks: OverRanks) -> Tensor:
        """Return the statistic at the end of the window, over what all ranks have seen of their batches.

        ``over_ranks(values, "sum" | "min" | "max")`` reduces a tensor over the ranks; gradients are reduced already.
        """
        assert units.statistic is not None
        return over_ranks(units.statistic, "sum") if self.needs == "forwards" else units.statistic

    def nothing(self, units: Units) -> Tensor:
        """Return the statistic of a rank that has seen no forward pass where others have."""
        raise NotImplementedError

    def merge(self, statistics: list[Tensor]) -> Tensor:
        """Return one statistic for those of several ranks, of which fewer go on after a checkpoint."""
        return torch.stack(statistics).sum(0)

    def level(self, threshold: float) -> float:
        """Return the score below which a unit is pruned, for a threshold in the unit of measure of the criterion."""
        return threshold


@dataclass(frozen=True)
class Magnitude(Criterion):
    """The absolute value of a weight, ``|w|``; of larger units, the mean. Needs nothing.

    Reference: Han et al., 2015, "Learning both Weights and Connections", arXiv:1506.02626.
    """

    @override
    def scores(self, units: Units) -> Tensor:
        return units.mean(torch.abs)


@dataclass(frozen=True)
class Random(Criterion):
    """A number in [0, 1) for each unit, from a hash of seed, name and position: the same on every rank. Needs nothing.

    Args:
        seed: Another seed gives another order.
    """

    seed: int = 0

    @override
    def scores(self, units: Units) -> Tensor:
        index = units.index()
        salt = zlib.crc32(f"{self.seed}:{units.name}".encode())
        out = torch.empty(index.shape, dtype=torch.float32, device=index.device)
        for part, places in zip(chunks(out), chunks(index), strict=True):
            part.copy_(_hash(places, salt) >> 8).mul_(2.0**-24)
        return out


def _hash(index: Tensor, salt: int) -> Tensor:
    """Mix integers to 32 well-distributed bits (the finaliser of MurmurHash3), in int64 without overflow."""
    mask = 0xFFFFFFFF
    mixed = ((index & mask) * 0x9E3779B1 + (index >> 32) + salt) & mask
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & mask
    return mixed ^ (mixed >> 16)


@dataclass(frozen=True)
class Entropy(Criterion):
    """The entropy ``H = -sum p log p``, in nats, of the output distribution of each neuron. Needs forward passes.

    p is the histogram, with ``bins`` equal bins between smallest and largest value, of what the weight's module put
    out for that neuron over the window. Where there are more values than ``samples``, evenly spaced ones stand for all.

    Args:
        prune: Which neurons go first: those of "high" or of "low" entropy.
        bins: Number of bins, at least 2; H is at most log(bins).
        window: Number of optimizer steps observed before an update.
        samples: Values kept per neuron over the window.

    Raises:
        ValueError: If an argument is out of range.

    Reference: Luo and Wu, 2017, "An Entropy-based Pruning Method", arXiv:1706.05791.
    """

    needs: ClassVar[Literal["weights", "gradients", "forwards"]] = "forwards"

    prune: Literal["high", "low"] = "high"
    bins: int = 32
    window: int = 16
    samples: int = 2048

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.prune not in ("high", "low"):
            raise ValueError(f'prune must be "high" or "low", got {self.prune!r}')
        _check_at_least("bins", self.bins, 2)
        _check_at_least("window", self.window, 1)
        _check_at_least("samples", self.samples, self.window)

    @override
    def observe(self, units: Units, inputs: tuple[Any, ...] = (), output: Any = None) -> Tensor:
        values = _all_channels(output, units, self.samples // self.window)
        return values if units.statistic is None else torch.cat([units.statistic, values], 1)

    @override
    def merge(self, statistics: list[Tensor]) -> Tensor:
        return torch.cat(statistics, 1)

    @override
    def conclude(self, units: Units, over_ranks: OverRanks) -> Tensor:
        values = self.nothing(units) if units.statistic is None else units.statistic
        unseen = values.isnan()
        bound = values.new_full((units.channels, 1), math.inf)  # of a rank that has seen nothing
        low = over_ranks(torch.cat([values.masked_fill(unseen, math.inf), bound], 1).amin(1), "min")
        high = over_ranks(torch.cat([values.masked_fill(unseen, -math.inf), -bound], 1).amax(1), "max")
        return entropy(over_ranks(histogram(values, low, high, self.bins), "sum"))

    @override
    def nothing(self, units: Units) -> Tensor:
        return torch.empty(units.channels, 0, device=units.parameter.device)

    @override
    def scores(self, units: Units) -> Tensor:
        assert units.statistic is not None
        score = -units.statistic if self.prune == "high" else units.statistic
        return units.mean(lambda weight: units.spread(score))

    @override
    def level(self, threshold: float) -> float:
        return -threshold if self.prune == "high" else threshold


def histogram(values: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """Return how many values of each row lie in each of the equal bins between its bounds; NaN where one is infinite.

    Values that are NaN count nowhere.

    >>> histogram(torch.tensor([[0.0, 0.5, 0.9, 1.0]]), torch.zeros(1), torch.ones(1), 2).tolist()
    [[1.0, 3.0]]
    """
    width = torch.where(high > low, high - low, 1.0)[:, None]
    place = ((values - low[:, None]) / width * bins).nan_to_num().long().clamp_(0, bins - 1)
    counts = torch.zeros(values.shape[0], bins, device=values.device)
    counts.scatter_add_(1, place, (~values.isnan()).float())
    return torch.where((high - low).isfinite()[:, None], counts, torch.nan)


def entropy(counts: Tensor) -> Tensor:
    """Return the entropy, in nats, of the distribution in each row of counts.

    >>> entropy(torch.tensor([[4.0, 0.0], [2.0, 2.0]])).exp().tolist()
    [1.0, 2.0]
    """
    nats: Tensor = torch.special.entr(counts / counts.sum(1, keepdim=True)).sum(1)
    return nats


def _sample(values: Tensor, room: int) -> Tensor:
    """Return at most ``room`` columns, spread evenly by steps of a golden ratio, which meets no period of the data."""
    n = values.shape[1]
    if n <= room:
        return values
    step = round(n * 0.6180339887)
    while math.gcd(step, n) > 1:
        step += 1
    return values[:, torch.arange(room, device=values.device) * step % n]


def _all_channels(output: Any, units: Units, room: int) -> Tensor:
    """Return samples of a module's output as (channels, values); NaN for channels that other ranks put out.

    A value that is not finite becomes infinity, so that it is not taken for one that was not seen.
    """
    dim = -max(1, units.parameter.ndim - 1)  # linear: last; convolution: in front of the spatial ones
    output = local(output) if isinstance(output, Tensor) else output
    mine = output_rows(units.parameter, units.dim)
    possible = (units.channels, mine.stop - mine.start)
    if not isinstance(output, Tensor) or output.ndim < -dim or output.shape[dim] not in possible:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"the module of {units.name!r} must put out a channel for each of its {units.channels} rows, got {found}: "
            f"ignore it, or use a criterion that needs no forward passes"
        )
    values = _sample(output.movedim(dim, 0).flatten(1), room).float().nan_to_num(math.inf, math.inf, math.inf)
    if values.shape[0] == units.channels:
        return values
    everything = values.new_full((units.channels, values.shape[1]), math.nan)
    everything[mine] = values
    return everything


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

    window: int = 16

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_at_least("window", self.window, 1)

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


def _check_at_least(argument: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{argument} must be at least {least}, got {value}")
