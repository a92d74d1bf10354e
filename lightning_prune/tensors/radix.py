"""Radix selection: the k-th smallest of any number of floats, by counting 16-bit digits."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]

_DIGIT = 16  # bits a pass: 2**16 counters stay in the cache
_SMALL = 1 << 17  # keys: tensors of fewer are put together
_SIGMAS = 4.0  # the range estimated from a random sample misses the k-th smallest once in 16,000 times


def identity(counts: Tensor) -> Tensor:
    """Return the counters as they are: the sum over a single process."""
    return counts


def keys(scores: Tensor, bits: int = 32, kept: Tensor | None = None) -> Tensor:
    """Return signed integers of 32 or 64 bits that sort like the floats (-0.0 equals 0.0).

    Where ``kept`` (bool) is False, the key is the lowest possible, whatever the score.

    >>> keys(torch.tensor([-1.0, -0.0, 0.0, 2.0])).diff().sign().tolist()
    [1, 0, 1]
    """
    floats, integer = (torch.float32, torch.int32) if bits == 32 else (torch.float64, torch.int64)
    most = torch.iinfo(integer).max
    values = scores.to(floats)
    key = values.view(integer)  # the bits of positive floats sort like the floats: nothing to do
    # those of negative floats sort in reverse: flip all bits but the sign (a minimum of 64-bit integers is slow)
    if key.numel() and not bool(values.amin() > 0) and int(key.amin()) < 0:
        key = (values + 0.0).view(integer)
        key.bitwise_xor_(key.bitwise_right_shift(bits - 1).bitwise_and_(most))
    if kept is not None:  # 0 or -1, flipped: the largest or the smallest integer; branch-free
        key = torch.minimum(key, kept.view(torch.int8).sub(1).to(integer).bitwise_xor_(most))
    return key


def _histogram(key: Tensor, shift: int, prefix: int | None) -> Tensor:
    """Count the 16-bit digits at ``shift`` of the keys with this prefix."""
    if prefix is None:
        digits = key.bitwise_right_shift(shift).add_(1 << (_DIGIT - 1))  # signed: the lowest key gets digit 0
    else:
        inside = key[key.bitwise_right_shift(shift + _DIGIT) == prefix]
        digits = inside.bitwise_right_shift_(shift).bitwise_and_((1 << _DIGIT) - 1)
    return torch.bincount(digits, minlength=1 << _DIGIT)


def _together(keys: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the same keys in fewer tensors: adding up 2**16 counters for each of many small ones takes long."""
    small: list[Tensor] = []
    size = 0
    for key in keys:
        if small and (size + key.numel() > _SMALL or key.device != small[0].device):
            yield torch.cat(small)
            small, size = [], 0
        if key.numel() > _SMALL:
            yield key
        else:
            small.append(key.reshape(-1))
            size += key.numel()
    if small:
        yield torch.cat(small) if len(small) > 1 else small[0]


def kth(stream: Callable[[], Iterable[Tensor]], k: int, bits: int, reduce: Reduce = identity) -> tuple[int, int, int]:
    """Return the k-th smallest key, how many of the k smallest equal it, and how many of all keys do.

    Args:
        stream: Returns the keys, any number of integer tensors of any size; called once a pass.
        k: From 1 to the number of keys on all ranks.
        bits: Width of the keys: 32 or 64.
        reduce: Sums a vector of counters over the ranks.

    >>> kth(lambda: [torch.tensor([3, 1], dtype=torch.int32), torch.tensor([1, 1], dtype=torch.int32)], 2, 32)
    (1, 2, 3)
    """
    prefix: int | None = None
    left, present = k, 0
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        total = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        for key in _together(stream()):
            total = total.to(key.device).add_(_histogram(key, shift, prefix))
        counts = reduce(total).cpu()
        below = counts.cumsum(0)
        digit = int(torch.searchsorted(below, left))
        present = int(counts[digit])
        left -= int(below[digit]) - present
        prefix = digit - (1 << (_DIGIT - 1)) if prefix is None else (prefix << _DIGIT) | digit
    assert prefix is not None
    return prefix, left, present


def likely(sample: Sequence[Tensor], share: float, bits: int, reduce: Reduce = identity) -> tuple[int, int]:
    """Return the ends of a range of keys that very likely contains a quantile of all keys.

    Args:
        sample: A random sample of the keys of this rank.
        share: The quantile, in (0, 1].
        bits: Width of the keys: 32 or 64.
        reduce: Sums a vector of counters over the ranks.

    >>> low, high = likely([keys(torch.linspace(0, 1, 1001))], 0.5, 32)
    >>> low < int(keys(torch.tensor([0.5]))) < high
    True
    """
    n = int(reduce(torch.tensor([sum(key.numel() for key in sample)])))
    apart = 1.0 + _SIGMAS * math.sqrt(n * share * (1.0 - share))
    ends = (int(min(n, max(1.0, n * share + way * apart))) for way in (-1, 1))
    low, high = (kth(lambda: sample, end, bits, reduce)[0] for end in ends)
    return low, high
