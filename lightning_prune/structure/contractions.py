"""Contractions: how operations of torch multiply activations by a weight, and which dimensions hold its channels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_PRODUCTS = ("matmul", "mm", "bmm", "__matmul__", "__rmatmul__", "_grouped_mm", "grouped_mm")
_SHIFTED = ("addmm", "baddbmm")
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
# what only moves, selects or casts elements
_VIEWS = {
    *("t", "transpose", "permute", "movedim", "chunk", "split", "unbind", "__getitem__"),
    *("select", "narrow", "index_select", "to", "float", "double", "contiguous", "view"),
    *("reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "T", "mT"),
    *("detach", "swapaxes", "tensor_split", "type_as"),
}
_ATTENTIONS = frozenset(
    (*_PRODUCTS, *_SHIFTED, "einsum", "scaled_dot_product_attention", "multi_head_attention_forward")
)


@dataclass(frozen=True)
class Contraction:
    """Where an operation has its arguments and the channels that it reads and makes.

    Args:
        weight: The position of the weight among the arguments.
        inputs: The dimension of the weight along which it is multiplied; None if it only looks rows up.
        outputs: The dimension of the weight along which it makes channels.
        made: The dimension of the output with those channels.
        activations: The position of the activations.
        read: The dimension of the activations that is summed over.
        bias: The position of the bias.
    """

    weight: int
    inputs: int | None
    outputs: int
    made: int = -1
    activations: int = 0
    read: int = -1
    bias: int | None = None


def name_of(function: Any) -> str:
    """Return the name of a function of torch; that of the attribute for the reader of an attribute.

    >>> import torch
    >>> name_of(torch.nn.functional.linear), name_of(Tensor.T.__get__)
    ('linear', 'T')
    """
    name: str = getattr(function, "__name__", "")
    return str(getattr(getattr(function, "__self__", None), "__name__", "")) if name == "__get__" else name


def contraction(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], weights: Sequence[int]
) -> Contraction | None:
    """Return how an operation multiplies activations by a weight; None if it does nothing of the kind.

    Args:
        name: The name of the operation.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        weights: The positions of the arguments that are weights.

    >>> import torch
    >>> contraction("linear", [torch.ones(2, 3), torch.ones(4, 3)], {}, [1])
    Contraction(weight=1, inputs=1, outputs=0, made=-1, activations=0, read=-1, bias=2)
    """
    if name == "linear" and 1 in weights:
        return Contraction(1, 1, 0, bias=2)
    if name == "embedding" and 1 in weights:
        return Contraction(1, None, 1)
    if name in _CONVOLUTIONS and 1 in weights:
        return _convolution(args, kwargs)
    first = int(name in _SHIFTED)
    if (name not in _PRODUCTS and not first) or len(args) < first + 2:
        return None
    bias = 0 if first else None
    if first + 1 in weights:
        return Contraction(first + 1, -2, -1, activations=first, bias=bias)
    if first in weights:
        return Contraction(first, -1, -2, made=-2, activations=first + 1, read=-2)
    return None


def _convolution(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Contraction | None:
    groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
    channels = 1 - args[1].ndim  # of the activations, with or without samples
    return Contraction(1, 1, 0, made=channels, read=channels, bias=2) if groups == 1 else None


def is_view(name: str) -> bool:
    """Return whether an operation only moves, selects or casts the elements of a tensor.

    >>> is_view("transpose"), is_view("mul")
    (True, False)
    """
    return name in _VIEWS


def mixes_positions(name: str, operands: Sequence[Tensor]) -> bool:
    """Return whether an operation multiplies activations by each other, as attentions do.

    >>> import torch
    >>> active = torch.ones(2, 2, requires_grad=True)
    >>> mixes_positions("matmul", [active, active]), mixes_positions("matmul", [active])
    (True, False)
    """
    return name in _ATTENTIONS and len(operands) > 1
