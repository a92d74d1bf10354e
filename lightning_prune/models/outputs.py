"""Outputs: which weights make what a model returns, so that their neurons are its outputs."""

from typing import Any

from torch import nn
from torch.fx import Graph, Node
from torch.nn.parameter import is_lazy

from lightning_prune.models.symbolic import symbolic_graph

# what is computed from the shape of a tensor, and not from its values
_SHAPES = ("size", "dim", "shape", "ndim", "device", "dtype", "numel")
_PRODUCTS = ("linear", "conv", "matmul", "mm", "bmm")  # how names of functions begin that are layers, given a weight


def output_weights(model: nn.Module) -> set[nn.Parameter] | None:
    """Return the weights of the last layers on all paths to what a model returns, None where these are unknown.

    They are read from a symbolic trace. Of a model that cannot be traced, it is that of the only child with weights.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.Softmax(-1))
    >>> output_weights(model) == {model[2].weight}
    True
    """
    model = getattr(model, "_orig_mod", model)
    graph = symbolic_graph(model)
    if graph is not None:
        return _weights_before_output(graph, model)
    children = [child for child in model.children() if _weights(child)]
    return output_weights(children[0]) if len(children) == 1 and not _weights(model, recurse=False) else None


def _weights_before_output(graph: Graph, model: nn.Module) -> set[nn.Parameter]:
    modules = dict(model.named_modules(remove_duplicate=False))
    found: set[nn.Parameter] = set()
    open_nodes = [node for node in graph.nodes if node.op == "output"]
    seen = set(open_nodes)
    while open_nodes:
        node = open_nodes.pop()
        weights = _weights_of(node, modules, model)
        found.update(weights)
        before = [] if weights else _before(node)
        open_nodes += [new for new in before if new not in seen]
        seen.update(before)
    return found


def _weights_of(node: Node, modules: dict[str, nn.Module], model: nn.Module) -> list[nn.Parameter]:
    """Return the weights with which a node computes: those of a layer, or one that a function is given."""
    if node.op == "call_module":
        return _weights(modules[str(node.target)])
    if node.op != "call_function" or not getattr(node.target, "__name__", "").startswith(_PRODUCTS):
        return []
    values: Any = [_attribute(model, str(n.target)) for n in node.all_input_nodes if n.op == "get_attr"]
    return [value for value in values if _is_weight(value)]


def _before(node: Node) -> list[Node]:
    """Return the nodes whose values, and not only their shapes, go into a node."""
    name = str(node.args[1]) if node.target is getattr else str(node.target)
    return [] if name in _SHAPES else node.all_input_nodes


def _attribute(model: nn.Module, name: str) -> Any:
    value: Any = model
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def _weights(module: nn.Module, recurse: bool = True) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters(recurse) if _is_weight(parameter)]


def _is_weight(value: Any) -> bool:
    return isinstance(value, nn.Parameter) and (is_lazy(value) or value.ndim >= 2)
