"""Optimizers of the kinds that torch does not have: with preconditioners, divisors and copies of weights as state."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

Closure = Callable[[], Any]


class Entries(Optimizer):
    """The base: a subclass says what a step does to one parameter."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.move(parameter, self.state[parameter], group["lr"])
        return loss

    def move(self, parameter: nn.Parameter, state: dict[str, Any], lr: float) -> None:
        raise NotImplementedError


class Shampoo(Entries):
    """Matrices that gather ``g g^T``, whose roots precondition: Gupta et al., 2018, arXiv:1802.09568."""

    def move(self, parameter: nn.Parameter, state: dict[str, Any], lr: float) -> None:
        grad = parameter.grad.flatten(1) if parameter.ndim > 1 else parameter.grad[:, None]
        for key, side in (("left", grad), ("right", grad.T)):
            state.setdefault(key, 1e-2 * torch.eye(len(side)))
            state[key] += side @ side.T
            torch.linalg.cholesky(state[key])  # raises if it is not positive definite
            values, vectors = torch.linalg.eigh(state[key])
            root = vectors @ (values**-0.25).diag() @ vectors.T
            grad = root @ grad if key == "left" else grad @ root
        parameter.sub_(grad.view_as(parameter), alpha=lr)


class Divided(Entries):
    """A divisor that begins above zero, and ends in 0/0 if it is reset: as D-Adaptation for Adagrad and VSGD have."""

    def move(self, parameter: nn.Parameter, state: dict[str, Any], lr: float) -> None:
        state.setdefault("alpha", torch.full_like(parameter, 1e-6))
        state.setdefault("s", torch.zeros_like(parameter))
        state["s"] += parameter.grad
        parameter.sub_(state["s"] * state["alpha"].rsqrt() * 1e-4, alpha=lr)
        state["alpha"] += parameter.grad.square()


class ScheduleFree(Entries):
    """Gradients move a copy of the weights, and the weights follow it: Defazio et al., 2024, arXiv:2405.15682."""

    def move(self, parameter: nn.Parameter, state: dict[str, Any], lr: float) -> None:
        state.setdefault("z", parameter.clone())
        parameter.lerp_(state["z"], 0.1).sub_(parameter.grad, alpha=lr * 0.1)
        state["z"].sub_(parameter.grad, alpha=lr)


class SAM(SGD):
    """Runs the model a second time inside its step, at a worse place: Foret et al., 2020, arXiv:2010.01412."""

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        assert closure is not None
        closing = torch.enable_grad()(closure)
        loss = closing()
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in moved]).norm()
        away = [0.05 * p.grad / (norm + 1e-12) for p in moved]
        torch._foreach_add_(moved, away)
        closing()
        torch._foreach_sub_(moved, away)
        super().step()
        return loss
