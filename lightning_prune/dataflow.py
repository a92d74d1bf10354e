"""Dataflow: which norm stands behind a layer, read from a symbolic trace where the model allows one."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Node, Tracer
from typing_extensions import override

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# what may lie between a layer and its norm: zeros stay zeros, channels stay in their place
_TRANSPARENT = (nn.Identity, nn.modules.dropout._DropoutNd, nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.ELU)
_NAMES = ("relu", "leaky_relu", "gelu", "silu", "tanh", "elu", "dropout")
_TRANSPARENT_CALLS = tuple(getattr(nn.functional, name) for name in _NAMES)


class _Quiet(Tracer):
    """A tracer that runs no hooks and looks into no layer."""

    @override
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(m.children()) or (m.__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential))

    @override
    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        # the module's own forward instead of its __call__: hooks of the user must not see a trace
        return super().call_module(m, m.forward, args, kwargs)


def norms_behind(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return, for each layer whose output goes straight into a norm, that norm.

    Parts that cannot be traced are searched child by child. Zero-preserving activations and dropout may lie between.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    >>> {id(layer) for layer in norms_behind(model)} == {id(model[0])}
    True
    """
    if not any(isinstance(module, _NORMS) for module in model.modules()):
        return {}
    try:
        graph = _Quiet().trace(model)
    except Exception:
        return {layer: norm for child in model.children() for layer, norm in norms_behind(child).items()}
    modules = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    found: dict[nn.Module, nn.Module] = {}
    times = Counter(modules[str(node.target)] for node in calls)
    for node in calls:
        norm = modules[str(node.target)]
        layer = _layer_before(node, modules) if isinstance(norm, _NORMS) else None
        if layer is not None and times[norm] == times[layer] == 1:  # a shared one has other neighbours elsewhere
            found[layer] = norm
    return found


def _layer_before(node: Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    source = node.args[0] if node.args else None
    while isinstance(source, Node):
        if source.op == "call_function" and source.target in _TRANSPARENT_CALLS:
            source = source.args[0] if source.args else None
        elif source.op == "call_module" and isinstance(modules[str(source.target)], _TRANSPARENT):
            source = source.args[0]
        elif source.op == "call_module":
            return modules[str(source.target)]
        else:
            return None
    return None
