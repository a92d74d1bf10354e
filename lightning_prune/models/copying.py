"""Copies of modules, including modules that hold tensors of an autograd graph."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import partial
from types import MethodType, ModuleType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_prune.models.kept_norms import KeptChannels

Module = TypeVar("Module", bound=nn.Module)
_LEFT_OUT = ("_trainer", "_fabric")  # references of a LightningModule that its copy does not need


def copied(module: Module) -> Module:
    """Return a deep copy of a module; tensors with an autograd graph are copied detached.

    ``copy.deepcopy`` alone raises for those, and a module holds some as soon as it stores a loss or updates a metric.

    >>> layer = nn.Linear(2, 2)
    >>> layer.last = layer.weight.sum()
    >>> copied(layer).last.equal(layer.last), copied(layer).last.requires_grad
    (True, False)
    """
    return deepcopy(module, {id(tensor): tensor.detach().clone() for tensor in _in_graphs(module)})


def _in_graphs(root: Any) -> Iterator[Tensor]:
    """Yield the tensors with an autograd graph among everything that an object holds."""
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
    """Return a copy of a model without its forward hooks, for trials that hooks must not see.

    Norms keep what they take their statistics over, which is part of what the model computes.
    """
    copy = copied(model)
    for module in copy.modules():
        own = KeptChannels.of(module)
        module._forward_hooks.clear()
        if own is not None:
            module.register_forward_hook(own)
    return copy


def unwrapped(average: nn.Module) -> nn.Module:
    """Return the model in an ``AveragedModel``; any other model as it is."""
    return average.module if isinstance(average, AveragedModel) else average
