"""Granularities: which weights form a unit, so that they are scored and pruned together."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.validation.arguments import flag, integer
from lightning_prune.validation.instances import instance, settle


class Granularity:
    """How the entries of a weight form units.

    ``pool`` and ``expand`` are inverse to each other in this sense: expanding the decision on pooled units
    gives a mask of the weight's shape. ``dim`` is always the dimension of the output channels.

    Attributes:
        spans: Whether a unit may lie on several ranks; its scores are then summed and held whole on each.
        follows: Whether bias and norm entries of the same channel share the fate of a unit.
        coupled: Whether units follow the dependency graph of the model; None: where an example input is given.
        round_to: The number of units that stay in a target is a multiple of this, as far as it is pruned.
        crosses: Whether a unit has weights of every output channel, so that scores of these cannot tell units apart.
    """

    spans: ClassVar[bool] = True
    follows: ClassVar[bool] = False
    crosses: ClassVar[bool] = False
    coupled: bool | None = False
    round_to: int = 1

    @property
    def group(self) -> int | None:
        """How many units, that follow each other along the inputs, are compared with one another only; None: all."""
        return None

    @property
    def least(self) -> float:
        """The lowest sparsity, 0 to 1, that this granularity can be asked for."""
        return 0.0

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
class NM(Weight):
    """Of every m weights that follow each other along the inputs at most n are kept: N:M sparsity.

    The sparsity to ask for is ``1 - n / m``. On the way there, and where more is asked for, every group loses as many
    as the others. A last group that is shorter than m is pruned in proportion. The inputs of a convolution are its
    input channels, at each place of the kernel; those of layers that hold their weight transposed are its rows.

    Args:
        n: How many are kept, at least 1.
        m: The size of a group, more than n.

    Raises:
        ValueError: If an argument is out of range.

    Reference: Mishra et al., 2021, "Accelerating Sparse Deep Neural Networks", arXiv:2104.08378.

    >>> NM(2, 4).least
    0.5
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        """Check the arguments."""
        settle(self, n=integer("n", self.n), m=integer("m", self.m))
        if not 1 <= self.n < self.m:
            raise ValueError(f"n must be at least 1 and less than m, got n={self.n} and m={self.m}")

    @property
    @override
    def group(self) -> int:
        return self.m

    @property
    @override
    def least(self) -> float:
        return 1.0 - self.n / self.m


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


@dataclass(frozen=True)
class Channel(Granularity):
    """A unit is a neuron or output channel: its row of weights, its bias entry, the affine entries of its norm.

    Coupled channels are those that can be removed from the model together: rows that are added to each other, and all
    that reads them, die together. Channels that cannot be removed are left out: outputs of the model, and those that
    a LayerNorm, RMSNorm or GroupNorm takes statistics over.

    Args:
        coupled: Whether channels follow the dependency graph of the model. None: if the model has an
            ``example_input_array``, or ``prune`` is given ``example_inputs``. True: otherwise, too, by the first
            training batch; an error where the model cannot be traced.
        minimum: How many coupled channels of a layer stay, at least 1.
        round_to: The number of coupled channels that stay in a layer is a multiple of this, if it is pruned.

    Raises:
        ValueError: If an argument is out of range.

    >>> Channel().pool(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 0)
    tensor([3., 7.])
    >>> Channel().expand(torch.tensor([True, False]), torch.Size([2, 2]), 0)
    tensor([[ True,  True],
            [False, False]])
    """

    follows: ClassVar[bool] = True

    coupled: bool | None = None
    minimum: int = 1
    round_to: int = 1

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.coupled is not None:
            settle(self, coupled=flag("coupled", self.coupled))
        settle(self, minimum=integer("minimum", self.minimum, 1), round_to=integer("round_to", self.round_to, 1))

    @override
    def pool(self, values: Tensor, dim: int) -> Tensor:
        return values.sum([d for d in range(values.ndim) if d != dim])

    @override
    def expand(self, keep: Tensor, shape: torch.Size, dim: int) -> Tensor:
        return keep.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)

    @override
    def count(self, shape: torch.Size, dim: int) -> int:
        return shape[dim]


@dataclass(frozen=True)
class InputChannel(Granularity):
    """A unit is an input channel of one layer: its column of weights. Nothing follows it, and ``shrink`` refuses it.

    Of a grouped convolution a unit is one input channel of every group.

    Reference: He et al., 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", arXiv:1707.06168.

    >>> InputChannel().pool(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 0)
    tensor([4., 6.])
    >>> InputChannel().expand(torch.tensor([True, False]), torch.Size([2, 2]), 0)
    tensor([[ True, False],
            [ True, False]])
    """

    crosses: ClassVar[bool] = True

    @override
    def pool(self, values: Tensor, dim: int) -> Tensor:
        return Channel().pool(values, int(dim == 0))

    @override
    def expand(self, keep: Tensor, shape: torch.Size, dim: int) -> Tensor:
        return Channel().expand(keep, shape, int(dim == 0))

    @override
    def count(self, shape: torch.Size, dim: int) -> int:
        return shape[int(dim == 0)]


@dataclass(frozen=True)
class Head(Granularity):
    """A unit is a head of an attention: its rows in the projections of queries, keys and values, its columns behind.

    Known are ``nn.MultiheadAttention``, and modules with linear layers that project queries, keys and values, apart or
    in one, and an output layer. These need an example input, as coupled channels do. Other weights are not pruned.

    Args:
        heads: The number of heads of the latter; None reads it from an attribute such as ``num_heads`` or ``n_head``.
        minimum: How many heads of an attention stay, at least 1.

    Raises:
        ValueError: If an argument is out of range; later on, if the model has no attention that is known.

    Reference: Michel et al., 2019, "Are Sixteen Heads Really Better than One?", arXiv:1905.10650.

    >>> Head(minimum=2).coupled
    True
    """

    coupled = True

    heads: int | None = None
    minimum: int = 1

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.heads is not None:
            settle(self, heads=integer("heads", self.heads, 1))
        settle(self, minimum=integer("minimum", self.minimum, 1))


def shrinkable(granularity: Granularity) -> Channel | Head:
    """Return a granularity whose units can be taken out of a model: channels are coupled.

    Raises:
        ValueError: If its units are no channels or heads, or channels that must not be coupled.

    >>> shrinkable(Channel()).coupled
    True
    """
    instance("granularity", granularity, Granularity)
    if not isinstance(granularity, Channel | Head) or granularity.coupled is False:
        raise ValueError(
            f"granularity must be Channel() or Head() to shrink the model, got {granularity} with shrink_at_end=True"
        )
    return granularity if isinstance(granularity, Head) else replace(granularity, coupled=True)
