"""Expert groups: the experts of a layer as units that can be taken out, each with its row of the router."""

from collections.abc import Collection

import torch
from torch import nn

from lightning_prune.models.experts import ExpertLayer, expert_layers
from lightning_prune.structure.groups import Graph, Group, Member, Role


def expert_groups(model: nn.Module) -> list[Group]:
    """Return the experts of each layer that has several, as far as tokens can do without some of them."""
    return [_group(layer) for layer in expert_layers(model) if layer.count > layer.least]


def expert_graph(model: nn.Module, routers: Collection[str]) -> Graph:
    """Return the experts of the layers with these routers, by the names of their weights."""
    return Graph(tuple(group for group in expert_groups(model) if group.router in routers))


def _group(layer: ExpertLayer) -> Group:
    index = torch.arange(layer.count)[:, None]
    members = []
    for name, owner in ((layer.name, layer.experts), (layer.router_name, layer.router)):
        for own, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
            if tensor.shape[:1] == (layer.count,):
                role: Role = "producer" if tensor.ndim == 3 else "dependent"
                members.append(Member(f"{name}.{own}", 0, index, role))
    members.sort(key=lambda member: member.role != "producer")
    router = f"{layer.router_name}.weight"
    return Group(members[0].name, tuple(members), router=router, least=layer.least, parts=layer.groups)
