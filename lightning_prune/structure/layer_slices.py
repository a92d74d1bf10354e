"""Layer slices: which slices of a layer's tensors belong to its channels, by the type of the layer."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.structure.groups import Direction, Item, Role

Slice = tuple[Tensor, int, Tensor, Role]  # tensor, dimension, indices in it (a row a unit), role


class UnsupportedError(Exception):
    """Why the channels of a group cannot be removed."""


def units_of(layers: Iterable[Item]) -> list[list[int]]:
    """Return the channels of the first layer that form each unit: those that share a channel of any layer."""
    parent: dict[int, int] = {}

    def find(channel: int) -> int:
        while parent.setdefault(channel, channel) != channel:
            channel = parent[channel]
        return channel

    for module, direction, channels, roots in layers:
        if any(root is None for root in roots) or len(channels) != len(roots):
            raise UnsupportedError(f"{type(module).__name__} reads them in an unknown way")
        modulus = _modulus(module, direction)
        first: dict[int, int] = {}
        for channel, root in zip(channels, roots, strict=True):
            one, other = find(root), find(first.setdefault(channel % modulus if modulus else channel, root))
            parent[max(one, other)] = min(one, other)
    units: dict[int, list[int]] = {}
    for channel in sorted(parent):
        units.setdefault(find(channel), []).append(channel)
    return list(units.values())


def _modulus(module: Any, direction: Direction) -> int:
    """Return the number of channels in a group of a grouped convolution; 0 for everything else."""
    if not isinstance(module, nn.modules.conv._ConvNd) or module.groups == 1 or direction == "both":
        return 0
    if module.transposed or module.groups == module.in_channels:
        raise UnsupportedError("they go through a grouped convolution that cannot be cut")
    return (module.in_channels if direction == "in" else module.out_channels) // module.groups


def channels_of_units(channels: Sequence[int], roots: Sequence[int], units: Sequence[Sequence[int]]) -> Tensor:
    """Return the channels of one layer that belong to each unit, a row a unit.

    Raises:
        UnsupportedError: If the rows are not of equal length.

    >>> channels_of_units([0, 1, 2, 3], [0, 0, 1, 1], [[0], [1]]).tolist()
    [[0, 1], [2, 3]]
    """
    unit_of = {root: unit for unit, members in enumerate(units) for root in members}
    rows: list[list[int]] = [[] for _ in units]
    for channel, root in zip(channels, roots, strict=True):
        rows[unit_of[root]].append(channel)
    if len({len(row) for row in rows}) != 1:
        raise UnsupportedError("a layer reads some channels more often than others")
    return torch.tensor([sorted(row) for row in rows])


def slices(module: Any, direction: Direction, index: Tensor) -> Iterator[Slice]:
    """Yield the slices of a layer's tensors that belong to some of its channels.

    Raises:
        UnsupportedError: If the channels of such a layer cannot be removed.

    >>> [(dim, role) for _, dim, _, role in slices(nn.Linear(2, 2), "out", torch.tensor([[0], [1]]))]
    [(0, 'producer'), (0, 'dependent')]
    """
    if isinstance(module, nn.Parameter):
        last = max(d for d, length in enumerate(module.shape) if length > 1)
        yield module, last, index, "dependent"
    elif isinstance(module, nn.LSTM):
        yield from _lstm(module, direction, index)
    elif isinstance(module, nn.Embedding):
        yield module.weight, 1, index, "producer"
    elif isinstance(module, nn.modules.batchnorm._NormBase) or (
        isinstance(module, nn.PReLU) and module.num_parameters > 1
    ):
        tensors = (getattr(module, name, None) for name in ("weight", "bias", "running_mean", "running_var"))
        yield from ((tensor, 0, index, "dependent") for tensor in tensors if tensor is not None)
    elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        yield from _linear(module, direction, index)
    elif not isinstance(module, nn.PReLU):
        raise UnsupportedError(f"{type(module).__name__} cannot be cut")


def _linear(module: nn.Linear | nn.modules.conv._ConvNd, direction: Direction, index: Tensor) -> Iterator[Slice]:
    # the first dimension of a depthwise convolution, transposed or not, holds its inputs and its outputs
    outputs = int(getattr(module, "transposed", False) and direction != "both")
    if direction == "in":
        modulus = _modulus(module, direction)
        yield module.weight, 1 - outputs, (index % modulus).unique(dim=1) if modulus else index, "consumer"
    else:
        yield module.weight, outputs, index, "producer"
        if module.bias is not None:
            yield module.bias, 0, index, "dependent"


def _lstm(module: nn.LSTM, direction: Direction, index: Tensor) -> Iterator[Slice]:
    if module.bidirectional or module.proj_size:
        raise UnsupportedError("they go through an LSTM with two directions or a projection")
    weights = dict(module.named_parameters())
    if direction == "in":
        yield weights["weight_ih_l0"], 1, index, "consumer"
        return
    gates = torch.cat([index + gate * module.hidden_size for gate in range(4)], 1)
    for layer in range(module.num_layers):
        yield weights[f"weight_ih_l{layer}"], 0, gates, "producer"
        yield weights[f"weight_hh_l{layer}"], 0, gates, "producer"
        yield weights[f"weight_hh_l{layer}"], 1, index, "consumer"
        if layer:
            yield weights[f"weight_ih_l{layer}"], 1, index, "consumer"
        if module.bias:
            yield weights[f"bias_ih_l{layer}"], 0, gates, "dependent"
            yield weights[f"bias_hh_l{layer}"], 0, gates, "dependent"
