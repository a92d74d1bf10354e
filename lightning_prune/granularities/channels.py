"""Channels, input channels and attention heads as units."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.granularities.base import Granularity
from lightning_prune.models.forward import Inputs
from lightning_prune.models.parameters import Target
from lightning_prune.units.finding import coupled_units
from lightning_prune.units.units import Units
from lightning_prune.validation.arguments import integer
from lightning_prune.validation.instances import flag, settle
from lightning_prune.validation.warning import warn

FLOOR = 0.1  # of a layer's units, by default; as in PruningBench (Li et al., 2024, arXiv:2406.12315)


@dataclass(frozen=True)
class Channel(Granularity):
    """A unit is a neuron or output channel: its row of weights, its bias entry, the affine entries of its norm.

    Coupled channels are those that can be removed from the model together: rows that are added to each other, and all
    that reads them, die together. Channels that cannot be removed are left out: outputs of the model, and those that
    a LayerNorm, RMSNorm or GroupNorm takes statistics over: for residual streams there is ``ResidualChannel``.

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
    by_head: ClassVar[bool] = False
    queries: ClassVar[bool] = False
    heads: ClassVar[int | None] = None
    default_scope: ClassVar[Literal["global", "local"]] = "local"  # scores of layers are rarely on one scale
    default_min_density: ClassVar[float] = FLOOR

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

    @override
    def find_units(
        self, found: Sequence[Target], model: nn.Module, inputs: Inputs = None, distributed: bool = False
    ) -> tuple[list[Units], dict[str, str]]:
        if self.coupled is False or (self.coupled is None and inputs is None):
            return super().find_units(found, model, inputs, distributed)
        try:
            return coupled_units(found, model, self, inputs, distributed)
        except (ImportError, ValueError) as error:
            if self.coupled:
                raise
            warn(f"channels are pruned without what depends on them: {error}")
            return super().find_units(found, model, inputs, distributed)


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
    default_scope: ClassVar[Literal["global", "local"]] = "local"
    default_min_density: ClassVar[float] = FLOOR

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
    Where several queries share keys and values, a unit is a head of those with all of its queries.

    Args:
        heads: The number of heads of the latter; None finds it by what the output layer reads.
        minimum: How many heads of an attention stay, at least 1.
        queries: Whether a unit is a single query, where several share keys and values: these stay, each with equally
            many queries. Where all queries share one head of keys and values, a unit is a single query anyway.

    Raises:
        ValueError: If an argument is out of range; later on, if the model has no attention that is known, or none whose
            queries share keys and values, with ``queries``.

    Reference: Michel et al., 2019, "Are Sixteen Heads Really Better than One?", arXiv:1905.10650.

    >>> Head(minimum=2).coupled
    True
    """

    coupled = True
    by_head: ClassVar[bool] = True
    default_scope: ClassVar[Literal["global", "local"]] = "local"
    default_min_density: ClassVar[float] = FLOOR

    heads: int | None = None
    minimum: int = 1
    queries: bool = False
    even: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.heads is not None:
            settle(self, heads=integer("heads", self.heads, 1))
        settle(self, minimum=integer("minimum", self.minimum, 1), queries=flag("queries", self.queries))
        settle(self, even=self.queries)

    @override
    def find_units(
        self, found: Sequence[Target], model: nn.Module, inputs: Inputs = None, distributed: bool = False
    ) -> tuple[list[Units], dict[str, str]]:
        return coupled_units(found, model, self, inputs, distributed)
