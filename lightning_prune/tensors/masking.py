"""Masking: zeroes the pruned elements of tensors, at the speed of memory."""

from collections.abc import Iterable

import torch
from torch import Tensor

_CHUNK = 1 << 17  # elements
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def zero_pruned(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Zero the pruned elements of tensors in place, nearly as fast as a copy and with one byte a weight.

    A mask has the shape of its tensor or is broadcast to it, as the one that ``by_row`` returns. The bits are
    multiplied as integers, so that minus zero, NaN and infinity become zero as well.

    >>> values = torch.tensor([1.0, -2.0, float("nan")])
    >>> zero_pruned([(values, torch.tensor([True, False, False]))])
    >>> values.tolist()
    [1.0, 0.0, 0.0]
    """
    bits: list[Tensor] = []
    keep: list[Tensor] = []
    for tensor, mask in pairs:
        both = tensor.view(INTEGERS[tensor.element_size()]), mask
        # on the CPU the mask is first converted to the type of the weights: in chunks that stay in the cache
        chunked = tensor.device.type == "cpu" and tensor.is_contiguous() and mask.is_contiguous()
        for found, part in zip((bits, keep), both, strict=True):
            found.extend(part.view(-1).split(_CHUNK) if chunked and mask.shape == tensor.shape else [part])
    if bits:
        # in reverse: the cache still holds what the optimizer wrote last, and then what the next forward reads first
        torch._foreach_mul_(bits[::-1], keep[::-1])


def by_row(mask: Tensor) -> Tensor:
    """Return a mask with one element a row if every row is uniform, otherwise as it is.

    A mask of whole channels is then applied without reading a mask element for each weight.

    >>> by_row(torch.tensor([[True, True], [False, False]])).tolist()
    [[True], [False]]
    """
    if mask.ndim < 2 or not mask.numel():
        return mask
    rows = mask.reshape(len(mask), -1)
    first = rows[:, :1]
    if (rows[:, :2] != first).any() or (rows != first).any():  # two columns rule out most masks cheaply
        return mask
    return first.reshape(-1, *[1] * (mask.ndim - 1)).contiguous()
