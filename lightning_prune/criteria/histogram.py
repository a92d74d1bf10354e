"""Histograms whose range grows with the values; exact, and independent of the order and the split of the values.

A histogram is a row: smallest value, largest value, and the count of values in each cell. The width of the cells is a
power of two, 2**e, and the first cell starts at a multiple of a quarter of the row's width; both depend on the smallest
and the largest value alone. When the range grows, whole cells merge, so that the result depends neither on the order of
the values nor on how they are distributed over ranks.
"""

import math

import torch
from torch import Tensor, nn

_CHUNK = 1 << 18  # values at a time, so that temporaries fit into the cache


def empty(rows: int, cells: int, device: torch.device) -> Tensor:
    """Return histograms (rows, 2 + cells) of no values.

    >>> empty(1, 4, torch.device("cpu"))
    tensor([[inf, -inf, 0., 0., 0., 0.]])
    """
    histogram = torch.zeros(rows, 2 + cells, dtype=torch.float32, device=device)
    histogram[:, 0], histogram[:, 1] = math.inf, -math.inf
    return histogram


def count(histogram: Tensor, values: Tensor) -> Tensor:
    """Count values (rows, values) in place, and return the histogram; NaN is ignored.

    >>> count(empty(1, 8, torch.device("cpu")), torch.tensor([[0.0, 1.0, 3.0, math.nan]]))
    tensor([[0., 3., 1., 1., 0., 1., 0., 0., 0., 0.]])
    """
    rows = max(1, _CHUNK // max(1, values.shape[1]))
    for held, part in zip(histogram.split(rows), values.split(rows), strict=True) if values.numel() else ():
        _count(held, part)
    return histogram


def _count(histogram: Tensor, values: Tensor) -> None:
    seen = ~values.isnan()
    low = values.masked_fill(~seen, math.inf).amin(1).minimum(histogram[:, 0])
    high = values.masked_fill(~seen, -math.inf).amax(1).maximum(histogram[:, 1])
    counts = stretch(histogram, low, high)[:, 2:]
    exponent, first = _cells(low, high, counts.shape[1])
    place = (values * _power_of_two(-exponent).float()[:, None]).floor_().sub_(first.float()[:, None])
    place = place.nan_to_num_(0.0).clamp_(0, counts.shape[1] - 1).long()
    counts.scatter_add_(1, place, seen.float())


def stretch(histogram: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Stretch a histogram, in place, to a range that includes its own, and return it.

    >>> held = count(empty(1, 8, torch.device("cpu")), torch.tensor([[0.0, 1.0]]))
    >>> stretch(held, torch.tensor([0.0]), torch.tensor([3.0]))
    tensor([[0., 3., 1., 1., 0., 0., 0., 0., 0., 0.]])
    """
    counts = histogram[:, 2:]
    exponent, first = _cells(low, high, counts.shape[1])
    old_exponent, old_first = _cells(histogram[:, 0], histogram[:, 1], counts.shape[1])
    moved = ((exponent != old_exponent) | (first != old_first)) & (histogram[:, 0] <= histogram[:, 1])
    rows = moved.nonzero().squeeze(1) if _is_on_host(counts) else None
    if rows is None:
        cell = torch.arange(counts.shape[1], device=counts.device)
        place = (old_first[:, None] + cell >> (exponent - old_exponent).clamp_min(0)[:, None]) - first[:, None]
        place = torch.where(moved[:, None], place, cell).clamp_(0, counts.shape[1] - 1)
        counts.copy_(torch.zeros_like(counts).scatter_add_(1, place, counts))
    elif len(rows):  # few rows after the first values, with few occupied cells
        row, cell = counts[rows].nonzero(as_tuple=True)
        row = rows[row]
        found = counts[row, cell]
        counts[rows] = 0.0
        place = (old_first[row] + cell >> (exponent - old_exponent)[row]) - first[row]
        counts.index_put_((row, place), found, accumulate=True)
    histogram[:, 0], histogram[:, 1] = low, high
    return histogram


def _is_on_host(tensor: Tensor) -> bool:
    """Return whether the values can be read without a device synchronisation."""
    return tensor.device.type == "cpu"


def merge(histograms: list[Tensor]) -> Tensor:
    """Return one histogram of the values in all histograms.

    >>> parts = [count(empty(1, 8, torch.device("cpu")), torch.tensor([[value]])) for value in (0.0, 3.0)]
    >>> merge(parts)
    tensor([[0., 3., 1., 0., 0., 1., 0., 0., 0., 0.]])
    """
    ends = torch.stack([histogram[:, :2] for histogram in histograms])
    low, high = ends[..., 0].amin(0), ends[..., 1].amax(0)
    total = stretch(histograms[0].clone(), low, high)
    for other in histograms[1:]:
        total[:, 2:] += stretch(other.clone(), low, high)[:, 2:]
    return total


def bins(histogram: Tensor, number: int) -> Tensor:
    """Return the counts of values in equal bins between the ends of each row; NaN if an end is infinite.

    A cell that straddles two bins counts in the one that contains its midpoint.

    >>> bins(count(empty(1, 64, torch.device("cpu")), torch.tensor([[0.0, 0.5, 0.9, 1.0]])), 2)
    tensor([[1., 3.]])
    """
    low, high, counts = histogram[:, :1].double(), histogram[:, 1:2].double(), histogram[:, 2:]
    exponent, first = _cells(histogram[:, 0], histogram[:, 1], counts.shape[1])
    border = low + (high - low) * torch.arange(1, number, device=counts.device) / number
    place = (border * _power_of_two(-exponent)[:, None] - 0.5).ceil().nan_to_num(0.0, 0.0, 0.0).long() - first[:, None]
    total = nn.functional.pad(counts.cumsum(1), (1, 0))  # counts of the cells before each
    below = total.gather(1, place.clamp_(0, counts.shape[1]))
    found = torch.cat([below, total[:, -1:]], 1).diff(dim=1, prepend=torch.zeros_like(low, dtype=total.dtype))
    return torch.where((high - low).isfinite(), found, torch.nan)


def _cells(low: Tensor, high: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Return e and the number of the first cell of each row, for values between low and high."""
    low, high = low.double().nan_to_num(0.0, 0.0, 0.0), high.double().nan_to_num(0.0, 0.0, 0.0)
    # not finer than float32: cell numbers stay within 2**25, so that float32 arithmetic on them is exact
    finest = (torch.frexp(torch.maximum(low.abs(), high.abs())).exponent - 24).clamp_min(-126)
    fitting = torch.frexp((high - low) / (cells // 2)).exponent  # about half of the row, to stretch seldom
    exponent = torch.where(high > low, torch.maximum(fitting, finest), finest)
    quarter = cells // 4
    return exponent, (low * _power_of_two(-exponent) / quarter).floor().long() * quarter


def _power_of_two(exponent: Tensor) -> Tensor:
    return (exponent.long() + 1023 << 52).view(torch.float64)  # exact, unlike exp2 and ldexp
