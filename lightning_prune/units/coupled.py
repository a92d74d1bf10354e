"""Coupled units: channels and heads with all that dies with them, wherever in the model it lies."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_prune.granularities import Channel, Granularity, Head
from lightning_prune.models.forward import Inputs, fitting
from lightning_prune.models.layer_kinds import rows_are_gates
from lightning_prune.models.norms import following_norms
from lightning_prune.models.parameters import Target, named_parameters
from lightning_prune.structure.equivalence import removable_groups
from lightning_prune.structure.grouping import packed_heads
from lightning_prune.structure.groups import Graph, Group, Member
from lightning_prune.structure.surgery import unit_weights
from lightning_prune.structure.tracing import trace
from lightning_prune.tensors.distributed import is_sharded, local, over_ranks
from lightning_prune.tensors.selection import Source
from lightning_prune.units.gates import affine_of, among, weight_of, weight_times_gradient
from lightning_prune.units.units import Units, Values, make_units


class CoupledUnits(Units):
    """The units of a group: scored by all weights that make them, pruned with all that follows or reads them.

    To a criterion they look like one weight. Where several layers make the units (a residual stream, queries, keys
    and values), that is a matrix with the entries of all of them, a row a unit. A criterion that watches forward
    passes sees those of the first of these layers.

    Args:
        target: The first weight that makes the units.
        group: Where the units lie.
        parameters: The parameters of the model, by name.
        granularity: Says how many units have to stay.
        counted: The names of the weights whose zeros count as sparsity.
        norms: Finds the norm behind every layer of the model that has one.
        owners: The module of every parameter of the model.
    """

    def __init__(
        self,
        target: Target,
        group: Group,
        parameters: Mapping[str, nn.Parameter],
        granularity: Channel | Head,
        counted: Sequence[str],
        norms: Callable[..., Mapping[nn.Module, nn.Module]],
        owners: Mapping[nn.Parameter, nn.Module],
    ) -> None:
        super().__init__(target, Channel(coupled=False), norms=norms)
        self.size = group.size
        self.group = group
        self._least = min(granularity.minimum, self.size)
        self._round_to = granularity.round_to
        self._members = [(parameters[member.name], member) for member in group.members if member.name in parameters]
        self._makers = [(parameter, member) for parameter, member in self._members if member.role == "producer"]
        self._weights = {m.name: parameter for parameter, m in self._members if m.name in counted}
        self._plain = len(self._makers) == 1 and self._makers[0][1].index.shape[1] == 1
        self._owners = owners

    @property
    @override
    def weights(self) -> dict[str, nn.Parameter]:
        return self._weights

    @override
    def weight(self) -> Tensor:
        if self._plain:
            return super().weight()
        found = [(weight_of(parameter, self.grad_scale), member) for parameter, member in self._makers]
        weight = self._joined(found)
        if any(tensor.grad is not None for tensor, _ in found):
            weight.grad = self._joined([(torch.zeros_like(t) if t.grad is None else t.grad, m) for t, m in found])
        return weight

    @override
    def parts(self) -> Iterator[Units]:
        return super().parts() if self._plain else iter((self,))

    def _joined(self, tensors: Sequence[tuple[Tensor, Member]]) -> Tensor:
        """Return the entries of each unit in several tensors, a row a unit."""
        return torch.cat([unit_weights(tensor, member).to(self.parameter.device) for tensor, member in tensors], 1)

    @override
    def sum(self, values: Values) -> Tensor:
        if self._plain:
            return super().sum(values)
        return self._by_unit(values).sum(1)

    @override
    def maximum(self, values: Values) -> Tensor:
        return super().maximum(values) if self._plain else self._by_unit(values).amax(1)

    @override
    def per_weight(self, total: Tensor) -> Tensor:
        return super().per_weight(total) if self._plain else total / self._width

    @property
    def _width(self) -> int:
        """How many weights make each unit."""
        return sum(parameter.numel() for parameter, _ in self._makers) // self.size

    @override
    def norms(self) -> list[nn.Module]:
        owners = [self._owners.get(parameter) for parameter, member in self._members if member.role == "dependent"]
        return [owner for owner in dict.fromkeys(owners) if isinstance(owner, _NormBase)]

    @override
    def factors(self) -> Tensor | None:
        found = [(p, m) for p, m in self._members if any(p is norm.weight for norm in self.norms())]
        absolute = [(local(parameter).abs(), member) for parameter, member in found]
        return self._joined(absolute).mean(1) if absolute else None

    @override
    def contribution(self) -> Tensor:
        """Return what all layers that make the units contribute together, and all norms that follow on any branch.

        Of layers that a norm follows, their own weights do not count.
        """
        gates = self._gate_members()
        plain = [(p, m) for p, m in gates if m.role == "producer"] if self._plain else []
        found = [self.sum(weight_times_gradient)] if plain else []
        for parameter, member in gates if not plain else gates[1:]:
            values = unit_weights(weight_times_gradient(weight_of(parameter, self.grad_scale)), member)
            found.append(values.sum(1)[self._rows_here].to(self.parameter.device))
        return torch.stack(found).sum(0)

    def _gate_members(self) -> list[tuple[nn.Parameter, Member]]:
        """Return the parameters that the gates lie in, those that make the units first."""
        found, followers = self._norms(), [p for p, member in self._members if member.role == "dependent"]
        layers = {self._owners[parameter] for parameter, _ in self._makers}
        layers = {own for own in layers if own not in found or not affine_of(found[own], followers, self.name)}
        affine = [own for norm in self.norms() for own in affine_of(norm, followers, self.name)]
        gates = [(p, m) for p, m in self._members if m.role != "consumer"]
        return [(p, m) for p, m in gates if self._owners[p] in layers or among(p, affine)]

    def _by_unit(self, values: Values) -> Tensor:
        """Return values of the entries of all layers that make the units, a row a unit."""
        try:
            return values(self.weight()).flatten(1)
        except RuntimeError as error:
            raise ValueError(
                f"the units of {self.name!r} lie in {[member.name for _, member in self._makers]}, entry by entry, and "
                f"the criterion looks for those of the first alone: take another one, or ignore them"
            ) from error

    @override
    def spread(self, channels: Tensor) -> Tensor:
        if self._plain:
            return super().spread(channels)
        return channels[self._makers[0][1].index.to(channels.device)].mean(1, keepdim=True).expand(-1, self._width)

    @property
    @override
    def shares(self) -> dict[tuple[str, int], float]:
        return {(m.name, m.dim): m.index.shape[1] / p.shape[m.dim] for p, m in self._members}

    @property
    @override
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter, member in self._members if member.role != "consumer"]

    @override
    def bound(self, keep: int) -> int:
        return min(self.size, max(self._least, -(-keep // self._round_to) * self._round_to))

    @override
    def compared(self, source: Source, by_row: bool) -> Source:
        return replace(source, compute=partial(self._with_the_best_last, source), raw=source.compute)

    def _with_the_best_last(self, source: Source) -> Tensor:
        """Return the scores, those of the units that have to stay above all others."""
        found = source.compute().clone()
        alive = found if source.kept is None else found.masked_fill(~source.kept, -torch.inf)
        return found.index_fill_(0, alive.topk(self._least).indices, torch.inf)

    @override
    def kept(self, masks: Mapping[str, Tensor]) -> Tensor | None:
        if any(member.name not in masks for _, member in self._makers):
            return None
        alive = [unit_weights(masks[member.name], member).any(1) for _, member in self._makers]
        return torch.stack([part.to(self.parameter.device) for part in alive]).any(0)

    @override
    def masks(self, keep: Tensor) -> dict[str, Tensor]:
        masks: dict[str, Tensor] = {}
        pruned = ~keep.cpu()
        for parameter, member in self._members:
            mask = masks.setdefault(member.name, torch.ones_like(parameter, dtype=torch.bool))
            mask.index_fill_(member.dim, member.index[pruned].flatten().to(mask.device), False)
        return masks


def find_units(
    found: Sequence[Target],
    model: nn.Module,
    granularity: Granularity,
    inputs: Inputs = None,
    several: bool = False,
) -> tuple[list[Units], dict[str, str]]:
    """Return the units of the targets, coupled if the granularity says so, and the reason for every target without any.

    Args:
        found: The targets.
        model: The model that they are of; it is left as it is.
        granularity: How their entries form units.
        inputs: Example inputs of the model; None if there are none.
        several: Whether other ranks look at the same model, perhaps with other inputs.

    Raises:
        ValueError: If the units have to be coupled, and cannot.
        ImportError: If they have to be coupled, and torch-pruning is not installed.
    """
    if granularity.coupled is False or (granularity.coupled is None and inputs is None):
        return _apart(found, model, granularity)
    assert isinstance(granularity, Channel | Head)
    try:
        _check_whole(model, granularity)
        inputs = fitting(inputs, model)
        return _coupled(found, model, granularity, _graph(model, granularity, inputs), inputs, several)
    except (ImportError, ValueError) as error:
        if granularity.coupled is None:
            warnings.warn(f"channels are pruned without what depends on them: {error}", stacklevel=2)
            return _apart(found, model, granularity)
        raise


def _apart(found: Sequence[Target], model: nn.Module, granularity: Granularity) -> tuple[list[Units], dict[str, str]]:
    """Return units that do not depend on one another, and the reason for every target without any."""
    gated = [t.name for t in found if granularity.follows and rows_are_gates(t.name, t.modules)]
    left_out = dict.fromkeys(gated, "its rows are gates, several to a neuron")
    left = [target for target in found if target.name not in left_out]
    if not left:
        raise ValueError(
            f"{granularity} must find units to prune, got none: the rows of {gated[:5]} are gates, several to a neuron"
        )
    return make_units(left, model, granularity), left_out


def _check_whole(model: nn.Module, granularity: Granularity) -> None:
    if any(map(is_lazy, model.parameters())):
        raise ValueError(f"{granularity} needs whole parameters, got uninitialised ones: run a batch through the model")
    if any(map(is_sharded, model.parameters())):
        raise ValueError(f"{granularity} needs whole parameters, got sharded ones: use Channel(coupled=False)")


def _graph(model: nn.Module, granularity: Channel | Head, inputs: Inputs) -> Graph:
    if inputs is not None:
        return trace(model, inputs, granularity.heads if isinstance(granularity, Head) else None)
    if isinstance(granularity, Channel):
        raise ValueError("coupled channels need example inputs: example_input_array, or example_inputs of prune()")
    return Graph(tuple(packed_heads(model)))


def _coupled(
    found: Sequence[Target],
    model: nn.Module,
    granularity: Channel | Head,
    graph: Graph,
    inputs: Inputs,
    several: bool,
) -> tuple[list[Units], dict[str, str]]:
    targets = {target.name: target for target in found}
    parameters = named_parameters(model)
    heads = isinstance(granularity, Head)
    reasons = dict.fromkeys(targets, "no layer is known to make its channels") if not heads else {}
    reasons.update({} if heads else graph.left_out)
    candidates = []
    for group in graph.groups:
        reason = _unfit(group, heads, targets, parameters)
        if reason is None and (group.owner is not None) == heads:
            candidates.append(group)
        elif reason is not None:
            reasons.update({member.name: reason for member in group.role("producer")})
    proven = _proven(model, candidates, inputs, several)
    made = {member.name for group in proven for member in group.role("producer")}
    for group in candidates:
        reason = "the model does not put out the same without some of its units"
        reasons.update({member.name: reason for member in group.role("producer")})
    left_out = {name: reason for name, reason in reasons.items() if name in targets and name not in made}
    if not proven:
        why = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        if isinstance(granularity, Head) and not why:
            why = f"no attention with {granularity.heads or 'a stated number of'} heads is known"
        raise ValueError(f"{granularity} must find units to prune, got none ({why})")
    norms = cache(partial(following_norms, model))
    owners = {own: module for module in model.modules() for own in module.parameters(recurse=False)}
    names = list(targets)
    return [CoupledUnits(targets[g.name], g, parameters, granularity, names, norms, owners) for g in proven], left_out


def _unfit(
    group: Group, heads: bool, targets: Mapping[str, Target], parameters: Mapping[str, nn.Parameter]
) -> str | None:
    """Return why a group has no units, if there is more to say than that it is no group of heads."""
    if heads and group.owner is None:
        return None
    if group.owner is not None and not heads:
        return f"the channels of the attention {group.owner} go by heads: use Head()"
    others = [member.name for member in group.role("producer") if member.name not in targets]
    if others:
        return f"its channels are those of {others[0]} too, which is not among the targets"
    fixed = [m.name for m in group.members if m.name in parameters and not parameters[m.name].requires_grad]
    return f"what depends on it is frozen: {fixed[0]}" if fixed else None


def _proven(model: nn.Module, groups: Sequence[Group], inputs: Inputs, several: bool) -> list[Group]:
    """Return the groups of which units can be removed.

    ``nn.MultiheadAttention`` computes with all of its heads whatever happens, so there is nothing to try.
    """
    known = {group.name for group in packed_heads(model)}
    tried = [group for group in groups if group.name not in known]
    agree = removable_groups(model, tried, inputs) if tried else set()
    votes = torch.tensor([int(group.name in agree or group.name in known) for group in groups])
    votes = over_ranks(votes, "min") if several else votes
    return [group for group, vote in zip(groups, votes.tolist(), strict=True) if vote]
