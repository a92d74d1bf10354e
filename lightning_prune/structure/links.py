"""Links: which indices of which parameters belong to the units of an activation, and the groups that these form."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_prune.structure.following import Place
from lightning_prune.structure.groups import Graph, Group, Member, Role

Key = tuple[str, int]  # a dimension of a tensor
Mixed = tuple[Tensor, str]  # the indices in it that cannot be told apart any more, and why


@dataclass
class Link:
    """The units of one activation that a weight reads.

    Args:
        count: How many units there are.
        size: How many channels of the activation form a unit.
        attention: The attention that they come from, if any.
        units: The unit of every index of a dimension, -1 for none.
        roles: What each of these dimensions is to the units.
    """

    count: int
    size: int
    attention: str | None
    units: dict[Key, Tensor] = field(default_factory=dict)
    roles: dict[Key, Role] = field(default_factory=dict)

    def add(self, place: Place, units: Tensor, length: int, role: Role) -> None:
        """Add the units of channels that lie in a dimension of that length."""
        key = (place.name, place.dim)
        known = self.units.setdefault(key, torch.full((length,), -1))
        index = place.index.cpu()
        known[index] = torch.where(units.cpu() >= 0, units.cpu(), known[index])
        self.roles.setdefault(key, role)


def linked(
    links: Sequence[Link], mixed: Mapping[Key, Sequence[Mixed]], order: Mapping[str, int], matrices: Iterable[str]
) -> Graph:
    """Return the groups of channels and heads that links form, and why other weights have none.

    Args:
        links: What the activations that weights read depend on.
        mixed: Indices that cannot be told apart, by dimension.
        order: The position of every parameter and buffer in the model.
        matrices: The parameters for which a reason is of interest.
    """
    groups: list[Group] = []
    left_out: dict[str, str] = {}
    for joined in _connected(links):
        group, reason = _group(joined, mixed, order)
        if group is not None:
            groups.append(group)
        elif reason:
            keys = {key for link in joined for key, role in link.roles.items() if role == "producer"}
            left_out.update({name: reason for name, _ in keys})
    for name in matrices:
        for key, found in mixed.items():
            if key[0] == name:
                left_out.setdefault(name, found[0][1])
    made = {member.name for group in groups for member in group.role("producer")}
    reasons = {name: reason for name, reason in left_out.items() if name not in made}
    return Graph(tuple(sorted(groups, key=lambda group: order[group.name])), reasons)


def _connected(links: Sequence[Link]) -> list[list[Link]]:
    """Return the links that share a dimension of a tensor, together."""
    parts: list[tuple[set[Key], list[Link]]] = []
    for link in links:
        keys, joined, apart = set(link.units), [link], []
        for part in parts:
            if part[0] & keys:
                keys, joined = keys | part[0], part[1] + joined
            else:
                apart.append(part)
        parts = [*apart, (keys, joined)]
    return [joined for _, joined in parts]


def _group(
    links: Sequence[Link], mixed: Mapping[Key, Sequence[Mixed]], order: Mapping[str, int]
) -> tuple[Group | None, str]:
    """Return the group of units that several links describe, or why there is none."""
    roles: dict[Key, Role] = {}
    for link in links:
        roles.update({key: role for key, role in link.roles.items() if roles.get(key) != "producer"})
    rows = _rows(links)
    reason = _inseparable(rows, roles, mixed)
    if reason:
        return None, reason
    members = [Member(*key, index, roles[key]) for key, index in rows.items()]
    members.sort(key=lambda member: (member.role != "producer", order[member.name], member.dim))
    if members[0].role != "producer":
        return None, "no layer produces its channels"
    owners = dict.fromkeys(link.attention for link in links if link.attention is not None and link.size > 1)
    return Group(members[0].name, tuple(members), tuple(owners)), ""


def _inseparable(rows: Mapping[Key, Tensor], roles: Mapping[Key, Role], mixed: Mapping[Key, Sequence[Mixed]]) -> str:
    """Return why units cannot be removed; "" if they can."""
    if not rows:
        return "its units differ in what belongs to them"
    if len(next(iter(rows.values()))) < 2:
        return "all of its channels form one unit"
    for key, index in rows.items():
        for indices, reason in mixed.get(key, ()) if roles[key] != "consumer" else ():
            if torch.isin(index, indices).any():
                return reason
    return ""


class _Union:
    """Sets of units, each a number of a link and of a unit in it, that are joined where they share an index."""

    def __init__(self) -> None:
        self.parent: dict[tuple[int, int], tuple[int, int]] = {}

    def find(self, unit: tuple[int, int]) -> tuple[int, int]:
        """Return the unit that stands for the set of a unit."""
        while self.parent.setdefault(unit, unit) != unit:
            self.parent[unit] = self.parent[self.parent[unit]]
            unit = self.parent[unit]
        return unit

    def join(self, unit: tuple[int, int], other: tuple[int, int]) -> None:
        """Join the sets of two units."""
        one, two = sorted((self.find(unit), self.find(other)))
        self.parent[two] = one


def _joined(links: Sequence[Link]) -> tuple[_Union, dict[tuple[Key, int], tuple[int, int]]]:
    """Return the units of all links, joined where they share an index, and the first unit that has each index."""
    sets, first = _Union(), dict[tuple[Key, int], tuple[int, int]]()
    known = dict[Key, tuple[int, Tensor]]()
    for number, link in enumerate(links):
        alike = dict[int, set[int]]()  # which units have been joined with those of an earlier link, one by one
        for key, units in link.units.items():
            earlier, same = known.setdefault(key, (number, units))
            if earlier != number and same.equal(units):  # as in all layers of a residual stream
                done = alike.setdefault(earlier, {-1})
                for unit in set(units.tolist()) - done:
                    sets.join((number, unit), (earlier, unit))
                    done.add(unit)
                continue
            for index, unit in enumerate(units.tolist()):
                if unit >= 0:
                    sets.join((number, unit), first.setdefault((key, index), (number, unit)))
    return sets, first


def _rows(links: Sequence[Link]) -> dict[Key, Tensor]:
    """Return the indices of every unit in every dimension, a row a unit; nothing if units differ in their number."""
    sets, first = _joined(links)
    names = {root: place for place, root in enumerate(sorted({sets.find(unit) for unit in list(sets.parent)}))}
    rows: dict[Key, list[list[int]]] = {key: [[] for _ in names] for key in dict.fromkeys(key for key, _ in first)}
    for (key, index), unit in first.items():
        rows[key][names[sets.find(unit)]].append(index)
    if any(len({len(row) for row in found}) != 1 for found in rows.values()):
        return {}
    return {key: torch.tensor([sorted(row) for row in found]) for key, found in rows.items()}
