"""Joining: gradients of another loss join those of the training loss where they flow back through an output."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Gradients = Callable[[tuple[Any, ...], dict[str, Any], Sequence[Tensor]], Sequence[Tensor]]


class Joining:
    """The outputs of a network in training, forward pass by forward pass, and the gradients that join there.

    Args:
        network: The module whose forward pass is one pass.
        watched: The module whose outputs count: the network itself, or a layer inside it.
        gradients: From the arguments of a forward pass and copies of the watched outputs to a gradient for each.
        active: Whether a forward pass counts at this moment (training does, validation does not).

    Attributes:
        open: Whether the backward pass that runs is that of the training loss; in others nothing joins.
        passes: Number of forward passes since somebody set this to 0.
        joined: Number of outputs that gradients have joined since then.
    """

    def __init__(
        self, network: nn.Module, watched: nn.Module, gradients: Gradients, active: Callable[[], bool]
    ) -> None:
        self.open = False
        self.passes = 0
        self.joined = 0
        self._network = network
        self._gradients = gradients
        self._active = active
        self._forwards: list[Any] = []
        self._outputs: list[tuple[Tensor, list[Tensor]]] = []
        self._handles: list[RemovableHandle] = [
            network.register_forward_pre_hook(_Hook(self._begin)),
            watched.register_forward_hook(_Hook(self._see)),
            network.register_forward_hook(_Hook(self._end), with_kwargs=True),
        ]

    def close(self) -> None:
        """Remove every hook; idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _counts(self) -> bool:
        again = torch._C._current_graph_task_id() != -1  # activation checkpointing, inside a backward pass
        return torch.is_grad_enabled() and not again and self._active()

    def _begin(self, network: nn.Module, args: tuple[Any, ...]) -> None:
        self._forwards.append(network.forward)
        self._outputs = []

    def _redirected(self) -> bool:
        # DDP runs the whole training step as the forward of the LightningModule, which Lightning puts back inside it
        return not self._forwards or self._network.forward != self._forwards[-1]

    def _see(self, watched: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._redirected() or not self._counts():
            return
        found = tensor_in(output)
        if found.requires_grad:
            waiting: list[Tensor] = []
            found.register_hook(partial(self._join, waiting))  # now: the output may be changed in place later
            self._outputs.append((found.detach().clone(), waiting))

    def _end(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        outputs, self._outputs = self._outputs, []
        if outputs and not self._redirected():
            self.passes += 1
            found = self._gradients(args, kwargs, [output for output, _ in outputs])
            for (_, waiting), gradient in zip(outputs, found, strict=True):
                waiting.append(gradient)
        self._forwards.pop()

    def _join(self, waiting: list[Tensor], gradient: Tensor) -> Tensor:
        if not self.open or not waiting:
            return gradient
        self.joined += 1
        return gradient + waiting.pop().to(gradient.dtype)  # once, also where a graph is walked twice


class _Hook:
    """A hook on a module; a copy of the module carries a copy that does nothing."""

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        self.call = call

    def __call__(self, *args: Any) -> None:
        if self.call is not None:
            torch.compiler.disable(self.call)(*args)

    def __reduce__(self) -> tuple[type["_Hook"], tuple[()]]:
        return _Hook, ()


def gradient_at(output: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return a loss of an output and its gradient there, in single precision at least.

    >>> gradient_at(torch.tensor([3.0]), lambda output: output.square().sum())
    (tensor(9.), tensor([6.]))
    """
    output = output.detach().to(torch.promote_types(output.dtype, torch.float32)).requires_grad_()
    # what activation checkpointing would do to the tensors saved here is not for them
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        value = loss(output)
        (gradient,) = torch.autograd.grad(value, output)
    return value.detach(), gradient


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that copies of the outputs of a module are added to, until the context ends.

    >>> layer = nn.Linear(2, 3)
    >>> with outputs_of(layer) as outputs:
    ...     _ = layer(torch.zeros(4, 2))
    >>> [output.shape for output in outputs]
    [torch.Size([4, 3])]
    """
    found: list[Tensor] = []
    handle = module.register_forward_hook(lambda *call: found.append(tensor_in(call[-1]).detach().clone()))
    try:
        yield found
    finally:
        handle.remove()


def tensor_in(output: Any) -> Tensor:
    """Return the tensor in what a module outputs: itself, the first of a tuple, or that of a name.

    Of outputs with names (a mapping, a named tuple, a dataclass, any other object) it is "logits", where there is one,
    and otherwise the first floating-point tensor but a "loss".

    Raises:
        ValueError: If there is none.

    >>> tensor_in({"loss": None, "logits": torch.ones(1)})
    tensor([1.])
    """
    found = _tensor_in(output)
    if found is None:
        raise ValueError(
            f'the output must be a tensor, a tuple that begins with one, or a mapping or an object with "logits" or '
            f"another tensor, got {output!r:.80}"
        )
    return found


def _tensor_in(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    named = _named(output)
    if named is None:
        return _tensor_in(output[0]) if isinstance(output, tuple | list) and output else None
    parts = [named["logits"]] if "logits" in named else [part for name, part in named.items() if name != "loss"]
    found = (_tensor_in(part) for part in parts)
    return next((tensor for tensor in found if tensor is not None and tensor.is_floating_point()), None)


def _named(output: Any) -> Mapping[str, Any] | None:
    """Return the parts of an output by name; None if they have none."""
    if isinstance(output, Mapping):
        return output
    if hasattr(output, "_asdict"):  # a named tuple
        return dict(output._asdict())
    if is_dataclass(output):
        return {field.name: getattr(output, field.name, None) for field in fields(output)}
    return getattr(output, "__dict__", None)
