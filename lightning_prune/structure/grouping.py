"""Grouping: turns what a dependency graph lists into groups of channels, and attentions into groups of heads."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_prune.models.orientation import UntransposedLinear
from lightning_prune.models.parameters import plain_name
from lightning_prune.structure.groups import HEADS, OUTPUTS, Group, Item, Member
from lightning_prune.structure.layer_slices import UnsupportedError, channels_of_units, slices, units_of

ROOTS = (nn.modules.conv._ConvNd, nn.Linear, nn.LSTM, nn.Embedding)  # layers that produce channels
_ACROSS_CHANNELS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


def packed_heads(model: nn.Module) -> list[Group]:
    """Return the heads of every ``nn.MultiheadAttention``, which need no trace.

    >>> packed_heads(nn.MultiheadAttention(8, 2))[0].size
    2
    """
    builder = GroupBuilder(model)
    attentions = [module for module in builder.modules if isinstance(module, nn.MultiheadAttention)]
    return [_packed(attention, builder) for attention in attentions]


def _packed(module: nn.MultiheadAttention, builder: "GroupBuilder") -> Group:
    rows = _by_head(module.embed_dim, module.num_heads)
    three = torch.cat([rows + part * module.embed_dim for part in range(3)], 1)
    separate = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    packed = module.in_proj_weight
    producers = [(weight, rows) for weight in separate] if packed is None else [(packed, three)]
    members = [Member(builder.names[weight], 0, index, "producer") for weight, index in producers]
    if module.in_proj_bias is not None:
        members.append(Member(builder.names[module.in_proj_bias], 0, three, "dependent"))
    for bias in (module.bias_k, module.bias_v):
        if bias is not None:
            members.append(Member(builder.names[bias], 2, rows, "dependent"))
    members.append(Member(builder.names[module.out_proj.weight], 1, rows, "consumer"))
    return _group(members, builder.order, builder.modules[module])


class GroupBuilder:
    """Builds groups from the items of a dependency graph, by the types of the layers."""

    def __init__(self, model: nn.Module, heads: int | None = None) -> None:
        self.heads = heads
        self.modules = {module: plain_name(name) for name, module in model.named_modules()}
        self.names: dict[Tensor, str] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self.names.setdefault(tensor, plain_name(name))
        self.order = {name: position for position, name in enumerate(self.names.values())}
        self.owners = {p: module for module in model.modules() for p in module.parameters(recurse=False)}

    def as_in_model(self, group: Group) -> Group:
        """Return a group as it lies in the model, some of whose layers hold their weight transposed."""
        across = {self.names[m.weight] for m in self.modules if isinstance(m, UntransposedLinear)}
        members = (replace(m, dim=1 - m.dim) if m.name in across else m for m in group.members)
        return replace(group, members=tuple(members))

    def produced(self, items: Iterable[Item]) -> list[str]:
        """Return the weights whose output channels the items are."""
        producers = [m for m, direction, *_ in items if direction != "in" and isinstance(m, ROOTS)]
        weights = (getattr(module, "weight", getattr(module, "weight_ih_l0", None)) for module in producers)
        return [self.names[weight] for weight in weights if weight is not None]

    def group(self, items: Sequence[Item]) -> Group:
        """Return the group that the items describe.

        Raises:
            UnsupportedError: If its units cannot be removed.
        """
        layers = [item for item in items if self._is_layer(item[0])]
        if not any(direction == "in" for _, direction, *_ in layers):
            raise UnsupportedError(OUTPUTS)
        for module, *_ in layers:
            owner = self.owners.get(module) if isinstance(module, nn.Parameter) else module
            if isinstance(owner, _ACROSS_CHANNELS):
                raise UnsupportedError(f"{type(owner).__name__} takes statistics over its channels")
        attention = self._attention(layers)
        if attention is not None:
            return self._heads(*attention)
        units = units_of(layers)
        members: dict[tuple[str, int], Member] = {}
        for module, direction, channels, roots in layers:
            for tensor, dim, index, role in slices(module, direction, channels_of_units(channels, roots, units)):
                if int(index.max()) >= tensor.shape[dim]:
                    raise UnsupportedError(f"they reach {self.names[tensor]} in a way that torch-pruning does not know")
                _add(members, Member(self.names[tensor], dim, index, role))
        return _group(members.values(), self.order)

    def _is_layer(self, module: object) -> bool:
        return module in self.modules or isinstance(module, nn.Parameter)

    def _attention(self, layers: Sequence[Item]) -> tuple[nn.Module, list[nn.Linear], nn.Linear, int] | None:
        """Return the attention, its projections, its output layer and its number of heads, if the layers are one."""
        producers = [module for module, direction, *_ in layers if direction == "out"]
        consumers = [module for module, direction, *_ in layers if direction == "in"]
        if len(consumers) != 1 or not all(isinstance(layer, nn.Linear) for layer in (*producers, *consumers)):
            return None
        parents = {self.modules[layer].rpartition(".")[0] for layer in (*producers, *consumers)}
        parent = next((module for module, name in self.modules.items() if {name} == parents), None)
        stated = [getattr(parent, name) for name in HEADS if isinstance(getattr(parent, name, None), int)]
        heads = stated if self.heads is None else [self.heads]
        is_attention = sum(layer.out_features for layer in producers) == 3 * consumers[0].in_features
        if parent is None or not heads or not is_attention:
            return None
        return parent, sorted(producers, key=list(self.modules).index), consumers[0], heads[0]

    def _heads(self, parent: nn.Module, producers: list[nn.Linear], consumer: nn.Linear, heads: int) -> Group:
        width = consumer.in_features
        if width % heads or any(layer.out_features % width for layer in producers):
            raise UnsupportedError(f"its {width} channels cannot be divided evenly among {heads} heads")
        rows = _by_head(width, heads)
        members: dict[tuple[str, int], Member] = {}
        for layer in producers:
            index = torch.cat([rows + begin for begin in range(0, layer.out_features, width)], 1)
            _add(members, Member(self.names[layer.weight], 0, index, "producer"))
            if layer.bias is not None:
                _add(members, Member(self.names[layer.bias], 0, index, "dependent"))
        _add(members, Member(self.names[consumer.weight], 1, rows, "consumer"))
        return _group(members.values(), self.order, self.modules[parent])


def _group(members: Iterable[Member], order: Mapping[str, int], owner: str | None = None) -> Group:
    ordered = sorted(members, key=lambda member: (member.role != "producer", order[member.name]))
    if ordered[0].role != "producer":
        raise UnsupportedError("no layer produces its channels")
    return Group(ordered[0].name, tuple(ordered), () if owner is None else (owner,))


def _by_head(width: int, heads: int) -> Tensor:
    return torch.arange(width).view(heads, -1)


def _add(members: dict[tuple[str, int], Member], member: Member) -> None:
    """Add a member, joined with the one in the same dimension of the same tensor."""
    old = members.get((member.name, member.dim))
    if old is not None and not old.index.equal(member.index):
        joined = torch.cat([old.index, member.index], 1)
        member = Member(member.name, member.dim, joined, old.role)
    members[member.name, member.dim] = member
