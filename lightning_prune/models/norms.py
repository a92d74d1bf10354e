"""Norms: which norm follows a layer, from a symbolic trace if the model can be traced."""

from collections import Counter
from typing import Any

from torch import nn
from torch.fx import Node

from lightning_prune.models.orientation import is_linear
from lightning_prune.models.symbolic import symbolic_graph

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
# channels are the last dimension after a linear layer, the second one after all others
_AFTER_LINEAR = (nn.BatchNorm1d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_AFTER_OTHERS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
# operations allowed between a layer and its norm: they keep zeros at zero and channels in place
_SAME = (nn.Identity, nn.modules.dropout._DropoutNd, nn.functional.dropout)
_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.ELU)
_NAMES = ("relu", "leaky_relu", "gelu", "silu", "tanh", "elu")
_TRANSPARENT = (*_SAME, *_ACTIVATIONS, *(getattr(nn.functional, name) for name in _NAMES))


def following_norms(model: nn.Module, across: bool = True) -> dict[nn.Module, nn.Module]:
    """Return the norm that follows each layer whose output goes straight into a norm over its channels.

    Parts that cannot be traced are searched child by child. Zero-preserving activations and dropout may lie between.
    A layer or norm that is called twice is left out.

    Args:
        model: Any module.
        across: Whether activations may lie between a layer and its norm.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    >>> {id(layer) for layer in following_norms(model)} == {id(model[0])}
    True
    """
    links: list[tuple[nn.Module, nn.Module]] = []
    calls: Counter[nn.Module] = Counter()
    if any(isinstance(module, _NORMS) for module in model.modules()):
        _trace(model, _TRANSPARENT if across else _SAME, links, calls)
    return {layer: norm for layer, norm in links if calls[layer] == calls[norm] == 1}


def no_norms(across: bool = True) -> dict[nn.Module, nn.Module]:
    """Return no norms, for units without a known model."""
    return {}


def _trace(
    model: nn.Module,
    between: tuple[Any, ...],
    links: list[tuple[nn.Module, nn.Module]],
    calls: Counter[nn.Module],
) -> None:
    """Add pairs of a layer and its norm from a symbolic trace, and count the calls of each module."""
    model = getattr(model, "_orig_mod", model)
    graph = symbolic_graph(model)
    if graph is None:
        for child in model.children():
            _trace(child, between, links, calls)
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    calls.update([modules[str(node.target)] for node in nodes] or [model])
    for node in nodes:
        norm = modules[str(node.target)]
        layer = _layer_before(node, modules, between) if isinstance(norm, _NORMS) else None
        if layer is not None and isinstance(norm, _AFTER_LINEAR if is_linear(layer) else _AFTER_OTHERS):
            links.append((layer, norm))


def _layer_before(node: Node, modules: dict[str, nn.Module], between: tuple[Any, ...]) -> nn.Module | None:
    types = tuple(kind for kind in between if isinstance(kind, type))
    source = node.args[0] if node.args else None
    while isinstance(source, Node):
        if source.op == "call_function" and source.target in between:
            source = source.args[0] if source.args else None
        elif source.op == "call_module" and isinstance(modules[str(source.target)], types):
            source = source.args[0]
        elif source.op == "call_module":
            return modules[str(source.target)]
        else:
            return None
    return None
