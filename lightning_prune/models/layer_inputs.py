"""Layer inputs: the values that a layer multiplies its weights by."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_prune.models.orientation import is_linear, is_transposed
from lightning_prune.tensors.distributed import local, output_rows

_PROJECTIONS = {"in_proj_weight": (0, 1, 2), "q_proj_weight": (0,), "k_proj_weight": (1,), "v_proj_weight": (2,)}


def is_readable(module: nn.Module) -> bool:
    """Return whether ``windows`` supports the layer: linear layers and convolutions.

    >>> is_readable(nn.Linear(2, 2)), is_readable(nn.LSTM(2, 2))
    (True, False)
    """
    return is_linear(module) or (isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd))


def unreadable(module: nn.Module, name: str) -> str | None:
    """Return why ``squares`` cannot read the input of a layer; None if it can.

    >>> unreadable(nn.LSTM(2, 2), "weight_ih_l0")
    'its layer must be a linear one, a convolution or the input projection of an attention, got LSTM'
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "its layer is never called: the attention around it reads the weight directly"
    projects = isinstance(module, nn.MultiheadAttention) and name.rpartition(".")[2] in _PROJECTIONS
    if projects or isinstance(module, _ConvTransposeNd) or is_readable(module):
        return None
    return (
        f"its layer must be a linear one, a convolution or the input projection of an attention, got "
        f"{type(module).__name__}"
    )


def windows(module: nn.Module, values: Tensor) -> Tensor:
    """Return the windows of its input that a linear layer or convolution multiplies its weights by; a view if unpadded.

    Args:
        module: The layer, with any groups, stride, dilation and padding.
        values: Its input, or an element-wise function of it that maps zero to zero.

    Returns:
        Of shape (samples, *positions, groups, inputs, *kernel): an output is the sum, over inputs and kernel, of a
        window times a row of the weight.

    >>> conv = nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=False)
    >>> image = torch.randn(5, 4, 8, 8)
    >>> seen = windows(conv, image)
    >>> seen.shape
    torch.Size([5, 8, 8, 2, 2, 3, 3])
    >>> rows = conv.weight.view(2, 3, 2, 3, 3)
    >>> out = torch.einsum("nhwgikl,goikl->ngohw", seen, rows).reshape(5, 6, 8, 8)
    >>> torch.allclose(out, conv(image), atol=1e-6)
    True
    """
    if is_linear(module):
        return values.reshape(-1, 1, values.shape[-1])
    assert isinstance(module, _ConvNd)
    spatial = len(module.kernel_size)
    if values.ndim == spatial + 1:
        values = values[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    values = nn.functional.pad(values, module._reversed_padding_repeated_twice, mode=mode)
    for dim, (size, stride, gap) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True), 2):
        values = values.unfold(dim, (size - 1) * gap + 1, stride)[..., ::gap]
    values = values.unflatten(1, (module.groups, -1))  # samples, groups, inputs, positions, kernel
    return values.movedim((1, 2), (spatial + 1, spatial + 2))


def input_of(inputs: tuple[Any, ...], name: str) -> Tensor:
    """Return the input of a layer from the arguments of a forward hook: this rank's shard, at least float32.

    Raises:
        ValueError: If the layer was called without a tensor as its first positional argument.
    """
    if not inputs or not isinstance(inputs[0], Tensor):
        raise ValueError(
            f"the layer of {name!r} must be called with a tensor as its first positional argument, got "
            f"{type(inputs[0]).__name__ if inputs else 'keywords only'}: ignore the parameter"
        )
    values = local(inputs[0])
    return values if values.dtype == torch.float64 else values.float()


def wide(device: torch.device) -> torch.dtype:
    """Return the dtype for sums: float64 if the device has it.

    >>> wide(torch.device("cpu"))
    torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


def squares(module: nn.Module | None, inputs: tuple[Any, ...], weight: Tensor, name: str) -> Tensor:
    """Return the sum of squares over a batch of each input, and the number of values in the sum.

    Args:
        module: The layer: a linear one, a convolution, transposed or not, or multi-head attention.
        inputs: Its positional arguments.
        weight: The weight; if it is sharded, a rank may see a part of the inputs.
        name: The weight's name.

    Returns:
        Of shape (2, groups, ...), for ``per_weight``.

    Raises:
        ValueError: If the layer is of another kind, or was not called with tensors.

    >>> layer = nn.Linear(2, 3)
    >>> squares(layer, (torch.tensor([[1.0, 2.0], [0.0, 2.0]]),), layer.weight, "weight").tolist()
    [[[1.0, 8.0]], [[2.0, 2.0]]]
    """
    attribute = name.rpartition(".")[2]
    if isinstance(module, nn.MultiheadAttention) and attribute in _PROJECTIONS:
        found = [_sum(input_of(inputs[number:], name).square(), 1) for number in _PROJECTIONS[attribute]]
        return torch.stack(found, 1)  # a group of rows each
    if module is not None and _meets_rows(module):
        values = input_of(inputs, name).movedim(1 - weight.ndim, -1).square()
        return _sum(values, 1).view(2, -1, *[1] * (weight.ndim - 1))
    if module is None or not is_readable(module):
        raise ValueError(
            f"the layer of {name!r} must be a linear one, a convolution or an attention's input projection, got "
            f"{type(module).__name__}: ignore the parameter"
        )
    values = input_of(inputs, name).square()
    if isinstance(module, _ConvNd) and values.ndim == weight.ndim:
        # sum over the samples first, so that the windows are those of a single sample
        seen = _sum(windows(module, values.sum(0, keepdim=True, dtype=wide(values.device))), weight.ndim)
        seen[1] *= len(values)
    else:
        seen = _sum(windows(module, values), weight.ndim)
    mine = output_rows(weight, 1)
    if seen.shape[2] == weight.shape[1]:
        return seen
    padded = seen.new_zeros(2, 1, weight.shape[1])
    padded[..., mine] = seen
    return padded


def zero_squares(module: nn.Module, weight: Tensor) -> Tensor:
    """Return what ``squares`` returns for no input at all.

    >>> zero_squares(nn.Conv1d(4, 6, 3, groups=2), torch.zeros(6, 2, 3)).shape
    torch.Size([2, 2, 2, 3])
    """
    if _meets_rows(module):
        shape = [weight.shape[0], *[1] * (weight.ndim - 1)]
    else:
        attention = isinstance(module, nn.MultiheadAttention) and weight is module.in_proj_weight
        shape = [3 if attention else getattr(module, "groups", 1), *weight.shape[1:]]
    return torch.zeros(2, *shape, dtype=wide(weight.device), device=weight.device)


def _meets_rows(module: nn.Module) -> bool:
    """Return whether every row of the weight has one input, which its output channels share."""
    return isinstance(module, _ConvTransposeNd) or is_transposed(module)


def _sum(values: Tensor, ndim: int) -> Tensor:
    """Return the sums over all but the last ``ndim`` dimensions, and the number of values in each."""
    values = values[None]
    total = values.sum(list(range(values.ndim - ndim)), dtype=wide(values.device))
    return torch.stack([total, torch.full_like(total, values.numel() // max(1, total.numel()))])


def per_weight(values: Tensor, shape: torch.Size) -> Tensor:
    """Return values of inputs, of shape (groups, ...), expanded to the weights that are multiplied by them.

    >>> per_weight(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.Size([4, 2])).tolist()
    [[1.0, 2.0], [1.0, 2.0], [3.0, 4.0], [3.0, 4.0]]
    """
    return values.repeat_interleave(shape[0] // len(values), 0).expand(shape)
