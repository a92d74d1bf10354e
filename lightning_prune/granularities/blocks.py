"""Blocks as units."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.granularities.base import Granularity
from lightning_prune.validation.arguments import integer
from lightning_prune.validation.instances import settle


@dataclass(frozen=True)
class Block(Granularity):
    """A unit is a block of the weight as a matrix (output channels, all the rest); blocks at its edges may be smaller.

    Args:
        height: Output channels in a block.
        width: Inputs in a block; of a convolution, places of the kernel count as inputs.

    Raises:
        ValueError: If an argument is smaller than 1.

    >>> Block(2, 2).pool(torch.arange(12.0).view(3, 4), 0)
    tensor([10., 18., 17., 21.])
    >>> Block(2, 3).expand(torch.tensor([True, False]), torch.Size([2, 4]), 0)
    tensor([[ True,  True,  True, False],
            [ True,  True,  True, False]])
    """

    measures: ClassVar[Sequence[str]] = ("units",)

    height: int = 4
    width: int = 4

    def __post_init__(self) -> None:
        """Check the arguments."""
        settle(self, height=integer("height", self.height, 1), width=integer("width", self.width, 1))

    @override
    def pool(self, values: Tensor, dim: int) -> Tensor:
        rows = values.movedim(dim, 0).flatten(1)
        height, width = (min(most, size) for most, size in zip((self.height, self.width), rows.shape, strict=True))
        padded = nn.functional.pad(rows, (0, -rows.shape[1] % width, 0, -rows.shape[0] % height))
        pooled: Tensor = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)).sum((1, 3)).view(-1)
        return pooled

    @override
    def expand(self, keep: Tensor, shape: torch.Size, dim: int) -> Tensor:
        down, across = self._grid(shape, dim)
        moved = [shape[dim], *(size for d, size in enumerate(shape) if d != dim)]
        height, width = min(self.height, moved[0]), min(self.width, math.prod(moved[1:]))
        whole = keep.view(down, across).repeat_interleave(height, 0).repeat_interleave(width, 1)
        return whole[: moved[0], : math.prod(moved[1:])].reshape(moved).movedim(0, dim)

    @override
    def count(self, shape: torch.Size, dim: int) -> int:
        return math.prod(self._grid(shape, dim))

    def _grid(self, shape: torch.Size, dim: int) -> tuple[int, int]:
        """Return the number of blocks down and across."""
        return -(-shape[dim] // self.height), -(-(shape.numel() // shape[dim]) // self.width)
