"""Criteria that observe activations: the inputs or the outputs of a weight's module."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from typing_extensions import override

from lightning_prune.criteria.criterion import Criterion
from lightning_prune.models.layer_inputs import per_weight, squares, unreadable, zero_squares
from lightning_prune.tensors.distributed import local, local_shard, output_rows
from lightning_prune.tensors.ranking import sum_share
from lightning_prune.units.units import Units
from lightning_prune.validation.arguments import integer
from lightning_prune.validation.instances import flag, settle
from lightning_prune.validation.values import optional


def channel_values(output: Any, units: Units, positions: int) -> Tensor:
    """Return the output of a module as float32 values (channels, values); NaN for channels of other ranks.

    At most ``positions`` values of a channel are taken from every sample (the first dimension if there is a batch),
    spread evenly over the feature map or sequence, and different ones at each step. They do not depend on the rest of
    the batch, so that ranks that split a batch together take the values that one process would. Values that are not
    finite become infinity, since NaN marks values that were not observed.

    Raises:
        ValueError: If the output is not one tensor with a channel for each output channel of the weight.

    >>> from torch import nn
    >>> from lightning_prune.granularities import Channel
    >>> from lightning_prune.models.parameters import find
    >>> layer = nn.Conv1d(1, 2, 1)
    >>> channel_values(torch.zeros(3, 2, 100), Channel().units(find(layer)[0]), positions=16).shape
    torch.Size([2, 48])
    """
    dim = -max(1, units.parameter.ndim - 1)  # linear: the last; convolution: the one before the spatial dimensions
    output = local(output) if isinstance(output, Tensor) else output
    mine = output_rows(units.parameter, units.dim)
    possible = (units.channels, mine.stop - mine.start)
    if not isinstance(output, Tensor) or output.ndim < -dim or output.shape[dim] not in possible:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"the module of {units.name!r} must output a channel for each of its {units.channels} rows, got {found}: "
            f"ignore it, or use a criterion that does not need activations"
        )
    batch = output.shape[0] if output.ndim > -dim else 1
    values = output.movedim(dim, 0).reshape(output.shape[dim], batch, -1 if output.numel() else 0)
    values = _spread(values, positions, units.steps).flatten(1).float().nan_to_num(math.inf, math.inf, math.inf)
    if len(values) == units.channels:
        return values
    padded = values.new_full((units.channels, values.shape[1]), math.nan)
    padded[mine] = values
    return padded


def no_channels(modules: Sequence[nn.Module]) -> str | None:
    """Return why layers do not output a channel for each row of their weight; None if they may.

    >>> from torch import nn
    >>> no_channels([nn.LSTM(2, 2)])
    'its layer (LSTM) does not output a channel for each of its rows'
    """
    for module in modules:
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return "its layer is never called: the attention around it reads the weight directly"
        if isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention):
            return f"its layer ({type(module).__name__}) does not output a channel for each of its rows"
    return None


def _spread(values: Tensor, most: int, turn: int) -> Tensor:
    """Return at most ``most`` elements of the last dimension, different ones at each turn.

    Golden-ratio steps spread them evenly and avoid the periods of the data.
    """
    n = values.shape[-1]
    if n <= most:
        return values
    step = round(n * 0.6180339887)
    while math.gcd(step, n) > 1:
        step += 1
    return values[..., torch.arange(turn * most, (turn + 1) * most, device=values.device) * step % n]


@dataclass(frozen=True)
class Wanda(Criterion):
    """``|w|`` times the root mean square of the weight's input over the window. Needs activations.

    Weights are compared within their output channel, with ``NM`` within their group. Larger units score the mean, and
    are compared with all others. The root mean square is the paper's norm up to a constant factor for each layer.
    Supports linear layers, convolutions (each position of the kernel has its own input; in a transposed one they share
    that of their channel) and the query, key and value projections of ``MultiheadAttention``.

    Args:
        window: Number of optimizer steps, or batches, observed; None is 16 steps, or all batches of ``prune``.
        by_row: Whether every output channel loses the same number of weights. If False, every channel loses the same
            share of the sum of its scores: the variant in the paper's appendix, for ``scope="local"``.

    Raises:
        ValueError: If the window is shorter than one step; while observing, if the layer is of another kind.

    Reference: Sun et al., 2023, "A Simple and Effective Pruning Approach for Large Language Models", arXiv:2306.11695.
    """

    needs: ClassVar[Literal["weights", "gradients", "forwards"]] = "forwards"

    window: int | None = None
    by_row: bool = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        window = optional(integer, "window", self.window, 1)
        settle(self, window=window, by_row=flag("by_row", self.by_row))

    @override
    def cannot_score(self, units: Units) -> str | None:
        reasons = (unreadable(module, units.name) for module in units.modules)
        return next((reason for reason in reasons if reason is not None), None)

    @override
    def observe(self, units: Units, inputs: tuple[Any, ...] = (), output: Any = None) -> Tensor:
        return units.add(squares(units.module, inputs, units.parameter, units.name))

    @override
    def empty_state(self, units: Units) -> Tensor:
        return zero_squares(units.modules[0], units.parameter)

    @override
    def scores(self, units: Units) -> Tensor:
        assert units.statistic is not None
        total, count = units.statistic
        norms = per_weight((total / count.clamp(min=1)).sqrt().float(), units.parameter.shape)
        found = units.mean(lambda weight: weight.abs() * local_shard(norms, units.parameter))
        if self.by_row or not units.single:
            return found
        whole = units.full(found).view(units.parameter.shape).movedim(units.dim, 0)
        shares = sum_share(whole.flatten(1)).view(whole.shape).movedim(0, units.dim)
        return units.local(shares.contiguous())


@dataclass(frozen=True)
class APoZ(Criterion):
    """How often a channel is active: the share of its pre-activation values above zero. Needs activations.

    That is one minus the average percentage of zeros after a ReLU: neurons that are mostly zero go first. The values
    are the outputs of the norm that follows the layer, before any activation, or of the layer itself if no norm follows
    or the model cannot be traced. All weights of an output channel score alike. For coupled units, it is the channel
    of the first layer.

    Args:
        window: Number of optimizer steps, or batches, observed.

    Raises:
        ValueError: If the window is shorter than one step.

    Reference: Hu et al., 2016, "Network Trimming", arXiv:1607.03250.
    """

    needs: ClassVar[Literal["weights", "gradients", "forwards"]] = "forwards"
    by_channel: ClassVar[bool] = True

    window: int = 16

    def __post_init__(self) -> None:
        """Check the arguments."""
        settle(self, window=integer("window", self.window, 1))

    @override
    def cannot_score(self, units: Units) -> str | None:
        return no_channels(units.modules)

    @override
    def watched(self, units: Units) -> Sequence[nn.Module]:
        return units.outputs()

    @override
    def observe(self, units: Units, inputs: tuple[Any, ...] = (), output: Any = None) -> Tensor:
        values = channel_values(output, units, output.numel() if isinstance(output, Tensor) else 1)
        return units.add(torch.stack([(values > 0).sum(1), (~values.isnan()).sum(1)]))

    @override
    def empty_state(self, units: Units) -> Tensor:
        return torch.zeros(2, units.channels, dtype=torch.int64, device=units.parameter.device)

    @override
    def scores(self, units: Units) -> Tensor:
        assert units.statistic is not None
        active, count = units.statistic
        return units.mean(lambda weight: units.spread(active / count))
