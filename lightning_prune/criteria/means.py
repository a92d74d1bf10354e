"""Means over what forward passes show: sums and counts for each unit, which add up over batches and ranks."""

import torch
from torch import Tensor

from lightning_prune.models.layer_inputs import wide
from lightning_prune.units.units import Units


def no_sums(units: Units) -> Tensor:
    """Return the sums and the counts of nothing, a row each."""
    device = units.parameter.device
    return torch.zeros(2, units.size, dtype=wide(device), device=device)


def means(units: Units) -> Tensor:
    """Return the mean for each unit, 0 where nothing was seen."""
    assert units.statistic is not None
    total, count = units.statistic
    found: Tensor = total / count.clamp(min=1)
    return found
