"""Forward passes: runs a model on example inputs of any form, and compares outputs."""

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.models.preserving import cacheless, eager, evaluating
from lightning_prune.validation.values import shown

Inputs = Any  # a tensor, a tuple or list of positional arguments, or a dict of keyword arguments


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Return the output of a model for a tensor, a tuple of arguments or a dict of keyword arguments.

    >>> call(nn.Identity(), (torch.ones(2),))
    tensor([1., 1.])
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def feed(model: nn.Module, inputs: Any) -> Any:
    """Return the output of a model for the inputs of a batch; a mapping is passed by keyword where its keys say so.

    Raises:
        TypeError: If some, but not all, keys of a mapping are arguments of ``forward``.

    >>> feed(nn.Identity(), {"input": torch.ones(2)})
    tensor([1., 1.])
    """
    return model(**inputs) if by_keyword(model, inputs) else model(inputs)


def by_keyword(model: nn.Module, inputs: Any) -> bool:
    """Return whether inputs are a mapping that holds keyword arguments of a model, rather than being its argument.

    Raises:
        TypeError: If some, but not all, keys are arguments of ``forward``.

    >>> by_keyword(nn.Identity(), {"input": 1}), by_keyword(nn.Identity(), {"x": 1})
    (True, False)
    """
    if not isinstance(inputs, Mapping) or not all(isinstance(key, str) for key in inputs):
        return False
    signature = inspect.signature(model.forward)
    try:
        signature.bind(**inputs)
    except TypeError as error:
        taken = [key for key in inputs if key in signature.parameters]
        if not taken:
            return False
        raise TypeError(
            f"a batch that is a mapping must have the arguments of {type(model).__name__}.forward as its keys, got "
            f"{list(inputs)} ({error}): drop the other entries in the loader's collate_fn, or pass loss="
        ) from error
    return True


def convert(inputs: Inputs, device: torch.device, dtype: torch.dtype | None = None) -> Inputs:
    """Return nested tensors on a device, the floating-point ones in a dtype.

    >>> convert([torch.zeros(1), torch.zeros(1, dtype=torch.int64)], torch.device("cpu"), torch.float64)
    [tensor([0.], dtype=torch.float64), tensor([0])]
    """
    if isinstance(inputs, Tensor):
        return inputs.to(device, dtype if inputs.is_floating_point() else None)
    if hasattr(type(inputs), "to"):  # packed sequences and other types with a method of their own
        moved = inputs.to(device)
        return inputs if moved is None else moved  # some move in place and return nothing
    if isinstance(inputs, tuple):
        parts = [convert(part, device, dtype) for part in inputs]
        return type(inputs)(*parts) if hasattr(inputs, "_fields") else type(inputs)(parts)
    if is_dataclass(inputs) and not isinstance(inputs, type | dict):
        moved = copy.copy(inputs)
        for field in fields(inputs):  # one that is frozen, too
            object.__setattr__(moved, field.name, convert(getattr(inputs, field.name), device, dtype))
        return moved
    if isinstance(inputs, list | dict):  # a subclass keeps its other attributes
        copied = copy.copy(inputs)
        for key, part in inputs.items() if isinstance(inputs, dict) else enumerate(inputs):
            copied[key] = convert(part, device, dtype)
        return copied
    return inputs


def inputs_of(batch: Any) -> Inputs:
    """Return the inputs in a batch: its first item if it is a tuple or list.

    >>> inputs_of(["inputs", "labels"])
    'inputs'
    """
    return batch[0] if isinstance(batch, tuple | list) else batch


def example_of(model: nn.Module, given: Inputs) -> Inputs:
    """Return the given example inputs, or the ``example_input_array`` of a ``LightningModule``, or None."""
    return getattr(model, "example_input_array", None) if given is None else given


def needed_example_of(model: nn.Module, given: Inputs) -> Inputs:
    """Return the example inputs as ``example_of`` does, but require them.

    Raises:
        ValueError: If there are none, or they are on the meta device.
    """
    inputs = example_of(model, given)
    if inputs is None:
        raise ValueError("example_inputs must be given unless a LightningModule has an example_input_array, got None")
    if any(tensor.is_meta for tensor in tensors(inputs)):
        raise ValueError(f"example_inputs must hold data, got {shown(inputs)} on the meta device")
    return inputs


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model; the CPU if it has no parameters.

    >>> device_of(nn.ReLU())
    device(type='cpu')
    """
    return next(model.parameters(), torch.empty(0, device="cpu")).device


def fitting(inputs: Inputs, model: nn.Module) -> Inputs:
    """Return inputs on the device of a model, the floating-point ones in its dtype.

    >>> fitting(torch.zeros(1), nn.Linear(1, 1).double()).dtype
    torch.float64
    """
    first = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    return inputs if first is None else convert(inputs, first.device, first.dtype)


def tensors(output: Any) -> Iterator[Tensor]:
    """Yield every tensor in an output of nested tuples, lists, dicts and dataclasses.

    >>> [tensor.item() for tensor in tensors({"a": torch.tensor(1), "b": (torch.tensor(2), None)})]
    [1, 2]
    """
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from tensors(value)
    elif is_dataclass(output) and not isinstance(output, type):  # slots have no vars
        for field in fields(output):
            yield from tensors(getattr(output, field.name, None))


def difference(output: Any, other: Any) -> float:
    """Return the largest difference of two outputs, relative to the largest magnitude; inf if shapes differ.

    >>> difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))
    0.25
    """
    pairs = list(zip(tensors(output), tensors(other), strict=False))
    if not pairs or len(pairs) != len(list(tensors(other))) or any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    return max(_relative(a.detach().double(), b.detach().double()) for a, b in pairs)


def _relative(tensor: Tensor, other: Tensor) -> float:
    if not tensor.numel():
        return 0.0
    distance, scale = (tensor - other).abs().max(), tensor.abs().max()
    found = float(distance / scale) if scale else float(distance)
    return found if found == found else float("inf")  # NaN


@torch.no_grad()
def run(model: nn.Module, inputs: Inputs) -> Any:
    """Return the output of a model in eval mode, and leave its modes and the random state as they were."""
    with evaluating(model), torch.random.fork_rng(devices=[]), eager(), cacheless(model):
        return call(model, inputs)
