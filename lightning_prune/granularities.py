"""Granularities: which weights form a unit, so that they are scored and pruned together."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override


class Granularity:
    """How the entries of a weight form units.

    ``pool`` and ``expand`` are inverse to each other in this sense: expanding the decision on pooled units
    gives a mask of the weight's shape. ``dim`` is always the dimension of the output channels.

    Attributes:
        spans: Whether a unit may lie on several ranks; its scores are then summed and held whole on each.
        follows: Whether bias and norm entries of the same channel share the fate of a unit.
    """

    spans: ClassVar[bool] = True
    follows: ClassVar[bool] = False

    def pool(self, values: Tensor, dim: int) -> Tensor:
        """Return the sum of the values over each unit."""
        raise NotImplementedError

    def expand(self, keep: Tensor, shape: torch.Size, dim: int) -> Tensor:
        """Return the mask, of that shape, of a decision on units (bool, True = kept); it may be a view."""
        raise NotImplementedError

    def count(self, shape: torch.Size, dim: int) -> int:
        """Return the number of units of a weight of that shape."""
        raise NotImplementedError


@dataclass(frozen=True)
class Weight(Granularity):
    """Every weight is a unit of its own.

    >>> Weight().count(torch.Size([4, 3]), 0)
    12
    """

    spans: ClassVar[bool] = False

    @override
    def pool(self, values: Tensor, dim: int) -> Tensor:
        return values

    @override
    def expand(self, keep: Tensor, shape: torch.Size, dim: int) -> Tensor:
        return keep.view(shape)

    @override
    def count(self, shape: torch.Size, dim: int) -> int:
        return math.prod(shape)


@dataclass(frozen=True)
class Channel(Granularity):
    """A unit is a neuron or output channel: its row of weights, its bias entry, the affine entries of its norm.

    >>> Channel().pool(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 0)
    tensor([3., 7.])
    >>> Channel().expand(torch.tensor([True, False]), torch.Size([2, 2]), 0)
    tensor([[ True,  True],
            [False, False]])
    """

    follows: ClassVar[bool] = True

    @override
    def pool(self, values: Tensor, dim: int) -> Tensor:
        return values.sum([d for d in range(values.ndim) if d != dim])

    @override
    def expand(self, keep: Tensor, shape: torch.Size, dim: int) -> Tensor:
        return keep.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)

    @override
    def count(self, shape: torch.Size, dim: int) -> int:
        return shape[dim]
