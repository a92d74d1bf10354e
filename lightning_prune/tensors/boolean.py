"""Flags: what masks and selections need of bool tensors, at the speed of memory; PyTorch's own goes entry by entry."""

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = 1 << 18  # elements: a few temporaries of this size stay in the cache, and are reused by the allocator
_CHUNK_ELSEWHERE = 1 << 24  # on a GPU the launches count


def slices(size: int, device: torch.device, step: int = 1) -> Iterator[slice]:
    """Yield the pieces, at least one, in which every ``step``-th of so many entries is worked through."""
    length = step * (_CHUNK if device.type == "cpu" else _CHUNK_ELSEWHERE)
    return (slice(begin, min(size, begin + length), step) for begin in range(0, max(1, size), length))


def chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the entries of a tensor in flat order, a cache-sized piece at a time; views where it is contiguous."""
    flat = tensor.reshape(-1)
    return (flat[part] for part in slices(flat.numel(), flat.device))


def count(flags: Tensor) -> int:
    """Return how many entries are True: ``int(flags.sum())``, without a wide copy of each entry.

    >>> count(torch.tensor([True, False, True]))
    2
    """
    flat = flags.reshape(-1).view(torch.uint8)
    rows = 128  # sums of so many ones fit into a byte
    whole = flat.numel() // rows * rows
    columns = flat[:whole].view(rows, -1).sum(0, dtype=torch.uint8)
    return int(columns.sum() + flat[whole:].sum())


def places(flags: Tensor) -> Tensor:
    """Return the positions of the few True entries of a contiguous vector: ``flags.nonzero()``, eight at a time.

    >>> places(torch.tensor([False, True, False, True])).tolist()
    [1, 3]
    """
    size = flags.numel() // 8 * 8
    words = flags[:size].view(torch.int64).nonzero()
    near = (words * 8 + torch.arange(8, device=flags.device)).view(-1)
    near = torch.cat([near, torch.arange(size, flags.numel(), device=flags.device)])
    return near[flags[near]]


def exceeds(values: Tensor, mark: int, out: Tensor) -> Tensor:
    """Write into a bool tensor which values exceed a mark; a comparison that puts out bools is not vectorised.

    >>> exceeds(torch.tensor([1, 2, 3]), 2, torch.empty(3, dtype=torch.bool))
    tensor([False, False,  True])
    """
    return out.copy_(torch.gt(values, mark, out=torch.empty_like(values)))
