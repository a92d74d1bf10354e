"""Entropy: how evenly the outputs of a neuron spread over their range, from a histogram that grows with the range."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.criteria import histogram
from lightning_prune.criteria.activations import channel_values, no_channels
from lightning_prune.criteria.criterion import Criterion, OverRanks
from lightning_prune.units.units import Units
from lightning_prune.validation.arguments import choice, integer
from lightning_prune.validation.instances import settle

_CELLS = 2048  # at least, in the histogram of a neuron; its values span a quarter of them or more
_CELLS_A_BIN = 64
_MOST_BINS = 65_536  # 32 MiB a neuron


@dataclass(frozen=True)
class Entropy(Criterion):
    """The entropy ``H = -sum p log p``, in nats, of the output distribution of each neuron. Needs activations.

    p is the histogram of the neuron's outputs over the window, with ``bins`` equal bins between the smallest and the
    largest value.

    Args:
        prune: Which neurons go first: those of "high" or "low" entropy.
        bins: Number of bins, at least 2; H is at most log(bins).
        window: Number of optimizer steps observed before an update.
        positions: How many values are taken from a feature map or sequence of each sample, evenly spread.

    Raises:
        ValueError: If an argument is out of range.

    Reference: Luo and Wu, 2017, "An Entropy-based Pruning Method", arXiv:1706.05791.
    """

    needs: ClassVar[Literal["weights", "gradients", "forwards"]] = "forwards"
    by_channel: ClassVar[bool] = True

    prune: Literal["high", "low"] = "high"
    bins: int = 32
    window: int = 16
    positions: int = 16

    def __post_init__(self) -> None:
        """Check the arguments."""
        settle(self, prune=choice("prune", self.prune, ("high", "low")))
        settle(self, bins=integer("bins", self.bins, 2, most=_MOST_BINS), window=integer("window", self.window, 1))
        settle(self, positions=integer("positions", self.positions, 1))

    @override
    def cannot_score(self, units: Units) -> str | None:
        return no_channels(units.modules)

    @override
    def observe(self, units: Units, inputs: tuple[Any, ...] = (), output: Any = None) -> Tensor:
        values = channel_values(output, units, self.positions).T
        held = units.statistic
        if held is not None and self._is_histogram(held, units):
            return histogram.count(held, values.T)
        held = _append(self.empty_state(units) if held is None else held, values, self._cells)
        return held if len(held) < self._cells else self._histogram(held, units)

    # raw values (values, channels) are kept until a histogram is smaller: counting many values together is faster

    @property
    def _cells(self) -> int:
        return max(_CELLS, self.bins * _CELLS_A_BIN)

    def _is_histogram(self, statistic: Tensor, units: Units) -> bool:
        return statistic.shape == (units.channels, 2 + self._cells)

    def _histogram(self, statistic: Tensor, units: Units) -> Tensor:
        if self._is_histogram(statistic, units):
            return statistic
        return histogram.count(histogram.empty(units.channels, self._cells, statistic.device), statistic.T.contiguous())

    @override
    def merge_states(self, units: Units, statistics: list[Tensor]) -> Tensor:
        return histogram.merge([self._histogram(statistic, units) for statistic in statistics])

    @override
    def finalize(self, units: Units, over_ranks: OverRanks) -> Tensor:
        mine = self._histogram(self.empty_state(units) if units.statistic is None else units.statistic, units)
        low, high = over_ranks(mine[:, 0].contiguous(), "min"), over_ranks(mine[:, 1].contiguous(), "max")
        return entropy(over_ranks(histogram.bins(histogram.stretch(mine, low, high), self.bins), "sum"))

    @override
    def empty_state(self, units: Units) -> Tensor:
        return torch.empty(0, units.channels, dtype=torch.float32, device=units.parameter.device)

    @override
    def scores(self, units: Units) -> Tensor:
        assert units.statistic is not None
        score = -units.statistic if self.prune == "high" else units.statistic
        return units.mean(lambda weight: units.spread(score))

    @override
    def level(self, threshold: float) -> float:
        return -threshold if self.prune == "high" else threshold


def _append(held: Tensor, values: Tensor, room: int) -> Tensor:
    """Return rows with others appended, in a storage with spare room, so that not all are copied each time.

    >>> held = _append(torch.empty(0, 2), torch.tensor([[1.0, 2.0]]), room=8)
    >>> _append(held, torch.tensor([[3.0, 4.0]]), room=8).tolist()
    [[1.0, 2.0], [3.0, 4.0]]
    """
    before, size = len(held), len(held) + len(values)
    if held.untyped_storage().nbytes() < size * values.shape[1] * values.element_size():
        held = held.new_empty(max(room, size), values.shape[1]).resize_(held.shape).copy_(held)
    held.resize_(size, values.shape[1])[before:] = values
    return held


def entropy(counts: Tensor) -> Tensor:
    """Return the entropy, in nats, of the distribution in each row of counts.

    >>> entropy(torch.tensor([[4.0, 0.0], [2.0, 2.0]])).exp().tolist()
    [1.0, 2.0]
    """
    nats: Tensor = torch.special.entr(counts / counts.sum(1, keepdim=True)).sum(1)
    return nats
