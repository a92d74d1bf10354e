"""Symbolic traces: what a model computes, read from its forward without inputs."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Tracer
from typing_extensions import override

from lightning_prune.models.preserving import keeping_values


class _Quiet(Tracer):
    """A tracer that runs no hooks and treats layers as leaves."""

    @override
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(m.children()) or (m.__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential))

    @override
    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        # the module's forward instead of its __call__: the user's hooks must not see a trace
        inner = getattr(m, "_orig_mod", m)
        return super().call_module(inner, inner.forward, args, kwargs)


def symbolic_graph(model: nn.Module) -> Graph | None:
    """Return the graph of a model, which is left as it is; None if it cannot be traced.

    >>> [node.op for node in symbolic_graph(nn.Sequential(nn.Linear(2, 2))).nodes]
    ['placeholder', 'call_module', 'output']
    """
    try:
        with _untouched(model):
            return _Quiet().trace(model)
    except Exception:  # tracing runs the user's forward on proxies and may fail in any way
        return None


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Undo the effects of a forward on a model: attributes, containers in them, buffers, the random state."""
    attributes = {module: dict(vars(module)) for module in model.modules()}
    found = [value for saved in attributes.values() for value in saved.values()]
    containers = [(value, value.copy()) for value in found if isinstance(value, dict | list | set)]
    python = random.getstate()
    try:
        with keeping_values(model.buffers()), torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        for container, saved in containers:
            container.clear()
            container.extend(saved) if isinstance(container, list) else container.update(saved)
        for module, saved in attributes.items():
            vars(module).clear()
            vars(module).update(saved)
