"""Layers with shared fan-in: groups of rows as dense products over the inputs that each group reads."""

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

# how many numbers are read at once, so that they stay in the cache, and for how many samples at least
_IN_CACHE, _LEAST = 2**18, 64
GROUPS = (8, 16, 32, 64)  # rows in a group that are tried
_BLOCK = 8  # channels that ONNX Runtime keeps together
_SELECTING = 40  # rows whose products with an input take ONNX Runtime as long as its selection


class _Groups(nn.Module):
    """The weights of groups of rows, and which inputs each group reads."""

    inputs: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, inputs: Tensor, values: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("inputs", inputs)
        self.register_buffer("values", values)
        self.register_buffer("bias", bias)

    def products(self, columns: Tensor, size: int) -> Tensor:
        """Return the outputs (..., size, samples) for inputs in columns (..., inputs, samples)."""
        groups, k, _ = self.values.shape
        read: Tensor = columns.index_select(-2, self.inputs.view(-1)).unflatten(-2, (groups, k))
        multiply = torch.bmm if read.ndim == 3 else torch.matmul
        found: Tensor = multiply(self.values.transpose(1, 2), read).flatten(-3, -2).narrow(-2, 0, size)
        return found if self.bias is None else _plus(found, self.bias[:, None])

    @override
    def extra_repr(self) -> str:
        return f"{self.inputs.shape[0]} groups of {self.values.shape[2]} rows, {self.inputs.shape[1]} inputs each"


class SharedFanInLinear(_Groups):
    """A linear layer whose rows are in groups, each a dense matrix behind a selection of inputs: for inference.

    Args:
        inputs: The inputs of every group (int32): (groups, k).
        values: The weights of every group: (groups, k, rows).
        bias: One number for each output, or None.
        out_features: Number of outputs; the last group may have fewer rows than the others.
        by_column: Whether samples are the columns of the products: faster for larger batches.

    >>> weight = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 4.0]])
    >>> layer = SharedFanInLinear(*packed(weight, 2), None, 2, by_column=False)
    >>> layer(torch.tensor([[1.0, 1.0, 1.0]]))
    tensor([[3., 7.]])
    """

    def __init__(self, inputs: Tensor, values: Tensor, bias: Tensor | None, out_features: int, by_column: bool) -> None:
        super().__init__(inputs, values, bias)
        self.out_features = out_features
        self.by_column = by_column

    @classmethod
    def of(cls, layer: nn.Linear, rows: int, by_column: bool) -> Self:
        """Return the layer that computes what a linear layer does, with groups of so many rows."""
        bias = None if layer.bias is None else layer.bias.detach().clone()
        return cls(*packed(layer.weight.detach(), rows), bias, layer.out_features, by_column)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.ndim > 1 and _in_onnx():
            return self.products(inputs.mT, self.out_features).mT
        samples = inputs.reshape(-1, inputs.shape[-1])
        if not self.by_column:
            found = self._rows(samples)
        else:
            found = self.products(samples.t().contiguous(), self.out_features).t()
        if inputs.ndim == 2:
            return found  # by column its rows are not contiguous, which suits another layer by column
        return found.contiguous().view(*inputs.shape[:-1], self.out_features)  # attention is slow with other strides

    def _rows(self, samples: Tensor) -> Tensor:
        if _in_program(samples.shape[0]) or samples.shape[0] <= _LEAST:
            return self._with_bias(self._by_group(samples).flatten(1))
        groups, k, rows = self.values.shape
        part = max(_LEAST, _IN_CACHE // (groups * k))
        found = samples.new_empty(samples.shape[0], groups * rows)
        for start in range(0, samples.shape[0], part):
            outputs = found[start : start + part]
            outputs.view(-1, groups, rows).copy_(self._by_group(samples[start : start + part]))
            self._with_bias(outputs)
        return found[:, : self.out_features]

    def _by_group(self, samples: Tensor) -> Tensor:
        """Return the outputs (samples, groups, rows), without the bias."""
        groups, k, _ = self.values.shape
        read = samples.index_select(1, self.inputs.view(-1)).view(samples.shape[0], groups, k).transpose(0, 1)
        return torch.bmm(read, self.values).transpose(0, 1)

    def _with_bias(self, found: Tensor) -> Tensor:
        found = found[:, : self.out_features]
        return found if self.bias is None else _plus(found, self.bias)


class SharedFanInConv2d(_Groups):
    """A 1 x 1 convolution whose rows are in groups, each a dense matrix behind a selection of inputs: for inference.

    Args:
        inputs: The input channels of every group (int32): (groups, k).
        values: The weights of every group: (groups, k, rows).
        bias: One number for each output channel, or None.
        out_channels: Number of output channels; the last group may have fewer rows than the others.
        stride: Along height and width.
    """

    def __init__(
        self, inputs: Tensor, values: Tensor, bias: Tensor | None, out_channels: int, stride: Sequence[int]
    ) -> None:
        super().__init__(inputs, values, bias)
        self.out_channels = out_channels
        self.stride = list(stride)

    @classmethod
    def of(cls, layer: nn.Conv2d, rows: int) -> Self:
        """Return the layer that computes what a 1 x 1 convolution does, with groups of so many rows."""
        bias = None if layer.bias is None else layer.bias.detach().clone()
        return cls(*packed(layer.weight.detach().flatten(1), rows), bias, layer.out_channels, layer.stride)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        if _in_onnx() and inputs.dtype != torch.float64:  # in which ONNX Runtime has no convolution
            return self._as_convolution(inputs)
        read = inputs[:, :, :: self.stride[0], :: self.stride[1]]
        if _in_onnx():
            found = self.products(read.flatten(2), self.out_channels)
            return found.view(-1, self.out_channels, *read.shape[2:])
        if read.shape[0] == 1:
            found = self.products(read[0].flatten(1), self.out_channels)
            return found.view(1, self.out_channels, *read.shape[2:])
        # all images together, as columns of one matrix
        columns = read.transpose(0, 1).flatten(1)
        found = self.products(columns, self.out_channels)
        images: Tensor = found.unflatten(1, (read.shape[0], *read.shape[2:])).transpose(0, 1).contiguous()
        return images

    def _as_convolution(self, images: Tensor) -> Tensor:
        """Return the outputs as a convolution, which ONNX Runtime merges with the norm and activation after it."""
        groups, k, rows = self.values.shape
        each = gcd(rows, self.out_channels)  # so that the last group is full
        if each % _BLOCK:
            each = rows
        count, missing = -(-self.out_channels // each), -k % _BLOCK
        if time_in_onnx((k + missing) / images.shape[1], each) < 1:
            values = self.values.unflatten(2, (rows // each, each)).permute(0, 2, 3, 1).flatten(0, 2)
            weight = nn.functional.pad(values[: count * each], (0, missing))
            inputs = nn.functional.pad(self.inputs, (0, missing)).repeat_interleave(rows // each, 0)[:count]
            images = images.index_select(1, inputs.flatten())
        else:  # to select that many channels takes longer than it saves
            dense = self.values.new_zeros(groups, rows, images.shape[1])
            weight = dense.scatter(2, self.inputs[:, None].expand(-1, rows, -1).long(), self.values.mT).flatten(0, 1)
            count = 1
        bias = None if self.bias is None else nn.functional.pad(self.bias, (0, len(weight) - self.out_channels))
        found = nn.functional.conv2d(images, weight[:, :, None, None], bias, self.stride, groups=count)
        return found.narrow(1, 0, self.out_channels) if len(weight) > self.out_channels else found


def _plus(found: Tensor, bias: Tensor) -> Tensor:
    """Add a bias to outputs in place, but not in a program, where that becomes a scatter."""
    return found + bias if torch.compiler.is_compiling() else found.add_(bias)


def _in_program(samples: int) -> bool:
    """Return whether torch records a program, which has to hold for any number of samples: by a trace a tensor."""
    return torch.compiler.is_compiling() or not isinstance(samples, int)


def _in_onnx() -> bool:
    """Return whether the program goes to ONNX Runtime, which is slow at selecting columns and fast at broadcasting."""
    return torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()


def time_in_onnx(read: float, rows: int) -> float:
    """Return the time of groups of rows in ONNX Runtime, relative to that of a dense layer.

    Args:
        read: Which fraction of the inputs each group reads.
        rows: How many rows a group has.

    >>> time_in_onnx(0.125, 16), time_in_onnx(0.3, 16)
    (0.4375, 1.05)
    """
    return read * (1 + _SELECTING / rows)


def part_read(matrix: Tensor, rows: int) -> float:
    """Return which fraction of the inputs, 0 to 1, the group of rows that reads most of them reads.

    >>> part_read(torch.tensor([[0.0, 1.0, 0.0, 0.0], [2.0, 1.0, 0.0, 0.0]]), 2)
    0.5
    """
    groups = (matrix != 0).split(rows)
    return max(float(group.any(0).float().mean()) for group in groups)


def packed(weight: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return which inputs the groups of rows of a matrix read (int32), and their weights there.

    Groups that read fewer inputs than others get some whose weights are zero.

    >>> inputs, values = packed(torch.tensor([[0.0, 1.0], [0.0, 2.0], [3.0, 0.0]]), 2)
    >>> inputs.tolist(), values.tolist()
    ([[1], [0]], [[[1.0, 2.0]], [[3.0, 0.0]]])
    """
    padded = nn.functional.pad(weight, (0, 0, 0, -len(weight) % rows)).unflatten(0, (-1, rows))
    read = (padded != 0).any(1)
    most = max(1, int(read.sum(1).max()))
    # those that are read first, in the order of the inputs
    inputs = read.int().argsort(dim=1, descending=True, stable=True)[:, :most].sort(dim=1).values
    values = padded.gather(2, inputs[:, None].expand(-1, rows, -1)).transpose(1, 2).contiguous()
    return inputs.int(), values
