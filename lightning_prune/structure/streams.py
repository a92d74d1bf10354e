"""Streams: the residual streams of a model as groups of channels, which norms take statistics over."""

from dataclasses import replace
from functools import partial

from torch import nn

from lightning_prune.models.forward import Inputs
from lightning_prune.models.kept_norms import norms_by_weight
from lightning_prune.structure.channel_flow import ChannelFlow
from lightning_prune.structure.groups import Graph, Group
from lightning_prune.structure.tracing import of_copy, order_of
from lightning_prune.validation.values import shown


def find_streams(model: nn.Module, inputs: Inputs) -> Graph:
    """Return the residual streams of a model: channels that several layers add up to, and that norms run over.

    The model is left as it is.

    Args:
        model: Any module whose outputs depend on its parameters by autograd.
        inputs: Example inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.

    Raises:
        ValueError: If the model cannot be run.
    """
    try:
        flow = of_copy(partial(ChannelFlow, through_norms=True), model, inputs)
    except Exception as error:  # of any type, from the user's forward
        raise ValueError(f"the model must run on example_inputs, got {error!r} for {shown(inputs)}") from error
    graph, norms = flow.graph(order_of(model)), norms_by_weight(model)
    found, reasons = list[Group](), dict(graph.left_out)
    for group in graph.groups:
        over = tuple(member.name for member in group.role("dependent") if member.name in norms)
        if over and not group.owners and len(group.role("producer")) > 1:
            found.append(replace(group, norms=over))
        else:
            reasons.update({member.name: "its channels are no residual stream" for member in group.role("producer")})
    made = {member.name for group in found for member in group.role("producer")}
    return Graph(tuple(found), {name: reason for name, reason in reasons.items() if name not in made})
