"""Preserving: what a model is left with after it was run: its modes, buffers, gradients and compilation."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Put every module back into the mode, training or eval, that it is in now.

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
    """Put a model in eval mode, all but some of its modules, and every module back into the mode that it is in now.

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
def keeping_entries(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put the entries of tensors back that they have now.

    >>> norm = nn.BatchNorm1d(1)
    >>> with keeping_entries(norm.buffers()):
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
    """Put the gradients back that every parameter has now.

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


class _Stance:
    """Compiled modules run as they are written from the first that asks for it until the last has left."""

    def __init__(self) -> None:
        self.users = 0
        self.eager: Any = None

    def enter(self) -> None:
        """Ask for it."""
        self.users += 1
        if self.eager is None and "torch._dynamo" in sys.modules:
            self.eager = torch.compiler.set_stance("force_eager")

    def leave(self) -> None:
        """Ask for it no longer; the stance that there was before comes back with the last."""
        self.users -= 1
        if self.eager is not None and not self.users:
            self.eager.__exit__(None, None, None)
            self.eager = None


_STANCE = _Stance()  # one a process, as that of the compiler


@contextmanager
def eager() -> Iterator[None]:
    """Run compiled modules as they are written: compiled code would be compiled anew for every new shape.

    It may be entered again before it is left, and left in any order.
    """
    _STANCE.enter()
    try:
        yield
    finally:
        _STANCE.leave()
