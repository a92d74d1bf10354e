"""Groups: units of a model that live and die together, and where each of them lies."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

Role = Literal["producer", "dependent", "consumer"]


HEADS = ("num_heads", "n_heads", "n_head", "nhead", "heads", "num_attention_heads", "h")


WIDTHS = ("all_head_size", "inner_dim", "inner_features", "attn_dim")


@dataclass(frozen=True)
class Member:
    """Where the units of a group lie in one parameter or buffer.

    Args:
        name: Its qualified name.
        dim: The dimension along which they lie.
        index: Their places in it (int64): a row of entries for each unit.
        role: Whether its entries make the unit's output, follow it (bias, norm, statistics), or read it (columns).
    """

    name: str
    dim: int
    index: Tensor
    role: Role


@dataclass(frozen=True)
class Group:
    """Units that can be removed from a model: each with all that dies with it.

    Args:
        name: The first weight that makes the units, by its qualified name.
        members: Where they lie.
        owner: The attention module whose heads they are; None for channels.
    """

    name: str
    members: tuple[Member, ...]
    owner: str | None = None

    @property
    def size(self) -> int:
        """The number of units."""
        return self.members[0].index.shape[0]

    def role(self, role: Role) -> list[Member]:
        """Return the members of one role."""
        return [member for member in self.members if member.role == role]


@dataclass(frozen=True)
class Graph:
    """The groups of a model, and why other weights have none.

    Args:
        groups: Groups of channels and of heads.
        left_out: Weights whose channels cannot be removed, with the reason.
    """

    groups: tuple[Group, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)


Direction = Literal["in", "out", "both"]


Item = tuple[Any, Direction, list[int], list[Any]]
