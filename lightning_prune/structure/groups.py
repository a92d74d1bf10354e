"""Groups: units of a model that must be removed together, and where each of them lies."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

Role = Literal["producer", "dependent", "consumer"]
Direction = Literal["in", "out", "both"]  # which channels of a layer are removed
Item = tuple[Any, Direction, list[int], list[Any]]  # module, direction, its channels, the channels of the first layer

OUTPUTS = "its channels are outputs of the model"  # why these are in no group

QUERIES = ("num_heads", "n_heads", "n_head", "nhead", "heads", "num_attention_heads", "h")  # how many of them
HEADS = (*QUERIES, "num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv")

WIDTHS = ("all_head_size", "inner_dim", "inner_features", "attn_dim", "split_size")


@dataclass(frozen=True)
class Member:
    """Where the units of a group lie in one parameter or buffer.

    Args:
        name: Its qualified name.
        dim: The dimension along which they lie.
        index: Their indices in it (int64), a row for each unit.
        role: "producer" for weights that compute the units, "dependent" for what goes along with their outputs (bias,
            norm, running statistics), "consumer" for the columns of later weights that read them.
    """

    name: str
    dim: int
    index: Tensor
    role: Role


@dataclass(frozen=True)
class Group:
    """Units that can be removed from a model, each with everything that depends on it.

    Args:
        name: The first weight that produces the units, by its qualified name.
        members: Where they lie.
        owners: The attention modules whose heads they are, several if these are tied; () for channels.
        norms: The weights of the norms that take statistics over the units, if these are a residual stream.
        router: The weight of the router that chooses among the units, if these are experts.
        least: How many units stay at least.
        parts: How many parts the units form, one behind the other, of which equally many have to stay: the queries of
            each head of keys and values, or the groups that a router chooses among first.
    """

    name: str
    members: tuple[Member, ...]
    owners: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    router: str | None = None
    least: int = 1
    parts: int = 1

    @property
    def size(self) -> int:
        """The number of units."""
        return self.members[0].index.shape[0]

    @property
    def compared_by(self) -> tuple[str, ...]:
        """The weights of the norms and routers that see all units together, so that zeros have an effect, too."""
        return self.norms if self.router is None else (*self.norms, self.router)

    def role(self, role: Role) -> list[Member]:
        """Return the members of one role."""
        return [member for member in self.members if member.role == role]


@dataclass(frozen=True)
class Graph:
    """The groups of a model, and why other weights have none.

    Args:
        groups: Groups of channels and of heads.
        left_out: Weights whose channels cannot be removed, with the reason.
        attentions: Attentions whose heads cannot be told apart, with the reason.
    """

    groups: tuple[Group, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    attentions: Mapping[str, str] = field(default_factory=dict)

    def with_streams(self, streams: "Graph") -> "Graph":
        """Return the graph with the groups of another one, that of residual streams or of experts, added."""
        made = {member.name for group in streams.groups for member in group.role("producer")}
        made |= {group.router for group in streams.groups if group.router is not None}
        left_out = {name: reason for name, reason in self.left_out.items() if name not in made}
        return replace(self, groups=(*self.groups, *streams.groups), left_out=left_out)
