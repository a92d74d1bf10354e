"""Tracing: which channels of which parameters must be removed together, by a forward pass or by Torch-Pruning."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from lightning_prune.models.copying import hookless_copy
from lightning_prune.models.forward import Inputs, convert
from lightning_prune.models.kept_norms import forget_channels
from lightning_prune.models.orientation import untransposed
from lightning_prune.models.parameters import plain_name
from lightning_prune.models.preserving import cacheless, eager
from lightning_prune.structure.channel_flow import ChannelFlow
from lightning_prune.structure.dependencies import coupled, require_torch_pruning
from lightning_prune.structure.grouping import ROOTS, GroupBuilder, packed_heads
from lightning_prune.structure.groups import OUTPUTS, Graph, Item
from lightning_prune.structure.layer_slices import UnsupportedError
from lightning_prune.validation.values import shown

Found = TypeVar("Found")
LOST = 0.1  # of the layers at most


def trace(model: nn.Module, inputs: Inputs, heads: int | None = None) -> Graph:
    """Return the groups of channels and of attention heads of a model, which is left as it is.

    Args:
        model: Any module whose outputs depend on its parameters by autograd.
        inputs: Example inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.
        heads: The number of heads of attentions that are built from linear layers; None reads it from their module.

    Raises:
        ImportError: If torch-pruning is not installed.
        ValueError: If the model cannot be run or traced.

    Reference: Fang et al., 2023, "DepGraph: Towards Any Structural Pruning", arXiv:2301.12900.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> [(member.name, member.dim, member.role) for member in trace(model, torch.randn(2, 4)).groups[0].members]
    [('0.weight', 0, 'producer'), ('0.bias', 0, 'dependent'), ('2.weight', 1, 'consumer')]
    """
    flow = _flow(model, inputs, heads)
    graph = None
    if flow is not None and (flow.attends or flow.detects):
        graph = _followed(flow, model)
        # Torch-Pruning takes minutes where the outputs of many layers are joined
        if flow.attends or _is_nearly_whole(graph):
            return graph
    try:
        return _depending(model, inputs, heads)
    except ValueError:
        if graph is None:
            graph = _followed(flow, model) if flow is not None else Graph(())
        if graph.groups:
            return graph
        raise


def _is_nearly_whole(graph: Graph) -> bool:
    """Return whether most layers whose channels could go are in groups; they are not where channels are split."""
    lost = sum(reason != OUTPUTS for reason in graph.left_out.values())
    return lost <= LOST * (len(graph.groups) + len(graph.left_out))


def of_copy(function: Callable[[nn.Module, Inputs], Found], model: nn.Module, inputs: Inputs) -> Found:
    """Return what a function finds of a copy of the model that runs no hooks."""
    try:  # the trace of a recurrent layer differs by device and dtype
        return function(_bare(model).cpu().float(), convert(inputs, torch.device("cpu"), torch.float32))
    except Exception:  # the user's forward may need its own device or dtype
        return function(_bare(model), inputs)


def _bare(model: nn.Module) -> nn.Module:
    """Return a copy of the model without any hooks, those of norms included."""
    copy = hookless_copy(model)
    for module in copy.modules():
        forget_channels(module)
    return copy


def _flow(model: nn.Module, inputs: Inputs, heads: int | None) -> ChannelFlow | None:
    """Return the forward pass of a copy of the model, to follow its channels; None if it does not run."""
    try:
        return of_copy(partial(ChannelFlow, heads=heads), model, inputs)
    except Exception:  # the user's forward may need the numbers that it has
        return None


def _followed(flow: ChannelFlow, model: nn.Module) -> Graph:
    """Return the groups that a forward pass shows."""
    order = order_of(model)
    graph, packed = flow.graph(order), packed_heads(model)
    groups = sorted((*packed, *graph.groups), key=lambda group: order[group.name])
    return replace(graph, groups=tuple(groups))


def order_of(model: nn.Module) -> dict[str, int]:
    """Return the position of every parameter and buffer in a model, by name.

    >>> order_of(nn.Linear(2, 2))
    {'weight': 0, 'bias': 1}
    """
    return {plain_name(n): at for at, (n, _) in enumerate([*model.named_parameters(), *model.named_buffers()])}


def _depending(model: nn.Module, inputs: Inputs, heads: int | None) -> Graph:
    """Return the groups that Torch-Pruning's dependency graph shows."""
    require_torch_pruning()
    traced, found = _traced(model, inputs)
    builder = GroupBuilder(traced, heads)
    groups = packed_heads(traced)
    left_out: dict[str, str] = {}
    for items in found:
        try:
            groups.append(builder.group(items))
        except UnsupportedError as reason:
            left_out.update({name: str(reason) for name in builder.produced(items)})
    groups = [builder.as_in_model(group) for group in groups]
    return Graph(tuple(sorted(groups, key=lambda group: builder.order[group.name])), left_out)


def _traced(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, list[list[Item]]]:
    """Return a traced copy of the model, and what is coupled in it.

    Raises:
        ValueError: If the model cannot be run or traced.
    """
    try:
        return of_copy(_dependencies, model, inputs)
    except Exception as error:
        raise ValueError(_untraceable(model, inputs, error)) from error


def _untraceable(model: nn.Module, inputs: Inputs, error: Exception) -> str:
    """Return what a model that cannot be traced is, and what to do."""
    said = f"the model must run on example_inputs and be traceable by torch-pruning, got {error!r}"
    unknown = {
        f"{type(module).__name__} {plain_name(name)!r}"
        for name, module in model.named_modules()
        if isinstance(module, nn.RNNBase) and (module.mode != "LSTM" or module.proj_size)
    }
    if unknown:
        return (
            f"{said} for {shown(inputs)}: channels cannot be followed through {', '.join(sorted(unknown))}: prune "
            f"single weights (granularity=Weight()), or channels without coupled=True, which zeroes and does not cut"
        )
    return (
        f"{said} for {shown(inputs)}: call model(example_inputs) to see whether it runs; if it does, its forward "
        f"leaves autograd or depends on values: prune single weights, or channels without coupled=True"
    )


def _dependencies(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, list[list[Item]]]:
    """Return the model, and what is coupled in it; all parameters then require gradients."""
    model = untransposed(model)
    model.requires_grad_()
    with torch.enable_grad(), torch.random.fork_rng(devices=[]), eager(), cacheless(model):
        return model, coupled(model, inputs, ROOTS)
