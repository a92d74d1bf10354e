"""Activations: what a weight's module puts out, channel by channel."""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_prune.shards import local, output_rows
from lightning_prune.units import Units


def channel_values(output: Any, units: Units, positions: int) -> Tensor:
    """Return what a module puts out as float32 values (channels, values); NaN for channels that other ranks put out.

    Of every sample (the first dimension, where there is a batch) at most ``positions`` values of a channel are taken,
    spread evenly over its feature map or sequence, other ones at each step. Which ones does not depend on the rest of
    the batch, so that ranks which share a batch take together what one process would take of it. A value that is not
    finite becomes infinity, so that it is not taken for one that was not seen.

    Raises:
        ValueError: If the output is not one tensor with a channel for each output channel of the weight.

    >>> from torch import nn
    >>> from lightning_prune.granularities import Channel
    >>> from lightning_prune.targets import find
    >>> layer = nn.Conv1d(1, 2, 1)
    >>> channel_values(torch.zeros(3, 2, 100), Units(find(layer)[0], Channel()), positions=16).shape
    torch.Size([2, 48])
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
    batch = output.shape[0] if output.ndim > -dim else 1
    values = output.movedim(dim, 0).reshape(output.shape[dim], batch, -1 if output.numel() else 0)
    values = _spread(values, positions, units.steps).flatten(1).float().nan_to_num(math.inf, math.inf, math.inf)
    if len(values) == units.channels:
        return values
    everything = values.new_full((units.channels, values.shape[1]), math.nan)
    everything[mine] = values
    return everything


def _spread(values: Tensor, room: int, turn: int) -> Tensor:
    """Return at most ``room`` entries of the last dimension, others at each turn.

    They follow each other by steps of a golden ratio: spread evenly, and in no period of the data.
    """
    n = values.shape[-1]
    if n <= room:
        return values
    step = round(n * 0.6180339887)
    while math.gcd(step, n) > 1:
        step += 1
    return values[..., torch.arange(turn * room, (turn + 1) * room, device=values.device) * step % n]
