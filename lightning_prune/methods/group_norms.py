"""Group norms: how large each unit is, with all that is pruned with it, and a penalty on that."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.granularities import Granularity
from lightning_prune.models.forward import Inputs
from lightning_prune.models.parameters import Target, named_parameters
from lightning_prune.structure.groups import Member
from lightning_prune.tensors.distributed import full_tensor, local, local_shard
from lightning_prune.training.checks import reject_lbfgs, reject_sparse_gradient
from lightning_prune.units.coupled import CoupledUnits
from lightning_prune.units.pooled import PooledUnits
from lightning_prune.units.units import Units
from lightning_prune.updates.output_neurons import without_outputs


@dataclass(frozen=True)
class CoupledGroups:
    """The units of a group of coupled channels or heads; an element counts for every unit that it is pruned with.

    Args:
        device: Where their numbers are.
        members: Where they lie: a parameter, a dimension of it, and the indices of each unit in it, a row a unit.
    """

    device: torch.device
    members: tuple[tuple[nn.Parameter, int, Tensor], ...]

    def squares(self) -> Tensor:
        """Return the sum of squares of each unit, in at least float32."""
        return torch.stack([self._of(*member) for member in self.members]).sum(0)

    def _of(self, parameter: nn.Parameter, dim: int, index: Tensor) -> Tensor:
        squares, others = _squared(parameter), [d for d in range(parameter.ndim) if d != dim]
        return (squares.sum(others) if others else squares)[index].sum(1).to(self.device)

    def elements(self, values: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield every parameter with the values of its units, in a shape that broadcasts to it; 0 for other elements.

        Args:
            values: One for each unit.
        """
        for parameter, dim, index in self.members:
            along = torch.zeros(parameter.shape[dim], dtype=values.dtype, device=parameter.device)
            along[index.flatten()] = values.to(parameter.device).repeat_interleave(index.shape[1])
            yield parameter, along.view([-1 if d == dim else 1 for d in range(parameter.ndim)])


@dataclass(frozen=True)
class SeparateGroups:
    """The units of one weight, with the entries of bias and norm that follow them; ranks may hold shards.

    Args:
        units: The units.
    """

    units: PooledUnits

    def squares(self) -> Tensor:
        """Return the sum of squares of each unit, in at least float32, over all ranks; a collective of shards."""
        total = self.units.sum(torch.square)
        for follower in self.units.followers.values():
            total = total + full_tensor(_squared(follower), follower).to(total.device)
        return total

    def elements(self, values: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield every parameter with the values of its units, in the shape of its local shard.

        Args:
            values: One for each unit.
        """
        weight = self.units.parameter
        yield weight, local_shard(self.units.pooling.expand(values, weight.shape, self.units.dim), weight)
        for follower in self.units.followers.values():
            yield follower, local_shard(values.to(follower.device), follower)


Groups: TypeAlias = CoupledGroups | SeparateGroups


def find_groups(
    found: Sequence[Target],
    model: nn.Module,
    granularity: Granularity,
    inputs: Inputs,
    distributed: bool,
    without_outputs_of_model: bool,
) -> tuple[list[Groups], dict[nn.Parameter, str]]:
    """Return the units of targets, and the names of the parameters of the model that they are of.

    Args:
        found: The targets.
        model: The model.
        granularity: Says what a unit is.
        inputs: Example inputs of the model; None if there are none.
        distributed: Whether other ranks do the same.
        without_outputs_of_model: Whether neurons that are outputs of the model are left out.
    """
    units = granularity.find_units(found, model, inputs, distributed)[0] if found else []
    if without_outputs_of_model:
        units = without_outputs(units, model, granularity)[0]
    return [groups_of(unit) for unit in units], {p: name for name, p in named_parameters(model).items()}


def groups_of(units: Units) -> Groups:
    """Return the elements of units.

    Raises:
        ValueError: If they are neither channels, heads, nor blocks of one weight.
    """
    if isinstance(units, PooledUnits):
        return SeparateGroups(units)
    if isinstance(units, CoupledUnits):
        return CoupledGroups(units.parameter.device, tuple(_placed(p, member) for p, member in units.members))
    raise ValueError(
        f"granularity must form units of several elements of a weight, such as Channel() or Block(4, 4), got "
        f"{units.label} in {units.name!r}"
    )


def _placed(parameter: nn.Parameter, member: Member) -> tuple[nn.Parameter, int, Tensor]:
    return parameter, member.dim, member.index.to(parameter.device)


def _squared(parameter: nn.Parameter) -> Tensor:
    weight = local(parameter)
    return (weight if weight.dtype == torch.float64 else weight.float()).square()


def pressures(norms: Tensor, growth: float) -> Tensor:
    """Return how hard each unit is pressed: 1 for the largest norm, ``2**growth`` for the smallest, 0 for none.

    Args:
        norms: The norm of each unit of a layer; those that are pruned have 0.
        growth: The exponent.

    Reference: Fang et al., 2023, "DepGraph: Towards Any Structural Pruning", arXiv:2301.12900.

    >>> pressures(torch.tensor([4.0, 2.0, 0.0, 3.0]), 4.0)
    tensor([ 1., 16.,  0.,  4.])
    """
    lowest = torch.where(norms > 0, norms, torch.inf).amin()
    span = (norms.amax() - lowest).clamp_min(torch.finfo(norms.dtype).tiny)  # of equal norms, all are the largest
    return torch.where(norms > 0, torch.exp2(growth * (norms.amax() - norms) / span), 0.0)


@dataclass
class GroupPenalty:
    """The sum of the norms of units, or of half their squares, each times how hard it is pressed.

    Args:
        growth: How much harder small units are pressed than large ones, as an exponent of 2.
        squared: Whether the squares are added.
        groups: The units.
        names: The names of their parameters.

    Attributes:
        value: The penalty when it was last looked at, strength included.
    """

    growth: float
    squared: bool
    groups: Sequence[Groups] = ()
    names: dict[nn.Parameter, str] = field(default_factory=dict)
    value: Tensor | None = None

    @torch.no_grad()
    def add_to_gradients(self, optimizer: Optimizer, strength: float, scale: float = 1.0) -> None:
        """Add the gradient of the penalty to that of every parameter of an optimizer, where there is one.

        Args:
            optimizer: Is about to step.
            strength: Of the penalty.
            scale: What the gradients are multiplied by.

        Raises:
            ValueError: If a gradient is sparse.
        """
        mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for parameter, factor in self._elements(strength):
            gradient = parameter.grad
            if gradient is None or id(parameter) not in mine:
                continue
            reject_sparse_gradient("GroupLasso", self.names[parameter], gradient)
            local(gradient).add_(local(parameter) * factor, alpha=scale)

    @torch.no_grad()
    def shrink(self, optimizer: Optimizer, strength: float) -> None:
        """Take the proximal step of the penalty, for every parameter that an optimizer has just stepped."""
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        for parameter, factor in self._elements(strength):
            if id(parameter) in rates:
                step = rates[id(parameter)] * factor
                local(parameter).mul_(1 / (1 + step) if self.squared else (1 - step).clamp(min=0))

    def _elements(self, strength: float) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield every parameter, and what its elements are multiplied by for the gradient of the penalty."""
        norms = [groups.squares().sqrt() for groups in self.groups]  # all of them before any weight changes
        pressed = [strength * pressures(each, self.growth) for each in norms]
        sizes = [each.square() / 2 for each in norms] if self.squared else norms
        parts = [(force * size).sum() for force, size in zip(pressed, sizes, strict=True)]
        self.value = torch.stack([part.to(parts[0].device) for part in parts]).sum()
        for groups, force, norm in zip(self.groups, pressed, norms, strict=True):
            yield from groups.elements(force if self.squared else torch.where(norm > 0, force / norm, 0.0))


def check_optimizers(optimizers: Sequence[Optimizer], proximal: bool) -> None:
    """Reject optimizers that a penalty outside of the loss does not suit.

    Raises:
        ValueError: If one compares losses, or has no learning rate for a proximal step.
    """
    reject_lbfgs("GroupLasso", optimizers, "step by the gradients alone")
    for optimizer in optimizers:
        if proximal and any("lr" not in group for group in optimizer.param_groups):
            raise ValueError(f"optimizer must have a learning rate 'lr' for proximal=True, got {optimizer}")
