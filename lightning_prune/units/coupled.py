"""Coupled units: channels and heads with all that is pruned with them, wherever in the model it lies."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from typing_extensions import Self, override

from lightning_prune.models.parameters import Target, channel_dim
from lightning_prune.structure.groups import Group, Member
from lightning_prune.structure.surgery import unit_weights
from lightning_prune.tensors.distributed import local
from lightning_prune.tensors.ranking import rank_within
from lightning_prune.units.gates import affine_of, among, weight_times_gradient
from lightning_prune.units.scored import Norms, Values
from lightning_prune.units.units import Units
from lightning_prune.units.weights import by_rows, weight_of

Members = Sequence[tuple[nn.Parameter, Member]]


class Coupling(Protocol):
    """What a granularity says about coupled units."""

    @property
    def minimum(self) -> int:
        """How many units of a group stay."""

    @property
    def round_to(self) -> int:
        """The number of units that stay is a multiple of this."""


class CoupledUnits(Units):
    """The units of a group: scored by all weights that produce them, pruned with all that depends on or consumes them.

    To a criterion they look like one weight. A criterion that watches forward passes sees those of the first producer.

    Args:
        target: The first weight that produces the units.
        group: Where the units lie.
        parameters: The parameters of the model, by name.
        coupling: Says how many units have to stay.
        counted: The names of the weights whose zeros count as sparsity.
        norms: Finds the norm behind every layer of the model that has one.
        owners: The module of every parameter of the model.

    Attributes:
        over: The norms that take statistics over the units, by the name of their weight.
    """

    def __init__(
        self,
        target: Target,
        group: Group,
        parameters: Mapping[str, nn.Parameter],
        coupling: Coupling,
        counted: Sequence[str],
        norms: Norms,
        owners: Mapping[nn.Parameter, nn.Module],
    ) -> None:
        dim = channel_dim(target)
        super().__init__(target.name, target.parameter, target.modules, dim, group.size, False, norms)
        self.group = group
        self.members: Members = [(parameters[m.name], m) for m in group.members if m.name in parameters]
        self.producers: Members = [
            (parameter, member) for parameter, member in self.members if member.role == "producer"
        ]
        self.weights = {m.name: parameter for parameter, m in self.members if m.name in counted}
        self._parts, self.even = group.parts, group.parts > 1
        self.minimum = min(-(-max(coupling.minimum, group.least) // group.parts) * group.parts, self.size)
        self.round_to = group.parts if self.even else coupling.round_to
        self.over = {name: owners[parameters[name]] for name in group.norms}
        self._owners = owners

    @property
    @override
    def shares(self) -> dict[tuple[str, int], float]:
        return {(m.name, m.dim): m.index.shape[1] / p.shape[m.dim] for p, m in self.members}

    @override
    def norms(self) -> list[nn.Module]:
        owners = [self._owners.get(parameter) for parameter, member in self.members if member.role == "dependent"]
        return [owner for owner in dict.fromkeys(owners) if isinstance(owner, _NormBase)]

    @override
    def factors(self) -> Tensor | None:
        found = [(p, m) for p, m in self.members if any(p is norm.weight for norm in self.norms())]
        absolute = [(local(parameter).abs(), member) for parameter, member in found]
        return self.joined(absolute).mean(1) if absolute else None

    def joined(self, tensors: Sequence[tuple[Tensor, Member]]) -> Tensor:
        """Return the elements of each unit in several tensors, a row a unit."""
        return torch.cat([unit_weights(tensor, member).to(self.parameter.device) for tensor, member in tensors], 1)

    @override
    def contribution(self) -> Tensor:
        # all layers that produce the units together, and all norms that follow on any branch
        return torch.stack([self.gate_part(parameter, member) for parameter, member in self._gate_members()]).sum(0)

    def gate_part(self, parameter: nn.Parameter, member: Member) -> Tensor:
        """Return what one parameter of the gates contributes to each unit."""
        values = unit_weights(weight_times_gradient(weight_of(parameter, self.grad_scale)), member)
        return values.sum(1).to(self.parameter.device)

    def _gate_members(self) -> Members:
        """Return the parameters that the gates lie in, producers first; those that a norm follows do not count."""
        found, followers = self.find_norms(), [p for p, member in self.members if member.role == "dependent"]
        layers = {self._owners[parameter] for parameter, _ in self.producers}
        layers = {own for own in layers if own not in found or not affine_of(found[own], followers, self.name)}
        affine = [own for norm in self.norms() for own in affine_of(norm, followers, self.name)]
        gates = [(p, m) for p, m in self.members if m.role != "consumer"]
        return [(p, m) for p, m in gates if self._owners[p] in layers or among(p, affine)]

    @override
    def ranks(self, by_row: bool) -> bool:
        return self.even

    @override
    def compared(self, scores: Tensor, kept: Tensor | None, by_row: bool) -> Tensor:
        alive = scores if kept is None else scores.masked_fill(~kept, -torch.inf)
        if self.even:
            return rank_within(alive.view(self._parts, -1), self.size // self._parts).view(-1)
        # those of the units that have to stay are above all others
        return scores.index_fill(0, alive.topk(self.minimum).indices, torch.inf)

    @override
    def kept(self, masks: Mapping[str, Tensor]) -> Tensor | None:
        if any(member.name not in masks for _, member in self.producers):
            return None
        alive = [unit_weights(masks[member.name], member).any(1) for _, member in self.producers]
        return torch.stack([part.to(self.parameter.device) for part in alive]).any(0)

    @override
    def masks(self, keep: Tensor) -> dict[str, Tensor]:
        masks: dict[str, Tensor] = {}
        pruned = ~keep.cpu()
        for parameter, member in self.members:
            mask = masks.setdefault(member.name, torch.ones_like(parameter, dtype=torch.bool))
            mask.index_fill_(member.dim, member.index[pruned].flatten().to(mask.device), False)
        return masks

    @property
    @abstractmethod
    def width(self) -> int:
        """How many weights make each unit."""

    @override
    def per_weight(self, total: Tensor) -> Tensor:
        return total / self.width


@final
class RowUnits(CoupledUnits):
    """Coupled units that one layer produces, a row of its weight for each."""

    @property
    @override
    def width(self) -> int:
        return self.parameter.numel() // self.size

    @override
    def weight(self) -> Tensor:
        return weight_of(self.parameter, self.grad_scale)

    @override
    def sum(self, values: Values) -> Tensor:
        found = values(self.weight())
        return found.sum([d for d in range(found.ndim) if d != self.dim])

    @override
    def maximum(self, values: Values) -> Tensor:
        found = values(self.weight())
        return found.amax([d for d in range(found.ndim) if d != self.dim])

    @override
    def gate_part(self, parameter: nn.Parameter, member: Member) -> Tensor:
        if member.role == "producer":
            return self.sum(weight_times_gradient)
        return super().gate_part(parameter, member)[self.at]

    @override
    def parts(self) -> Iterator[Self]:
        return by_rows(self) if self.dim == 0 else super().parts()


@final
class JoinedUnits(CoupledUnits):
    """Coupled units that several layers produce (a residual stream, heads), or one with several rows for each.

    Their weight is a matrix with the elements of all producers, a row a unit.
    """

    @property
    @override
    def width(self) -> int:
        return sum(parameter.numel() for parameter, _ in self.producers) // self.size

    @override
    def weight(self) -> Tensor:
        found = [(weight_of(parameter, self.grad_scale), member) for parameter, member in self.producers]
        weight = self.joined(found)
        if any(tensor.grad is not None for tensor, _ in found):
            weight.grad = self.joined([(torch.zeros_like(t) if t.grad is None else t.grad, m) for t, m in found])
        return weight

    @override
    def sum(self, values: Values) -> Tensor:
        return self._by_unit(values).sum(1)

    @override
    def maximum(self, values: Values) -> Tensor:
        return self._by_unit(values).amax(1)

    def _by_unit(self, values: Values) -> Tensor:
        """Return values of the elements of all producers, a row a unit."""
        try:
            return values(self.weight()).flatten(1)
        except RuntimeError as error:
            raise ValueError(
                f"the units of {self.name!r} lie in {[member.name for _, member in self.producers]}, and the criterion "
                f"looks at the elements of the first alone: take another criterion, or ignore the parameters"
            ) from error

    @override
    def spread(self, channels: Tensor) -> Tensor:
        index = self.producers[0][1].index.to(channels.device)
        return channels[index].mean(1, keepdim=True).expand(-1, self.width)
