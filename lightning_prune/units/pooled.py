"""Pooled units: several weights of one parameter form a unit: a channel, an input channel, a block."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Protocol, final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import Self, override

from lightning_prune.models.norms import no_norms
from lightning_prune.models.parameters import Target, channel_dim
from lightning_prune.tensors.distributed import counts_here, full_tensor, local_shard, over_ranks
from lightning_prune.tensors.ranking import rank_within
from lightning_prune.tensors.sources import Placement
from lightning_prune.units.gates import affine_of, among, weight_times_gradient
from lightning_prune.units.scored import Norms, Values
from lightning_prune.units.units import Units
from lightning_prune.units.weights import by_rows, weight_of
from lightning_prune.validation.instances import by_name


class Pooling(Protocol):
    """What a granularity says about units of several weights; ``dim`` is the dimension of the output channels."""

    @property
    def crosses(self) -> bool:
        """Whether a unit has weights of every output channel."""

    @property
    def follows(self) -> bool:
        """Whether a unit is an output channel, whose bias and norm entries follow it."""

    @property
    def even(self) -> bool:
        """Whether units are compared within groups, all of which lose as many as the others."""

    def pool(self, values: Tensor, dim: int) -> Tensor:
        """Return the sum of the values over each unit."""

    def expand(self, keep: Tensor, shape: torch.Size, dim: int) -> Tensor:
        """Return the values of units as values of weights of that shape; it may be a view."""

    def count(self, shape: torch.Size, dim: int) -> int:
        """Return the number of units of a weight of that shape."""

    def groups(self, shape: torch.Size, dim: int) -> int:
        """Return how many groups the units of a weight of that shape form, each as large, and each to keep as many."""


@final
class PooledUnits(Units):
    """Units of several weights of one parameter.

    Args:
        target: The parameter to prune.
        pooling: Which weights form a unit.
        followers: Parameters with one entry per output channel that are pruned with it (bias, norm), by name.
        norms: Finds the norm behind every layer of the model that has one.
    """

    def __init__(
        self,
        target: Target,
        pooling: Pooling,
        followers: Mapping[str, nn.Parameter] | None = None,
        norms: Norms = no_norms,
    ) -> None:
        dim, sharded = channel_dim(target), isinstance(target.parameter, DTensor)
        size = pooling.count(target.parameter.shape, dim)
        super().__init__(target.name, target.parameter, target.modules, dim, size, sharded, norms)
        self.weights = {target.name: target.parameter}
        self.pooling = pooling
        self.crosses = pooling.crosses
        self.groups = pooling.groups(target.parameter.shape, dim)
        self.even = pooling.even
        self.minimum, self.round_to = (self.groups, self.groups) if self.even else (0, 1)
        self.label = str(pooling)
        self.followers = by_name("followers", {} if followers is None else followers, nn.Parameter)

    @override
    def weight(self) -> Tensor:
        return weight_of(self.parameter, self.grad_scale)

    @override
    def sum(self, values: Values) -> Tensor:
        return self._pool(values(self.weight()))

    @override
    def per_weight(self, total: Tensor) -> Tensor:
        return total if self.size == self.parameter.numel() else total / self.weights_per_unit

    @override
    def maximum(self, values: Values) -> Tensor:
        found = values(self.weight())
        most = found.new_zeros(self.size).scatter_reduce_(0, self._numbers().reshape(-1), found.reshape(-1), "amax")
        return over_ranks(most, "max") if self.sharded else most

    @cached_property
    def weights_per_unit(self) -> Tensor:
        """The number of weights of each unit."""
        one = torch.ones((), device=self.parameter.device).expand(self.parameter.shape)
        return self.pooling.pool(one, self.dim)

    def _numbers(self) -> Tensor:
        """Return for each element of the local shard of the weight which unit it belongs to."""
        number = torch.arange(self.size, device=self.parameter.device)
        return local_shard(self.pooling.expand(number, self.parameter.shape, self.dim), self.parameter)

    def _pool(self, values: Tensor) -> Tensor:
        """Pool the values of the local shard; units that may lie on several ranks are summed, and complete on each."""
        if not self.sharded:
            return self.pooling.pool(values, self.dim)
        total = values.new_zeros(self.size)
        if counts_here(self.parameter):
            total.scatter_add_(0, self._numbers().reshape(-1), values.reshape(-1))
        return over_ranks(total)

    @override
    def contribution(self) -> Tensor:
        gates, behind = self._gates()
        found = [self._of_gate(gate)[self.at] for gate in gates]
        first = found.pop() if behind else self.sum(weight_times_gradient)
        return sum(found, start=first)

    def _gates(self) -> tuple[list[nn.Parameter], bool]:
        """Return parameters with an entry per channel that belong to its gate, and whether a norm has all of it."""
        if not self.pooling.follows:
            return [], False
        found, followers = self.find_norms(), list(self.followers.values())
        norms = [found.get(module) for module in self.modules]
        gates = [affine_of(norm, followers, self.name) if norm else [] for norm in norms]
        owned = [own for norm in norms if norm for own in norm.parameters(recurse=False)]
        behind = bool(gates) and all(gates)
        biases = [] if behind else [follower for follower in followers if not among(follower, owned)]
        return [own for affine in gates for own in affine] + biases, behind

    def _of_gate(self, gate: nn.Parameter) -> Tensor:
        """Return ``p * dL/dp`` of a full parameter, on the device of the weight."""
        found = weight_times_gradient(weight_of(gate, self.grad_scale))
        return full_tensor(found, gate).to(self.parameter.device)

    @override
    def parts(self) -> Iterator[Self]:
        return by_rows(self) if self.pooling.follows and self.dim == 0 else super().parts()

    @override
    def rows(self, at: slice) -> Self:
        some = super().rows(at)
        if some.size < some.parameter.numel():
            some.weights_per_unit = self.weights_per_unit[at]
        return some

    @property
    @override
    def shares(self) -> dict[tuple[str, int], float]:
        return {(self.name, self.dim): 1.0 / self.size, **{(name, 0): 1.0 / self.size for name in self.followers}}

    @property
    @override
    def placement(self) -> Placement:
        return Placement(counts_here(torch.empty(0)))  # the scores of all units are on every rank

    @override
    def ranks(self, by_row: bool) -> bool:
        return self.even

    @override
    def compared(self, scores: Tensor, kept: Tensor | None, by_row: bool) -> Tensor:
        if not self.even:
            return scores
        found = scores if kept is None else scores.masked_fill(~kept, -torch.inf)
        return rank_within(found.view(self.groups, -1), self.size // self.groups).view(-1)

    @override
    def kept(self, masks: Mapping[str, Tensor]) -> Tensor | None:
        mask = masks.get(self.name)
        return None if mask is None else self._pool(mask.float()) > 0

    @override
    def masks(self, keep: Tensor) -> dict[str, Tensor]:
        mask = self.pooling.expand(keep, self.parameter.shape, self.dim)
        masks = {self.name: local_shard(mask, self.parameter).contiguous()}
        for name, follower in self.followers.items():
            masks[name] = local_shard(keep, follower).clone()
        return masks
