"""Shared fan-in: rows in groups that read the same inputs, which runs as dense products of smaller matrices."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.granularities.base import Granularity
from lightning_prune.granularities.blocks import Block
from lightning_prune.validation.arguments import integer
from lightning_prune.validation.instances import settle


@dataclass(frozen=True)
class SharedFanIn(Granularity):
    """Rows in groups: the rows of a group keep the same inputs, and every group of a layer keeps as many.

    A unit is one input of one group: the weights that connect it with the rows of the group. Each group is then a small
    dense matrix behind a selection of inputs, which ``to_fast`` turns into speed without a special kernel. The number
    of inputs that a group keeps is a whole one, at least 1: a layer with n inputs has the sparsity that it is asked for
    to within 1 / (2 n). A last group of fewer rows keeps as many inputs as the others. The inputs of a convolution are
    its input channels, at each place of the kernel.

    Args:
        rows: Output channels in a group; 1 is a constant fan-in for every row.

    Raises:
        ValueError: If ``rows`` is smaller than 1.

    Reference: Tan et al., 2022, "Accelerating Sparse Convolution with Column Vector-Wise Sparsity", NeurIPS; Lasby et
    al., 2023, "Dynamic Sparse Training with Structured Sparsity", arXiv:2305.02299 (one row).

    >>> import lightning_prune
    >>> layer = torch.nn.Linear(8, 4, bias=False)
    >>> masks = lightning_prune.prune(layer, 0.75, granularity=SharedFanIn(rows=2))
    >>> [int(row.sum()) for row in masks["weight"]], bool((masks["weight"][0] == masks["weight"][1]).all())
    ([2, 2, 2, 2], True)
    """

    measures: ClassVar[Sequence[str]] = ("units", "latency")  # as to_fast runs it
    even = True

    rows: int = 16

    def __post_init__(self) -> None:
        """Check the argument."""
        settle(self, rows=integer("rows", self.rows, 1))

    @override
    def pool(self, values: Tensor, dim: int) -> Tensor:
        return Block(self.rows, 1).pool(values, dim)

    @override
    def expand(self, keep: Tensor, shape: torch.Size, dim: int) -> Tensor:
        return Block(self.rows, 1).expand(keep, shape, dim)

    @override
    def count(self, shape: torch.Size, dim: int) -> int:
        return math.prod(shape) // shape[dim] * self.groups(shape, dim)

    @override
    def groups(self, shape: torch.Size, dim: int) -> int:
        return -(-shape[dim] // self.rows)
