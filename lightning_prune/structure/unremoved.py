"""Unremoved: dead channels that stay in a model when it is shrunk, and why."""

from collections.abc import Sequence

from torch import nn

from lightning_prune.models.experts import expert_layers
from lightning_prune.models.parameters import plain_name
from lightning_prune.models.sizes import outputs_second
from lightning_prune.structure.groups import Graph
from lightning_prune.structure.surgery import Decision, dead_units, named_tensors
from lightning_prune.validation.warning import warn

_UNROUTED = (
    "experts, but the router chooses among all of them, as in a model that has got the weights of a pruned one alone: "
    "shrink that one, and save what shrink returns"
)


def warn_of_unremoved(model: nn.Module, graph: Graph, done: Sequence[Decision], otherwise: bool) -> None:
    """Warn of dead channels that are not removed, and where nothing is.

    Args:
        model: A copy of the model, with what is cut before channels already gone.
        graph: What it consists of.
        done: What is removed of it.
        otherwise: Whether blocks, queries or experts have been removed.
    """
    tensors = named_tensors(model)
    modules = model.named_modules()  # rows of an embedding are tokens, and may be zero (padding)
    across = {plain_name(f"{n}.weight") for n, m in modules if outputs_second(m)}
    removed = {group.name for group, _ in done}
    remaining = {}
    for group in graph.groups:
        if group.name not in removed and (count := int(dead_units([tensors], group.role("producer")).sum())):
            remaining[group.name] = f"{count} of {group.size}: the outputs of the model differ without them"
    routers = {f"{layer.router_name}.weight" for layer in expert_layers(model)}
    for name, reason in graph.left_out.items():
        reason = _UNROUTED if name in routers else reason
        weight = tensors[name].detach().movedim(1 if name in across else 0, 0)
        if count := int((~weight.flatten(1).any(1)).sum()):
            remaining[name] = f"{count} of {len(weight)}: {reason}"
    if remaining:
        listed = "; ".join(f"{name} ({reason})" for name, reason in remaining.items())
        warn(f"these channels are zero and stay in the model: {listed}")
    elif not done and not otherwise:
        warn(
            "nothing was removed: no channel is all zero; prune with Channel(), Head(), Layer() or ResidualChannel() "
            "first"
        )
