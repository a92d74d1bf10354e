"""Criteria that need nothing but the weights."""

import math
import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.criteria.criterion import Criterion
from lightning_prune.tensors.boolean import chunks
from lightning_prune.tensors.distributed import full_tensor
from lightning_prune.tensors.ranking import tail_share
from lightning_prune.units.units import Units
from lightning_prune.units.weights import weight_of
from lightning_prune.validation.arguments import integer
from lightning_prune.validation.instances import settle
from lightning_prune.validation.values import scalar, shown


@dataclass(frozen=True)
class Magnitude(Criterion):
    """The magnitude of a weight, ``|w|``; for larger units the mean, or another power mean. Needs nothing.

    Args:
        p: For larger units: 1 for the mean of ``|w|``, 2 for the root mean square, inf for the maximum. Within a layer
            these sort like the p-norms of ``torch.nn.utils.prune.ln_structured``; across layers, unlike norms, they do
            not depend on the size of a unit.

    Raises:
        ValueError: If ``p`` is not one of these.

    Reference: Han et al., 2015, "Learning both Weights and Connections", arXiv:1506.02626; Li et al., 2017, "Pruning
        Filters for Efficient ConvNets", arXiv:1608.08710.

    >>> from lightning_prune import Block, prune
    >>> layer = torch.nn.Linear(4, 1)
    >>> layer.weight.data = torch.tensor([[3.0, 3.0, 0.0, 5.0]])
    >>> prune(layer, 0.5, criterion=Magnitude(math.inf), granularity=Block(1, 2))["weight"].tolist()
    [[False, False, True, True]]
    """

    elementwise: ClassVar[bool] = True

    p: float = 1

    def __post_init__(self) -> None:
        """Check the argument."""
        p = scalar(self.p)
        if isinstance(p, bool) or not isinstance(p, int | float) or p not in (1, 2, math.inf):
            raise ValueError(f"p must be 1, 2 or inf, got {shown(p)}")
        settle(self, p=p)

    @override
    def scores(self, units: Units) -> Tensor:
        if self.p == 1 or units.single:
            return units.mean(torch.abs)
        return units.mean(torch.square).sqrt() if self.p == 2 else units.maximum(torch.abs)


@dataclass(frozen=True)
class Random(Criterion):
    """A pseudo-random number in [0, 1) for each unit, a hash of seed, name and position. Needs nothing.

    All ranks draw the same numbers.

    Args:
        seed: Determines the order.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        """Check the argument."""
        settle(self, seed=integer("seed", self.seed))

    @override
    def scores(self, units: Units) -> Tensor:
        index = units.index()
        salt = zlib.crc32(f"{self.seed}:{units.name}".encode())
        out = torch.empty(index.shape, dtype=torch.float32, device=index.device)
        for part, places in zip(chunks(out), chunks(index), strict=True):
            part.copy_(_hash(places, salt) >> 8).mul_(2.0**-24)
        return out


def _hash(index: Tensor, salt: int) -> Tensor:
    """Mix integers to 32 well-distributed bits with the finalizer of MurmurHash3, in int64 without overflow."""
    mask = 0xFFFFFFFF
    mixed = ((index & mask) * 0x9E3779B1 + (index >> 32) + salt) & mask
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & mask
    return mixed ^ (mixed >> 16)


@dataclass(frozen=True)
class LAMP(Criterion):
    """Layer-adaptive magnitude: ``w**2`` over the sum of all ``w**2`` in the layer that are at least as large.

    With scope="global" it keeps the same weights as ``Magnitude`` with scope="lamp". Sorts each target, and gathers
    sharded ones. Needs nothing.

    Reference: Lee et al., 2021, "Layer-adaptive Sparsity for the Magnitude-based Pruning", arXiv:2010.07611.
    """

    @override
    def scores(self, units: Units) -> Tensor:
        return units.local(tail_share(units.full(units.mean(torch.abs))))


@dataclass(frozen=True)
class FPGM(Criterion):
    """The sum of a filter's distances to all other filters of its layer: the most redundant filters go first.

    All weights of an output channel score alike. Memory grows with the square of a layer's number of channels. Coupled
    units score the mean over their channels in the first layer. Needs nothing.

    Reference: He et al., 2019, "Filter Pruning via Geometric Median", arXiv:1811.00250.
    """

    by_channel: ClassVar[bool] = True

    @override
    def scores(self, units: Units) -> Tensor:
        filters = full_tensor(weight_of(units.parameter), units.parameter).movedim(units.dim, 0).flatten(1)
        distances = torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
        return units.mean(lambda weight: units.spread(distances))


@dataclass(frozen=True)
class BatchNormScale(Criterion):
    """The absolute scale of an output channel in the norm that follows its layer. Needs nothing but the norm.

    All weights of an output channel score alike. Coupled units score the mean over all norms that follow them. Train
    with an L1 penalty on the scales to drive them towards zero, as network slimming does.

    Raises:
        ValueError: At an update, if no norm with scales follows the layer of a target.

    Reference: Liu et al., 2017, "Learning Efficient Convolutional Networks through Network Slimming", arXiv:1708.06519.
    """

    by_channel: ClassVar[bool] = True

    @override
    def cannot_score(self, units: Units) -> str | None:
        return "no norm with scales follows its layer" if units.factors() is None else None

    @override
    def scores(self, units: Units) -> Tensor:
        factors = units.factors()
        if factors is None:
            found = ", ".join(type(norm).__name__ for norm in units.norms()) or "none"
            raise ValueError(
                f"a norm with scales must follow the layer of {units.name!r}, got {found}: ignore the parameter"
            )
        return factors
