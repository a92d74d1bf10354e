"""Copying: a copy of a module, also of one that holds on to tensors of a graph."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import partial
from types import MethodType, ModuleType
from typing import Any, TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)
_LEFT_OUT = ("_trainer", "_fabric")  # which the copy of a LightningModule does without


def copied(module: Module) -> Module:
    """Return a deep copy of a module; tensors with a graph behind them are copied without it.

    ``copy.deepcopy`` alone refuses those, and a module holds some as soon as it keeps a loss or feeds a metric.

    >>> layer = nn.Linear(2, 2)
    >>> layer.last = layer.weight.sum()
    >>> copied(layer).last.equal(layer.last), copied(layer).last.requires_grad
    (True, False)
    """
    return deepcopy(module, {id(tensor): tensor.detach().clone() for tensor in _in_graphs(module)})


def _in_graphs(root: Any) -> Iterator[Tensor]:
    """Yield the tensors with a graph behind them among all that an object holds."""
    left, seen = [root], set()
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.grad_fn is not None:
                yield value
        else:
            left.extend(_parts(value))


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, type | ModuleType) or not hasattr(value, "__dict__"):
        return []
    return [part for name, part in vars(value).items() if name not in _LEFT_OUT]


def hookless_copy(model: Module) -> Module:
    """Return a copy of a model to try things on: without forward hooks, and none of them is called."""
    copy = copied(model)
    for module in copy.modules():
        module._forward_hooks.clear()
    return copy
