"""Blocks: which residual blocks of a model hand on what enters them once their parameters are zero."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.models.copying import copied
from lightning_prune.models.forward import Inputs, difference, run, tensors
from lightning_prune.models.parameters import plain_name
from lightning_prune.models.preserving import evaluating, keeping_values
from lightning_prune.structure.block_names import is_inside
from lightning_prune.structure.equivalence import TOLERANCE, bisect, equivalent_removals, precise
from lightning_prune.validation.values import shown


@dataclass
class _Call:
    """How a block is called in a forward pass, and what it returns."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    entered: Tensor | None = None  # a copy of the hidden states, since some blocks change them in place
    times: int = 0
    in_place: bool = False
    norm: str = ""  # of the block, whose output is that of the block


def find_blocks(
    model: nn.Module, inputs: Inputs, among: Callable[[nn.Module], bool] = lambda block: True
) -> tuple[list[str], dict[str, str]]:
    """Return the names of the residual blocks of a model, in order, and why others are none.

    A residual block is a child of a ``ModuleList`` or ``Sequential`` that adds to the hidden states that enter it, in a
    way that its parameters decide: it hands them on, as they are, once these are zero. The model is left as it is.

    Args:
        model: Any module.
        inputs: Example inputs.
        among: Says which children are looked at.

    >>> class Residual(nn.Linear):
    ...     def forward(self, x):
    ...         return x + super().forward(x)
    >>> find_blocks(nn.Sequential(nn.Linear(3, 2), Residual(2, 2), nn.Linear(2, 2)), torch.ones(1, 3))
    (['1'], {'2': 'it does not hand on what enters it once its weights are zero'})
    """
    trial, inputs = precise(model, inputs)
    candidates = {name: block for name, block in children_of_containers(trial) if among(block)}
    if not candidates:
        return [], {}
    reasons, found = dict[str, str](), list[str]()
    for name, call in _calls(trial, candidates, inputs).items():
        reason = _unfit(candidates[name], call)
        reason = _shared(trial, name, candidates[name]) if reason is None else reason
        if reason is None:
            found.append(name)
        elif reason:
            reasons[name] = reason
    kept = list[str]()
    while found:  # parts of a block before the block, where they can be taken out
        inner = [name for name in found if not any(is_inside(other, [name]) for other in found if other != name)]
        passing = _in_halves(inner, lambda names: _without_others(trial, names, candidates, inputs))
        alone = [name for name in inner if name in passing]
        reasons.update(dict.fromkeys(set(inner) - passing, "others need more of it than what it adds"))
        removable = _in_halves(alone, lambda names: _removable(trial, names, candidates, inputs))
        reasons.update(dict.fromkeys(passing - removable, "the model does not do without it"))
        kept += list(removable)
        found = [n for n in found if n not in inner and not any(is_inside(other, [n]) for other in removable)]
    return [name for name in candidates if name in kept], reasons


def children_of_containers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children, with weights, of all containers, each once."""
    seen: set[nn.Module] = set()
    for prefix, container in model.named_modules():
        if isinstance(container, nn.ModuleList | nn.Sequential):
            for name, child in container.named_children():
                if child not in seen and any(weight.ndim >= 2 for weight in child.parameters()):
                    seen.add(child)
                    yield plain_name(f"{prefix}.{name}" if prefix else name), child


def is_zero(block: nn.Module) -> bool:
    """Return whether all weights of a block are zero.

    >>> layer = nn.Linear(2, 2)
    >>> _ = nn.init.zeros_(layer.weight)
    >>> is_zero(layer)
    True
    """
    weights = [parameter for parameter in block.parameters() if parameter.ndim >= 2]
    return not any(weight.any() for weight in weights)


def _calls(model: nn.Module, blocks: Mapping[str, nn.Module], inputs: Inputs) -> dict[str, _Call]:
    """Return how each block is called in a forward pass."""
    calls = {name: _Call() for name in blocks}
    with ExitStack() as hooks:
        for name, block in blocks.items():
            watch = _Watch(calls[name], block)
            hooks.callback(block.register_forward_pre_hook(watch.before, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(watch.after).remove)
            for norm, module in block.named_modules():
                if "norm" in type(module).__name__.lower():
                    hooks.callback(module.register_forward_hook(watch.norm(norm)).remove)
        try:
            run(model, inputs)
        except Exception as error:  # of any type, from the user's forward
            raise ValueError(f"the model must run on example_inputs, got {error!r} for {shown(inputs)}") from error
    return calls


class _Watch:
    """The hooks that note how a block is called."""

    def __init__(self, call: _Call, block: nn.Module) -> None:
        self.call = call
        self.outputs: dict[str, Any] = {}  # of its norms

    def before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self.call
        call.times, call.args, call.kwargs = call.times + 1, args, kwargs
        stream = first_tensor((*args, *kwargs.values()))
        call.entered = None if stream is None else stream.clone()

    def after(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call, left = self.call, first_tensor(output)
        stream = first_tensor((*call.args, *call.kwargs.values()))
        call.in_place = stream is not None and call.entered is not None and not stream.equal(call.entered)
        call.norm = next((name for name, made in self.outputs.items() if made is left), "")

    def norm(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: self.outputs.__setitem__(name, output)


def first_tensor(values: Any) -> Tensor | None:
    """Return the first tensor with values that are no integers: the hidden states of a block's inputs or output.

    >>> first_tensor((None, torch.tensor([1]), torch.tensor([0.5])))
    tensor([0.5000])
    """
    return next((tensor for tensor in tensors(values) if tensor.is_floating_point()), None)


def _unfit(block: nn.Module, call: _Call) -> str | None:
    """Return why a block cannot be masked, "" if it does not look like a residual one; None if it can be."""
    if call.entered is None:
        return ""
    if call.times != 1:
        return f"it runs {call.times} times in a forward pass"
    if call.in_place:
        return "it changes what enters it in place"
    left = _idle(block, call)
    if left is None or left.shape != call.entered.shape:
        return ""
    if call.entered.any() and difference(call.entered, left) <= TOLERANCE:
        return None
    if call.norm:
        return (
            f"the norm {call.norm!r} acts on the sum of what enters and what is added, so that even a block that adds "
            f"nothing changes it: prune channels or heads instead"
        )
    return "it does not hand on what enters it once its weights are zero"


def _idle(block: nn.Module, call: _Call) -> Tensor | None:
    """Return what a block makes of the hidden states when all of its parameters are zero; None if it fails."""
    idle = copied(block)
    with torch.no_grad(), evaluating(idle), torch.random.fork_rng(devices=[]):
        for parameter in idle.parameters():
            parameter.zero_()
        try:
            return first_tensor(idle(*call.args, **call.kwargs))
        except Exception:  # the user's forward may divide by its weights, or hold on to what it was given
            return None


def _shared(model: nn.Module, name: str, block: nn.Module) -> str | None:
    """Return the reason if a block has parameters in common with others."""
    own = set(block.parameters())
    everywhere = ((plain_name(n), p) for n, p in model.named_parameters(remove_duplicate=False))
    others = [other for other, parameter in everywhere if parameter in own and not is_inside(other, [name])]
    return f"it has parameters in common with {others[0]}" if others else None


def _in_halves(names: Sequence[str], tried: Callable[[list[str]], list[str]]) -> set[str]:
    """Return what is left of names when every second one is tried together, so that the others have an effect.

    >>> sorted(_in_halves(["a", "b", "c"], lambda half: half[:1]))
    ['a', 'b']
    """
    return {*tried(list(names[::2])), *tried(list(names[1::2]))}


def _without_others(model: nn.Module, names: list[str], blocks: Mapping[str, nn.Module], inputs: Inputs) -> list[str]:
    """Return the blocks whose zeros do no more to the outputs of a model than what they add is missing."""

    def holds(some: Sequence[str]) -> bool:
        chosen = [blocks[name] for name in some]
        with _zeroed(chosen):
            idle = run(model, inputs)
        with _bypassed(chosen):
            return difference(run(model, inputs), idle) <= TOLERANCE

    return bisect(names, holds)


def _removable(model: nn.Module, names: list[str], blocks: Mapping[str, nn.Module], inputs: Inputs) -> list[str]:
    """Return the blocks that can be taken out of a model when they are zero."""
    with _zeroed([blocks[name] for name in names]):
        return equivalent_removals(model, names, inputs) if names else []


@contextmanager
def _zeroed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    parameters = [parameter for block in blocks for parameter in block.parameters()]
    with keeping_values(parameters):
        with torch.no_grad():
            for parameter in parameters:
                parameter.zero_()
        yield


@contextmanager
def _bypassed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Let blocks return the hidden states that enter them, and whatever else they compute."""

    def skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        stream = first_tensor((*args, *kwargs.values()))
        return stream if isinstance(output, Tensor) else type(output)((stream, *output[1:]))

    handles = [block.register_forward_hook(skip, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
