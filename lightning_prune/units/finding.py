"""Finding units: every target as units of a granularity, on its own or coupled with what depends on it."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Protocol

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_prune.models.forward import Inputs, fitting
from lightning_prune.models.layer_kinds import STACKED, holds_experts, rows_are_gates
from lightning_prune.models.norms import following_norms
from lightning_prune.models.parameters import Target, channel_dim, named_parameters
from lightning_prune.structure.equivalence import removable_groups
from lightning_prune.structure.grouping import packed_heads
from lightning_prune.structure.groups import Graph, Group
from lightning_prune.structure.queries import by_query
from lightning_prune.structure.tracing import trace
from lightning_prune.tensors.distributed import is_sharded, over_ranks
from lightning_prune.units.coupled import CoupledUnits, Coupling, JoinedUnits, RowUnits
from lightning_prune.units.scored import Norms
from lightning_prune.units.units import Units

_NAMED = 5  # layers in a message


class HeadCoupling(Coupling, Protocol):
    """What a granularity says about channels and heads."""

    @property
    def by_head(self) -> bool:
        """Whether a unit is an attention head, and not a channel."""

    @property
    def queries(self) -> bool:
        """Whether a unit is a single query of an attention, and not a head of keys and values with its queries."""

    @property
    def heads(self) -> int | None:
        """The number of heads of every attention, where it is given."""


class MakesUnits(Protocol):
    """What a granularity says about units that do not depend on one another."""

    @property
    def follows(self) -> bool:
        """Whether bias and norm entries of the same channel are pruned with a unit."""

    def units(self, target: Target, followers: Mapping[str, nn.Parameter] | None = None, norms: Norms = ...) -> Units:
        """Return the units of one target."""


def make_units(found: Sequence[Target], model: nn.Module, granularity: MakesUnits) -> list[Units]:
    """Return the units of every target, with the parameters of the model that follow them."""
    norms = cache(partial(following_norms, model))  # traces the model: only if somebody asks
    if not granularity.follows:
        return [granularity.units(target, norms=norms) for target in found]
    names = {parameter: name for name, parameter in named_parameters(model).items()}
    return [granularity.units(target, _followers(target, norms(), names), norms) for target in found]


def _followers(
    target: Target, norms: Mapping[nn.Module, nn.Module], names: Mapping[nn.Parameter, str]
) -> dict[str, nn.Parameter]:
    """Return the trainable parameters with one entry for each output channel: the layer's bias, its norm's affine."""
    attribute = target.name.rpartition(".")[2]
    candidates = []
    for owner in target.modules:
        if "weight" in attribute:
            candidates.append(getattr(owner, attribute.replace("weight", "bias"), None))
        if norm := norms.get(owner):
            candidates += [norm.weight, getattr(norm, "bias", None)]
    length = target.parameter.shape[channel_dim(target)]
    return {
        names[parameter]: parameter
        for parameter in candidates
        if isinstance(parameter, nn.Parameter) and parameter.requires_grad and tuple(parameter.shape) == (length,)
    }


def separate_units(
    found: Sequence[Target], model: nn.Module, granularity: MakesUnits
) -> tuple[list[Units], dict[str, str]]:
    """Return units that do not depend on one another, and the reason for every target without any.

    Raises:
        ValueError: If there are none.
    """
    gated = [t.name for t in found if granularity.follows and rows_are_gates(t.name, t.modules)]
    left_out = dict.fromkeys(gated, "its rows are gates, several to a neuron")
    stacked = [target.name for target in found if holds_experts(target.parameter, target.modules)]
    left_out.update(dict.fromkeys(stacked, STACKED))
    left = [target for target in found if target.name not in left_out]
    if not left:
        why = [f"the rows of {gated[:5]} are gates, several to a neuron"] if gated else []
        why += [f"{stacked[:5]}: {STACKED}"] if stacked else []
        raise ValueError(f"{granularity} must find units to prune, got none: {'; '.join(why)}")
    return make_units(left, model, granularity), left_out


def coupled_units(
    found: Sequence[Target], model: nn.Module, coupling: HeadCoupling, inputs: Inputs, distributed: bool
) -> tuple[list[Units], dict[str, str]]:
    """Return coupled units of the targets, and the reason for every target without any.

    Args:
        found: The targets.
        model: The model that they are of; it is left as it is.
        coupling: The granularity.
        inputs: Example inputs of the model; None if there are none.
        distributed: Whether other ranks look at the same model, perhaps with other inputs.

    Raises:
        ValueError: If the units cannot be coupled.
        ImportError: If torch-pruning is not installed.
    """
    check_whole(model, coupling, "use Channel(coupled=False)")
    inputs = fitting(inputs, model)
    graph = _graph(model, coupling, inputs)
    graph = by_query(graph) if coupling.queries else graph
    targets, parameters = {target.name: target for target in found}, named_parameters(model)
    candidates, reasons = _candidates(graph, coupling, targets, parameters)
    kept = proven(model, candidates, inputs, distributed)
    made = {member.name for group in kept for member in group.role("producer")}
    for group in candidates:
        reason = "the outputs of the model change without some of its units"
        reasons.update({member.name: reason for member in group.role("producer")})
    left_out = {name: reason for name, reason in reasons.items() if name in targets and name not in made}
    if not kept:
        raise ValueError(_nothing_found(coupling, left_out, graph.attentions))
    return units_of_groups(kept, model, targets, coupling, _by_rows), left_out


def _nothing_found(coupling: HeadCoupling, left_out: Mapping[str, str], attentions: Mapping[str, str]) -> str:
    """Return why there are no units, and what can be done."""
    reasons = left_out or (attentions if coupling.by_head else {})
    why = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:_NAMED])
    more = f"; and {len(reasons) - _NAMED} others" if len(reasons) > _NAMED else ""
    if coupling.by_head:
        why = why or f"no attention with {coupling.heads or 'a stated number of'} heads is known"
        instead = "say Head(heads=...) if no module states it, or prune channels by Channel() or ResidualChannel()"
    else:
        instead = "prune single weights (granularity=Weight()), or Channel(coupled=False), which cuts nothing"
    return f"{coupling} must find units to prune, got none ({why}{more}): {instead}"


def check_whole(model: nn.Module, granularity: object, instead: str) -> None:
    """Reject a model whose parameters are not initialised, or sharded, where there is something to do instead."""
    if any(map(is_lazy, model.parameters())):
        raise ValueError(f"{granularity} needs whole parameters, got uninitialised ones: run a batch through the model")
    if any(map(is_sharded, model.parameters())):
        raise ValueError(f"{granularity} needs whole parameters, got sharded ones: {instead}")


def whole_inputs(model: nn.Module, granularity: object, inputs: Inputs) -> Inputs:
    """Return example inputs as the model takes them, for units that lie in many parameters and need both whole."""
    if inputs is None:
        raise ValueError(f"{granularity} needs example inputs: example_input_array, or example_inputs of prune()")
    check_whole(model, granularity, "prune before the model is sharded")
    return fitting(inputs, model)


def _graph(model: nn.Module, coupling: HeadCoupling, inputs: Inputs) -> Graph:
    if inputs is not None:
        return trace(model, inputs, coupling.heads)
    if not coupling.by_head:
        raise ValueError("coupled channels need example inputs: example_input_array, or example_inputs of prune()")
    return Graph(tuple(packed_heads(model)))


def _candidates(
    graph: Graph, coupling: HeadCoupling, targets: Mapping[str, Target], parameters: Mapping[str, nn.Parameter]
) -> tuple[list[Group], dict[str, str]]:
    """Return the groups whose units may be pruned, and why other targets have none."""
    heads = coupling.by_head
    reasons = dict.fromkeys(targets, "no layer is known to make its channels") if not heads else {}
    reasons.update(graph.left_out if coupling.queries or not heads else {})
    candidates = []
    for group in graph.groups:
        reason = _unfit(group, heads, targets, parameters)
        if reason is None and bool(group.owners) == heads:
            candidates.append(group)
        elif reason is not None:
            reasons.update({member.name: reason for member in group.role("producer")})
    return candidates, reasons


def _unfit(
    group: Group, heads: bool, targets: Mapping[str, Target], parameters: Mapping[str, nn.Parameter]
) -> str | None:
    """Return why a group has no units, if there is more to say than that it is no group of heads."""
    if heads and not group.owners:
        return None
    if group.owners and not heads:
        return f"the channels of the attention {group.owners[0]} go by heads: use Head()"
    others = [member.name for member in group.role("producer") if member.name not in targets]
    if others:
        return f"its channels are those of {others[0]} too, which is not among the targets"
    return frozen_part(group, parameters)


def frozen_part(group: Group, parameters: Mapping[str, nn.Parameter]) -> str | None:
    """Return why units cannot be pruned, if a part of them is frozen."""
    fixed = [m.name for m in group.members if m.name in parameters and not parameters[m.name].requires_grad]
    return f"what depends on it is frozen: {fixed[0]}" if fixed else None


def proven(model: nn.Module, groups: Sequence[Group], inputs: Inputs, distributed: bool) -> list[Group]:
    """Return the groups of which units can be removed.

    ``nn.MultiheadAttention`` computes with all of its heads whatever happens, so there is nothing to try.
    """
    known = {group.name for group in packed_heads(model)}
    tried = [group for group in groups if group.name not in known]
    agree = removable_groups(model, tried, inputs) if tried else set()
    votes = torch.tensor([int(group.name in agree or group.name in known) for group in groups])
    votes = over_ranks(votes, "min") if distributed else votes
    return [group for group, vote in zip(groups, votes.tolist(), strict=True) if vote]


def units_of_groups(
    groups: Sequence[Group],
    model: nn.Module,
    targets: Mapping[str, Target],
    coupling: Coupling,
    kind: Callable[[Group], type[CoupledUnits]] = lambda _: JoinedUnits,
) -> list[Units]:
    """Return the units of groups, each named after the first of its producers that is a target.

    Args:
        groups: Where they lie.
        model: The model that they are of.
        targets: The targets, by name.
        coupling: Says how many units have to stay.
        kind: Of the units of a group.
    """
    parameters, norms = named_parameters(model), cache(partial(following_norms, model))
    owners = {own: module for module in model.modules() for own in module.parameters(recurse=False)}
    units = list[Units]()
    for group in groups:
        first = next(targets[member.name] for member in group.role("producer") if member.name in targets)
        units.append(kind(group)(first, group, parameters, coupling, list(targets), norms, owners))
    return units


def _by_rows(group: Group) -> type[CoupledUnits]:
    """Return the kind of units of a group: rows, where one layer produces a unit with one of them."""
    return RowUnits if [member.index.shape[1] for member in group.role("producer")] == [1] else JoinedUnits
