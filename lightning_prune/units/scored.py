"""Scored units: the units of one target as a criterion sees them."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_prune.tensors.distributed import full_tensor, local, local_shard

Values = Callable[[Tensor], Tensor]
Norms = Callable[..., Mapping[nn.Module, nn.Module]]


@dataclass(eq=False, repr=False)
class ScoredUnits(ABC):
    """The units of one target as a criterion sees them: what of the weight, its gradient and its layer they pool.

    Args:
        name: Qualified name of the parameter to prune.
        parameter: The parameter.
        modules: The modules that own it.
        dim: Dimension of its output channels.
        size: Number of units, on all ranks.
        sharded: Whether ranks hold shards of the parameter.
        find_norms: Finds the norm behind every layer of the model that has one, by ``following_norms``.

    Attributes:
        statistic: What the criterion has observed so far; None before the first observation.
        steps: Number of optimizer steps (or batches) observed.
        module: The one of its modules whose forward pass is observed at this moment.
        grad_scale: What the gradients are multiplied by at this moment (a gradient scaler's factor).
        at: Which rows of the weight these are.
        single: Whether every weight is a unit of its own.
        crosses: Whether a unit has weights of every output channel, so that scores of these cannot tell units apart.
        stacked: Whether the parameter holds the matrices of several experts, so that no row is an output channel.
        label: What kind of units they are, for messages.

    >>> from lightning_prune.granularities import Channel
    >>> from lightning_prune.models.parameters import Target
    >>> weight = nn.Parameter(torch.tensor([[1.0, -2.0], [0.0, 5.0]]))
    >>> units = Channel().units(Target("weight", weight, (nn.Linear(2, 2),)))
    >>> units.mean(torch.abs)
    tensor([1.5000, 2.5000])
    """

    single: ClassVar[bool] = False
    crosses = False
    stacked = False
    label = "single weights"

    name: str
    parameter: nn.Parameter
    modules: tuple[nn.Module, ...]
    dim: int
    size: int
    sharded: bool
    find_norms: Norms
    statistic: Tensor | None = field(default=None, init=False)
    steps: int = field(default=0, init=False)
    module: nn.Module | None = field(default=None, init=False)
    grad_scale: float = field(default=1.0, init=False)
    at = slice(None)

    @abstractmethod
    def weight(self) -> Tensor:
        """Return the local shard of the weight, detached, at least float32; ``grad`` is its unscaled gradient."""

    @abstractmethod
    def sum(self, values: Values) -> Tensor:
        """Return the sum over each unit of what ``values`` gives for the weight, element by element."""

    def mean(self, values: Values) -> Tensor:
        """Return the mean over each unit of what ``values`` gives for the weight, element by element."""
        return self.per_weight(self.sum(values))

    @abstractmethod
    def per_weight(self, total: Tensor) -> Tensor:
        """Return sums over units as means over their weights."""

    @abstractmethod
    def maximum(self, values: Values) -> Tensor:
        """Return the largest, over each unit, of what ``values`` gives for the weight, at least 0."""

    @abstractmethod
    def contribution(self) -> Tensor:
        """Return ``sum p * dL/dp`` over the gate of each unit: minus the first-order change of the loss without it.

        The gate of a channel is what scales it last: factor and shift of the norm that follows its layer, or else its
        row of weights and its bias. The rows in front of a batch norm will not do: the loss does not depend on their
        scale, so their own sum vanishes. Units that are not channels are their own gates.

        Raises:
            ValueError: If a norm that normalises by the batch follows, and has no trainable factors.
        """

    def spread(self, channels: Tensor) -> Tensor:
        """Return one number per output channel as a value for every element of the local shard of the weight."""
        shape = [-1 if d == self.dim else 1 for d in range(self.parameter.ndim)]
        return local_shard(channels.view(shape).expand(self.parameter.shape), self.parameter)

    def index(self) -> Tensor:
        """Return the position (int64), in the full target, of every unit that this rank scores."""
        return torch.arange(self.size, device=self.parameter.device)

    @property
    def channels(self) -> int:
        """The number of output channels of the full weight."""
        return self.parameter.shape[self.dim]

    def norms(self) -> list[nn.Module]:
        """Return the norms over the output channels that follow the weight's layers."""
        found = self.find_norms()
        return list(dict.fromkeys(found[module] for module in self.modules if module in found))

    def outputs(self) -> list[nn.Module]:
        """Return the modules whose output goes into the activation after each of the weight's layers.

        That is the norm, where one follows a layer in front of any activation, and the layer itself elsewhere.
        """
        found = self.find_norms(across=False)
        return [found.get(module, module) for module in self.modules]

    def factors(self) -> Tensor | None:
        """Return the absolute value of the factor that a norm has for each unit; None where no norm has factors."""
        found = [norm.weight for norm in self.norms() if isinstance(norm.weight, nn.Parameter)]
        if not found:
            return None
        factors = full_tensor(local(found[0]), found[0]).abs().to(self.parameter.device)
        return self.mean(lambda weight: self.spread(factors))

    def add(self, values: Tensor) -> Tensor:
        """Add these values to the statistic, in place, and return it."""
        return values.clone() if self.statistic is None else self.statistic.add_(values)

    def parts(self) -> Iterator[Self]:
        """Yield these units in order, a few rows of the weight at a time where that is possible."""
        yield self

    def rows(self, at: slice) -> Self:
        """Return the units of some rows of the weight as units of their own, with their gradients."""
        some = copy.copy(self)
        some.at = at
        some.parameter = nn.Parameter(self.parameter.detach()[at], requires_grad=False)
        some.parameter.grad = None if self.parameter.grad is None else self.parameter.grad[at]
        some.statistic = None if self.statistic is None else self.statistic[at]
        some.size = self.size // len(self.parameter) * len(some.parameter)
        return some

    def full(self, values: Tensor) -> Tensor:
        """Return values of this rank's units as values of all units; all ranks must call it."""
        return values

    def local(self, values: Tensor) -> Tensor:
        """Return values of all units as values of this rank's units."""
        return values
