"""Queries: the single queries of attentions that share keys and values, and which of them are dead."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_prune.models.forward import Inputs
from lightning_prune.models.parameters import named_parameters
from lightning_prune.structure.cut_record import CutRecord
from lightning_prune.structure.equivalence import equivalent_cuts
from lightning_prune.structure.groups import Graph, Group, Member
from lightning_prune.structure.surgery import Decision, cut, dead_units, kept_by

_ALONE = "each of its queries has keys and values of its own: use Head() without queries=True"
_UNKNOWN = "its queries cannot be told from its keys and values: use Head() without queries=True"


def by_query(graph: Graph) -> Graph:
    """Return a graph with single queries in the place of heads of keys and values with their queries.

    >>> by_query(Graph(())).groups
    ()
    """
    groups, left_out, attentions = list[Group](), dict[str, str](), dict(graph.attentions)
    for group in graph.groups:
        found = _single(group) if group.owners else None
        if isinstance(found, Group):
            groups.append(found)
        elif found is not None:
            left_out.update({member.name: found for member in group.role("producer")})
            attentions.update(dict.fromkeys(group.owners, found))
    return Graph(tuple(groups), left_out, attentions)


def _single(group: Group) -> Group | str:
    """Return the single queries of a group of heads, or why there are none.

    Where all queries have the same keys and values, the heads of the group are single queries already.
    """
    widths = {key: sum(member.index.shape[1] for member in group.role(key)) for key in ("producer", "consumer")}
    read, shared = widths["consumer"], widths["producer"] - widths["consumer"]
    if shared == 0:
        return group
    if shared < 0 or shared % 2 or read % (shared // 2):
        return _UNKNOWN
    each = read // (shared // 2)
    if each == 1:
        return _ALONE
    members = [found for member in group.members if (found := _of_queries(member, read, each)) is not None]
    if not members or members[0].role != "producer":
        return _UNKNOWN
    return replace(group, name=members[0].name, members=tuple(members), parts=group.size)


def _of_queries(member: Member, read: int, each: int) -> Member | None:
    """Return where single queries lie in a parameter, in front of keys and values; None if it has none."""
    width = member.index.shape[1]
    if width < read:
        return None
    return replace(member, index=member.index[:, :read].reshape(len(member.index) * each, read // each))


def cut_queries(models: Sequence[nn.Module], graph: Graph, inputs: Inputs, round_to: int) -> CutRecord:
    """Cut single queries that nothing reads, in place, as many of every head of keys and values, and return the cut.

    Args:
        models: Models with the same parameters, in all of which queries must be dead.
        graph: What the first one consists of.
        inputs: Example inputs.
        round_to: Keep a multiple of this many queries of an attention, where there are enough.
    """
    parameters = [named_parameters(model) for model in models]
    found = [group for group in by_query(graph).groups if group.parts > 1]
    decisions = [(group, _evenly(~dead_units(parameters, group.role("consumer")), group, round_to)) for group in found]
    decisions = [decision for decision in decisions if not decision[1].all()]
    for model in models:
        decisions = equivalent_cuts(model, decisions, inputs) if decisions else []
    return _cut_all(models, decisions)


def _cut_all(models: Sequence[nn.Module], decisions: Sequence[Decision]) -> CutRecord:
    kept = kept_by(models[0], decisions)
    for model in models if decisions else ():
        cut(model, kept)
    return kept


def _evenly(alive: Tensor, group: Group, round_to: int) -> Tensor:
    """Return which units are kept if all parts of a group keep as many: those that are alive, and the first others."""
    parts = alive.view(group.parts, -1)
    most, size = max(1, int(parts.sum(1).max())), parts.shape[1]
    count = next((count for count in range(most, size) if count * group.parts % round_to == 0), size)
    first = (~parts).int().argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(parts).scatter_(1, first, True).view(-1)
