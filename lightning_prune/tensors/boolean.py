"""Bool tensors: fast counting, searching and comparing, where PyTorch's own operations are not vectorised."""

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = 1 << 18  # elements: temporaries of this size stay in the cache, and the allocator reuses them
_CHUNK_GPU = 1 << 24  # kernel launches dominate on a GPU


def slices(size: int, device: torch.device, step: int = 1) -> Iterator[slice]:
    """Yield the slices, at least one, that cover every ``step``-th of ``size`` elements chunk by chunk."""
    length = step * (_CHUNK if device.type == "cpu" else _CHUNK_GPU)
    return (slice(begin, min(size, begin + length), step) for begin in range(0, max(1, size), length))


def chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the elements of a tensor in flat order, in cache-sized chunks; views if it is contiguous."""
    flat = tensor.reshape(-1)
    return (flat[part] for part in slices(flat.numel(), flat.device))


def count(flags: Tensor) -> int:
    """Return how many elements are True: ``int(flags.sum())``, without widening each to an int64.

    >>> count(torch.tensor([True, False, True]))
    2
    """
    flat = flags.reshape(-1).view(torch.uint8)
    rows = 128  # a sum of 128 ones fits into a byte
    even = flat.numel() // rows * rows
    columns = flat[:even].view(rows, -1).sum(0, dtype=torch.uint8)
    return int(columns.sum() + flat[even:].sum())


def places(flags: Tensor) -> Tensor:
    """Return the indices of the few True elements of a contiguous vector: ``flags.nonzero()``, eight at a time.

    >>> places(torch.tensor([False, True, False, True])).tolist()
    [1, 3]
    """
    size = flags.numel() // 8 * 8
    words = flags[:size].view(torch.int64).nonzero()
    near = (words * 8 + torch.arange(8, device=flags.device)).view(-1)
    near = torch.cat([near, torch.arange(size, flags.numel(), device=flags.device)])
    return near[flags[near]]


def exceeds(values: Tensor, bound: int, out: Tensor) -> Tensor:
    """Write to ``out`` (bool) which values exceed a bound; a comparison that outputs bools is not vectorised.

    >>> exceeds(torch.tensor([1, 2, 3]), 2, torch.empty(3, dtype=torch.bool))
    tensor([False, False,  True])
    """
    return out.copy_(torch.gt(values, bound, out=torch.empty_like(values)))
