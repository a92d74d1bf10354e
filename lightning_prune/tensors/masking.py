"""Zeroing: masks take effect on tensors, at the speed of memory."""

from collections.abc import Iterable

import torch
from torch import Tensor

_PIECE = 1 << 17  # entries
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def zero_pruned(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Zero the pruned entries of tensors in place, at nearly the speed of a copy and one byte a weight.

    A mask has the shape of its tensor, or one that is broadcast to it, as ``by_row`` gives.
    The bits of a number are multiplied, as an integer, so that minus zero, NaN and infinity become zero, too.

    >>> values = torch.tensor([1.0, -2.0, float("nan")])
    >>> zero_pruned([(values, torch.tensor([True, False, False]))])
    >>> values.tolist()
    [1.0, 0.0, 0.0]
    """
    bits: list[Tensor] = []
    keep: list[Tensor] = []
    for tensor, mask in pairs:
        both = tensor.view(INTEGERS[tensor.element_size()]), mask
        # on the CPU a mask is first converted to the type of the weights: in pieces, which stay in the cache
        pieces = tensor.device.type == "cpu" and tensor.is_contiguous() and mask.is_contiguous()
        for found, part in zip((bits, keep), both, strict=True):
            found.extend(part.view(-1).split(_PIECE) if pieces and mask.shape == tensor.shape else [part])
    if bits:
        # backwards: the cache still has what the optimizer wrote last, and then has what the next forward reads first
        torch._foreach_mul_(bits[::-1], keep[::-1])


def by_row(mask: Tensor) -> Tensor:
    """Return a mask as one entry for each row, if all entries of each agree, otherwise as it is.

    So the mask of whole channels is applied at the speed of a pass over the weights alone.

    >>> by_row(torch.tensor([[True, True], [False, False]])).tolist()
    [[True], [False]]
    """
    if mask.ndim < 2 or not mask.numel():
        return mask
    rows = mask.reshape(len(mask), -1)
    first = rows[:, :1]
    if (rows[:, :2] != first).any() or (rows != first).any():  # two columns tell most of the others, at no cost
        return mask
    return first.reshape(-1, *[1] * (mask.ndim - 1)).contiguous()
