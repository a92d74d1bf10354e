"""Single weights as units, one by one or with a fixed number kept in every group (N:M)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.granularities.base import Granularity
from lightning_prune.models.forward import Inputs
from lightning_prune.models.norms import following_norms, no_norms
from lightning_prune.models.parameters import Target
from lightning_prune.units.scored import Norms
from lightning_prune.units.units import Units, check_target
from lightning_prune.units.weights import WeightUnits
from lightning_prune.validation.arguments import integer
from lightning_prune.validation.instances import settle


@dataclass(frozen=True)
class Weight(Granularity):
    """Every weight is a unit of its own.

    >>> Weight().count(torch.Size([4, 3]), 0)
    12
    """

    single: ClassVar[bool] = True

    @override
    def pool(self, values: Tensor, dim: int) -> Tensor:
        return values

    @override
    def expand(self, keep: Tensor, shape: torch.Size, dim: int) -> Tensor:
        return keep.view(shape)

    @override
    def count(self, shape: torch.Size, dim: int) -> int:
        return math.prod(shape)

    @override
    def units(
        self, target: Target, followers: Mapping[str, nn.Parameter] | None = None, norms: Norms = no_norms
    ) -> Units:
        check_target(target, norms)
        return WeightUnits(target, self.group, norms)

    @override
    def find_units(
        self, found: Sequence[Target], model: nn.Module, inputs: Inputs = None, distributed: bool = False
    ) -> tuple[list[Units], dict[str, str]]:
        norms = cache(partial(following_norms, model))  # traces the model: only if somebody asks
        return [WeightUnits(target, self.group, norms) for target in found], {}


@dataclass(frozen=True)
class NM(Weight):
    """Of every m weights that follow each other along the inputs at most n are kept: N:M sparsity.

    The sparsity to ask for is ``1 - n / m``. On the way there, and where more is asked for, every group loses as many
    as the others. A last group that is shorter than m is pruned in proportion. The inputs of a convolution are its
    input channels, at each place of the kernel; those of layers that hold their weight transposed are its rows. Those
    of experts, (experts, outputs, inputs), are the last dimension, or the second one where they are transposed.

    Args:
        n: How many are kept, at least 1.
        m: The size of a group, more than n.

    Raises:
        ValueError: If an argument is out of range.

    Reference: Mishra et al., 2021, "Accelerating Sparse Deep Neural Networks", arXiv:2104.08378.

    >>> NM(2, 4).least
    0.5
    """

    even = True
    measures: ClassVar[Sequence[str]] = ("units",)

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        """Check the arguments."""
        settle(self, n=integer("n", self.n), m=integer("m", self.m))
        if not 1 <= self.n < self.m:
            raise ValueError(f"n must be at least 1 and less than m, got n={self.n} and m={self.m}")

    @property
    @override
    def group(self) -> int:  # type: ignore[override]
        return self.m

    @property
    @override
    def least(self) -> float:  # type: ignore[override]
        return 1.0 - self.n / self.m
