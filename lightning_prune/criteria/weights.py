"""Criteria that look at nothing but the weights."""

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.criteria.criterion import Criterion
from lightning_prune.flags import chunks
from lightning_prune.units import Units


@dataclass(frozen=True)
class Magnitude(Criterion):
    """The absolute value of a weight, ``|w|``; of larger units, the mean. Needs nothing.

    Reference: Han et al., 2015, "Learning both Weights and Connections", arXiv:1506.02626.
    """

    entrywise: ClassVar[bool] = True

    @override
    def scores(self, units: Units) -> Tensor:
        return units.mean(torch.abs)


@dataclass(frozen=True)
class Random(Criterion):
    """A number in [0, 1) for each unit, from a hash of seed, name and position: the same on every rank. Needs nothing.

    Args:
        seed: Another seed gives another order.
    """

    seed: int = 0

    @override
    def scores(self, units: Units) -> Tensor:
        index = units.index()
        salt = zlib.crc32(f"{self.seed}:{units.name}".encode())
        out = torch.empty(index.shape, dtype=torch.float32, device=index.device)
        for part, places in zip(chunks(out), chunks(index), strict=True):
            part.copy_(_hash(places, salt) >> 8).mul_(2.0**-24)
        return out


def _hash(index: Tensor, salt: int) -> Tensor:
    """Mix integers to 32 well-distributed bits (the finaliser of MurmurHash3), in int64 without overflow."""
    mask = 0xFFFFFFFF
    mixed = ((index & mask) * 0x9E3779B1 + (index >> 32) + salt) & mask
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & mask
    return mixed ^ (mixed >> 16)
