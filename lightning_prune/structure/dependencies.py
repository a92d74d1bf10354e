"""Dependencies: which channels Torch-Pruning's graph couples, found by one walk over it for each group.

Torch-Pruning's own search takes every path through the graph and lists again what other paths have reached: millions of
channels where many layers add to parts of one activation, as in ReXNet. This walk goes on with new channels only.
"""

import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_prune.models.forward import Inputs, call, tensors
from lightning_prune.structure.groups import Direction, Item
from lightning_prune.validation.values import install


class _Channel(NamedTuple):
    """A channel, and the channel of the layer where the walk began that reaches it; Torch-Pruning's names."""

    idx: int
    root_idx: Any


def coupled(model: nn.Module, inputs: Inputs, roots: tuple[type[nn.Module], ...]) -> list[list[Item]]:
    """Return, for each set of layers whose outputs are coupled, which channels of which layers belong together.

    Args:
        model: The model, all of whose parameters require gradients.
        inputs: Example inputs.
        roots: The types of the layers that produce channels.

    Raises:
        ImportError: If torch-pruning is not installed.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    >>> outputs, between = coupled(model, Tensor(2, 4), (nn.Linear,))
    >>> [(direction, channels) for module, direction, channels, _ in between[:2]]
    [('out', [0, 1, 2]), ('in', [0, 1, 2])]
    """
    graph = require_torch_pruning().DependencyGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the tracer and the model
        graph.build_dependency(model, inputs, forward_fn=_outputs, verbose=False)
    groups, seen = list[list[Item]](), set[Any]()
    for layer in list(graph.module2node):
        pruner = graph.get_pruner_of_module(layer) if isinstance(layer, roots) and layer not in seen else None
        if pruner is not None:
            items = list(_walk(graph, layer, pruner))
            seen.update(module for module, direction, *_ in items if direction != "in")
            groups.append(items)
    return groups


def _walk(graph: Any, layer: nn.Module, pruner: Any) -> Iterator[Item]:
    """Yield everything that the outputs of a layer reach, itself first.

    Where Torch-Pruning misplaces channels, as of a layer that is called twice, they may lie outside of a layer. Such an
    item is listed, so that the group is refused, but the walk does not go on from there: it would not end.
    """
    start = graph.get_pruning_group(layer, pruner.prune_out_channels, [])[0].dep  # also prepares the index mappings
    channels = [_Channel(channel, channel) for channel in range(pruner.get_out_channels(layer))]
    found = {(start.target, start.handler): dict.fromkeys(channels)}
    waiting = [(start, channels)]
    while waiting:
        reached, channels = waiting.pop()
        for edge in reached.target.dependencies:
            if edge.is_triggered_by(reached.handler):
                known = found.setdefault((edge.target, edge.handler), {})
                new = [channel for channel in _mapped(channels, edge) if channel not in known]
                known.update(dict.fromkeys(new))
                if inside := _inside(graph, edge.target.module, new):
                    waiting.append((edge, inside))
    for (node, handler), reached in found.items():
        first: dict[int, Any] = {}
        for channel in reached:
            first.setdefault(channel.idx, channel.root_idx)
        if first:
            yield node.module, _direction(graph, handler), list(first), list(first.values())


def _inside(graph: Any, module: Any, channels: list[Any]) -> list[Any]:
    """Return which channels a layer has; of an operation, all of them."""
    if not channels or not isinstance(module, nn.Module) or next(module.parameters(), None) is None:
        return channels
    pruner = graph.get_pruner_of_module(module)
    sizes = (pruner.get_out_channels(module), pruner.get_in_channels(module)) if pruner is not None else ()
    size = max((size for size in sizes if size is not None), default=math.inf)
    return [channel for channel in channels if channel.idx < size]


def _mapped(channels: list[Any], edge: Any) -> list[Any]:
    """Return which channels of its target the channels of an edge's source are."""
    for mapping in edge.index_mapping:
        channels = channels if mapping is None else mapping(channels)
    return channels


def _direction(graph: Any, handler: Any) -> Direction:
    out, into = graph.is_out_channel_pruning_fn(handler), graph.is_in_channel_pruning_fn(handler)
    return "both" if out and into else "out" if out else "in"


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return the outputs of a model that can be traced."""
    return [tensor for tensor in tensors(call(model, inputs)) if tensor.grad_fn is not None]


def require_torch_pruning() -> Any:
    """Return the module ``torch_pruning``.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(f"coupled channels need torch-pruning: {install('shrink')}") from error
    return torch_pruning
