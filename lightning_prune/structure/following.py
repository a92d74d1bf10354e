"""Following: one forward pass that is cut apart at every weight, so that gradients tell which channels meet."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_prune.models.forward import tensors
from lightning_prune.models.parameters import plain_name
from lightning_prune.structure.contractions import Contraction, contraction, is_view, mixes_positions, name_of


@dataclass(frozen=True)
class Place:
    """Where the channels of an activation lie: a dimension of a parameter, and the index of each channel in it."""

    name: str
    dim: int
    index: Tensor


@dataclass(frozen=True)
class Source:
    """A parameter, or a part of one: where each element of it lies in the parameter, a tensor for every dimension."""

    name: str
    coordinates: tuple[Tensor, ...]

    def place(self, dim: int) -> Place | None:
        """Return where the slices along a dimension lie; None if it is not along one dimension of the parameter."""
        lengths = self.coordinates[0].shape
        along = dim % len(lengths)
        at = tuple(slice(None) if d == along else 0 for d in range(len(lengths)))
        found = [(d, c[at].long()) for d, c in enumerate(self.coordinates) if c.numel()]
        varying = [(d, index) for d, index in found if (index != index[0]).any()]
        if not varying and len(self.coordinates) == len(lengths):  # a single channel
            varying = [found[along]]
        return Place(self.name, *varying[0]) if len(varying) == 1 else None


@dataclass(frozen=True)
class Step:
    """One multiplication by a weight.

    Args:
        values: The activations that it reads; None if it reads none.
        read: Their dimension with the channels.
        consumed: Where these channels lie in the weight.
        leaf: Its output, from which the forward pass goes on.
        made: The dimension of the output with the channels.
        produced: Where these channels lie in the weight.
        bias: Where they lie in the bias.
        attention: The module that multiplied activations by each other since the last step.
        looks_up: Whether it looks rows up, as an embedding does.
    """

    values: Tensor | None
    read: int
    consumed: Place | None
    leaf: Tensor
    made: int
    produced: Place
    bias: Place | None
    attention: str | None
    looks_up: bool


class Following(TorchFunctionMode):
    """Records every multiplication by a weight of a forward pass, and puts random positive numbers in its place.

    Numbers that are positive keep every rectifier active, so that no channel hides behind one.

    Args:
        model: A model whose parameters require gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.attends = False
        self._attention: str | None = None
        self._running: list[str] = []
        self._sources: dict[int, tuple[Tensor, Source]] = {}
        self._generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            grids = [_along(d, parameter) for d in range(parameter.ndim)]
            self._sources[id(parameter)] = parameter, Source(plain_name(name), tuple(grids))
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._enter, plain_name(name)))
            module.register_forward_hook(self._leave)

    def _enter(self, name: str, *_: Any) -> None:
        self._running.append(name)

    def _leave(self, *_: Any) -> None:
        self._running.pop()

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, name_of(func)
        weights = [place for place, value in enumerate(args) if self._source(value) is not None]
        rule = contraction(name, args, kwargs, weights)
        step = None if rule is None else self._multiply(rule, func, args, kwargs)
        if step is not None:
            self.steps.append(step)
            self._attention = None
            return step.leaf.clone()  # which may be changed in place
        active = [value for value in tensors(args) if value.requires_grad and self._source(value) is None]
        if mixes_positions(name, active):
            self.attends, self._attention = True, self._running[-1] if self._running else ""
        output = func(*args, **kwargs)
        if weights == [0] and is_view(name):
            self._follow(self._sources[id(args[0])][1], func, args[1:], kwargs, output)
        return output

    def _source(self, value: Any) -> Source | None:
        """Return where a tensor lies in a parameter; None if it is no part of one."""
        return self._sources[id(value)][1] if isinstance(value, Tensor) and id(value) in self._sources else None

    def _follow(self, source: Source, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """Note where the parts of a weight lie."""
        try:
            moved = [func(grid, *args, **kwargs) for grid in source.coordinates]
        except Exception:  # then the part is one of an unknown place, and no channels of it are found
            return
        parts = [output] if isinstance(output, Tensor) else list(output)
        grids = [[grid] if isinstance(grid, Tensor) else list(grid) for grid in moved]
        for part, *places in zip(parts, *grids, strict=True):
            if part.ndim:
                self._sources[id(part)] = part, Source(source.name, tuple(places))

    def _multiply(self, rule: Contraction, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Step | None:
        """Return the step of a multiplication; None if it cannot be told where its channels lie."""
        source = self._source(args[rule.weight])
        assert source is not None
        produced = source.place(rule.outputs)
        consumed = None if rule.inputs is None else source.place(rule.inputs)
        if produced is None or (rule.inputs is not None and consumed is None):
            return None
        with torch.no_grad():
            output = func(*args, **kwargs)
        leaf = torch.rand(output.shape, generator=self._generator).to(output) + 0.5
        values = args[rule.activations] if consumed is not None else None
        bias = None
        if rule.bias is not None:
            bias = self._source(args[rule.bias] if len(args) > rule.bias else kwargs.get("bias"))
        return Step(
            values if isinstance(values, Tensor) and values.requires_grad else None,
            rule.read,
            consumed,
            leaf.requires_grad_(),
            rule.made,
            produced,
            None if bias is None else bias.place(-1),
            self._attention,
            consumed is None,
        )


def _along(dim: int, parameter: Tensor) -> Tensor:
    """Return the index along a dimension of every element, in the memory of one slice."""
    shape = [-1 if d == dim else 1 for d in range(parameter.ndim)]
    return torch.arange(parameter.shape[dim], device=parameter.device).view(shape).expand(parameter.shape)
