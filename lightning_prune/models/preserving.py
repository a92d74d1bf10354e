"""Context managers that restore a model after a run: modes, buffers, gradients, compilation."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Restore the mode, training or eval, of every module on exit.

    >>> model = nn.Linear(2, 2)
    >>> with keeping_modes(model):
    ...     _ = model.eval()
    >>> model.training
    True
    """
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def evaluating(model: nn.Module, training: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Put a model, except some modules, in eval mode, and restore the mode of every module on exit.

    >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(1))
    >>> with evaluating(model, training=[model[1]]):
    ...     [module.training for module in model]
    [False, True]
    >>> model.training
    True
    """
    with keeping_modes(model):
        model.eval()
        for module in training:
            module.train()
        yield


@contextmanager
def keeping_values(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore the values of tensors on exit.

    >>> norm = nn.BatchNorm1d(1)
    >>> with keeping_values(norm.buffers()):
    ...     _ = norm(torch.tensor([[1.0], [3.0]]))
    >>> norm.running_mean
    tensor([0.])
    """
    entries = [(tensor, tensor.clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in entries:
                tensor.copy_(before)


@contextmanager
def keeping_gradients(model: nn.Module) -> Iterator[None]:
    """Restore the gradients of all parameters on exit.

    >>> model = nn.Linear(2, 2)
    >>> with keeping_gradients(model):
    ...     model(torch.ones(1, 2)).sum().backward()
    >>> model.weight.grad is None
    True
    """
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


@contextmanager
def cacheless(model: nn.Module) -> Iterator[None]:
    """Run a transformer without its key-value cache, which would count as an output and change from call to call.

    >>> from types import SimpleNamespace
    >>> model = nn.Identity()
    >>> model.config = SimpleNamespace(use_cache=True)
    >>> with cacheless(model):
    ...     model.config.use_cache
    False
    >>> model.config.use_cache
    True
    """
    found: dict[int, Any] = {id(config): config for module in model.modules() for config in _configs(module)}
    try:
        for config in found.values():
            config.use_cache = False
        yield
    finally:
        for config in found.values():
            config.use_cache = True


def _configs(module: nn.Module) -> Iterator[Any]:
    config: Any = getattr(module, "config", None)
    if not isinstance(config, dict) and getattr(config, "use_cache", None) is True:
        yield config


class _Stance:
    """Runs compiled modules eagerly from the first ``enter`` to the last ``leave``."""

    def __init__(self) -> None:
        self.users = 0
        self.eager: Any = None

    def enter(self) -> None:
        """Switch compilation off unless it is already off."""
        self.users += 1
        if self.eager is None and "torch._dynamo" in sys.modules:
            self.eager = torch.compiler.set_stance("force_eager")

    def leave(self) -> None:
        """Restore the previous stance once all users have left."""
        self.users -= 1
        if self.eager is not None and not self.users:
            self.eager.__exit__(None, None, None)
            self.eager = None


_STANCE = _Stance()  # the compiler has one stance a process


@contextmanager
def eager() -> Iterator[None]:
    """Run compiled modules eagerly, since every new shape would trigger a recompilation.

    Uses may be nested and end in any order.
    """
    _STANCE.enter()
    try:
        yield
    finally:
        _STANCE.leave()
