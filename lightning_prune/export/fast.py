"""Fast models: the layers of a pruned model in the form that is fastest on this machine, found by measuring."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.export.shared_fan_in import GROUPS, SharedFanInConv2d, SharedFanInLinear, part_read
from lightning_prune.export.sparse_layers import CSRLinear, linear_layers, replaced
from lightning_prune.models.copying import copied
from lightning_prune.models.forward import Inputs, call, difference, fitting, needed_example_of
from lightning_prune.models.preserving import eager, evaluating
from lightning_prune.models.summary import shape_text, table
from lightning_prune.validation.instances import instance
from lightning_prune.validation.values import shown
from lightning_prune.validation.warning import warn

Model = TypeVar("Model", bound=nn.Module)
Layer = nn.Linear | nn.Conv2d

DENSE = "dense"
_MOST_READ = 0.6  # of the inputs: with more, groups of rows gain nothing over the dense product
_GAIN = 0.95  # of the dense time: what is not clearly faster stays dense
_ROUNDS, _SECONDS = 9, 0.002  # turns of each form, and what a turn takes at least


@dataclass(frozen=True)
class LayerTime:
    """What a layer takes for the example inputs.

    Args:
        name: Its qualified name.
        shape: Of its weight.
        sparsity: The fraction of zeros in it, 0 to 1.
        form: The fastest form.
        dense: Milliseconds as a dense layer.
        fastest: Milliseconds in the fastest form.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    form: str
    dense: float
    fastest: float


@dataclass(frozen=True)
class SpeedUp:
    """What ``to_fast`` has measured; ``str`` returns a table.

    Args:
        layers: The layers with zeros.
        dense: Milliseconds of the whole dense model.
        fast: Milliseconds of the whole model with the fastest layers.
    """

    layers: tuple[LayerTime, ...]
    dense: float
    fast: float

    @override
    def __str__(self) -> str:
        cells = [("name", "shape", "zeros", "form", "dense ms", "ms", "speed-up")]
        for row in self.layers:
            shape, times = shape_text(row.shape), (row.dense, row.fastest)
            cells.append((row.name, shape, f"{row.sparsity:.1%}", row.form, *_times(*times)))
        cells.append(("whole model", "", "", "", *_times(self.dense, self.fast)))
        lines = table(cells)
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:-1], "-" * len(lines[0]), lines[-1]])


def _times(dense: float, fast: float) -> tuple[str, str, str]:
    return f"{dense:.3f}", f"{fast:.3f}", f"{dense / fast:.2f}"


def to_fast(model: Model, example_inputs: Inputs = None) -> Model:
    """Return a copy of a pruned model with every layer in the form that is fastest here: for inference, on a CPU.

    Each linear layer and 1 x 1 convolution with zeros is measured on the inputs that it gets from the example, with the
    threads that torch has now: as it is, as groups of rows that read the same inputs (which ``SharedFanIn`` makes), and
    as compressed sparse rows. What is not clearly faster stays dense. A table of the layers and the whole model is
    printed. The copy is a plain module: it has a ``state_dict``, can be exported and compiled; ``save_fast`` and
    ``load_fast`` take it to another process. Other batch sizes give the same outputs, but may have other fastest forms.

    Args:
        model: Any module with zeros, on the CPU, in float32 or float64; it is left as it was.
        example_inputs: A tensor, a tuple of arguments or a dict of keyword arguments, with the batch size of use; None
            takes the ``example_input_array`` of a ``LightningModule``.

    Raises:
        ValueError: If the model is not on the CPU, has no such layer with zeros, or the outputs of the copy differ.

    >>> to_fast(nn.Linear(2, 2), torch.randn(1, 2))
    Traceback (most recent call last):
    ValueError: model must have a linear layer or a 1 x 1 convolution with zeros, got none: prune it first
    """
    instance("model", model, nn.Module)
    fast, found = fastest(model, example_inputs)
    print(found)
    if all(row.form == DENSE for row in found.layers):
        warn(
            "to_fast leaves the model dense: no layer is faster in another form for these inputs. SharedFanIn() with "
            "80 % zeros or more makes layers that are"
        )
    return fast


def fastest(model: Model, example_inputs: Inputs = None) -> tuple[Model, SpeedUp]:
    """Return what ``to_fast`` does, and what it has measured."""
    inputs = fitting(needed_example_of(model, example_inputs), model)
    _check(_with_zeros(model))
    fast, rows = in_fastest_forms(model, inputs)
    with evaluating(model), torch.no_grad(), eager(), torch.random.fork_rng(devices=[]):
        _check_outputs(model, fast, inputs)
        both = _alternate({"dense": partial(call, model, inputs), "fast": partial(call, fast, inputs)})
    return fast, SpeedUp(rows, both["dense"], both["fast"])


def in_fastest_forms(model: Model, inputs: Inputs) -> tuple[Model, tuple[LayerTime, ...]]:
    """Return a copy of a model with every layer that has zeros in its fastest form, and what these layers take."""
    layers = _with_zeros(model)
    copy = copied(model).eval().requires_grad_(False)
    with evaluating(model), torch.no_grad(), eager(), torch.random.fork_rng(devices=[]):
        read = _inputs_of_layers(model, layers, inputs)
        rows, chosen = [], {}
        for name, seen in read.items():
            row, form = _choose(name, layers[name], seen)
            rows.append(row)
            if form is not None:
                chosen[name] = form
    return replaced(copy, chosen), tuple(rows)


def layers_with_forms(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """Yield the layers that may be faster in another form: plain linear layers and 1 x 1 convolutions.

    >>> [name for name, _ in layers_with_forms(nn.Sequential(nn.Linear(2, 2), nn.Conv2d(2, 2, 3)))]
    ['0']
    """
    for name, module in model.named_modules():
        plain = type(module) is nn.Conv2d and module.kernel_size == (1, 1) and module.groups == 1
        if plain and module.padding in ((0, 0), "valid", "same"):
            yield name, module
    yield from linear_layers(model)


def _with_zeros(model: nn.Module) -> dict[str, Layer]:
    return {name: layer for name, layer in layers_with_forms(model) if bool((layer.weight == 0).any())}


def _check(layers: Mapping[str, Layer]) -> None:
    if not layers:
        raise ValueError("model must have a linear layer or a 1 x 1 convolution with zeros, got none: prune it first")
    for name, layer in layers.items():
        weight = layer.weight
        if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"model must be on the CPU in float32 or float64, got {weight.dtype} on {weight.device} for {name!r}"
            )


def _inputs_of_layers(model: nn.Module, layers: Mapping[str, Layer], inputs: Inputs) -> dict[str, Tensor]:
    """Return the first input of each layer that the model calls."""
    read: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        if given:
            read.setdefault(name, given[0].detach())

    handles = [layer.register_forward_pre_hook(partial(keep, name)) for name, layer in layers.items()]
    try:
        call(model, inputs)
    except Exception as error:  # of the user's model
        raise ValueError(f"example_inputs must fit the model, got {shown(inputs)}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return read


def _choose(name: str, layer: Layer, inputs: Tensor) -> tuple[LayerTime, nn.Module | None]:
    """Measure a layer in all its forms, and return the times and the fastest form; None if that is the dense one."""
    forms = _forms(layer)
    times = _alternate({DENSE: partial(layer, inputs), **{form: partial(m, inputs) for form, m in forms.items()}})
    best = min(times, key=lambda form: times[form])
    if times[best] > _GAIN * times[DENSE]:
        best = DENSE
    zeros = float((layer.weight == 0).float().mean())
    row = LayerTime(name, tuple(layer.weight.shape), zeros, best, times[DENSE], times[best])
    return row, forms.get(best)


def _forms(layer: Layer) -> dict[str, nn.Module]:
    """Return what may be faster than a layer, by name."""
    forms: dict[str, nn.Module] = {}
    matrix = layer.weight.flatten(1)
    for rows in GROUPS:
        if rows > len(matrix) or part_read(matrix, rows) > _MOST_READ:
            continue
        name = f"groups of {rows}"
        if isinstance(layer, nn.Conv2d):
            forms[name] = SharedFanInConv2d.of(layer, rows)
        if isinstance(layer, nn.Linear):
            forms[name] = SharedFanInLinear.of(layer, rows, by_column=False)
            forms[f"{name} by column"] = SharedFanInLinear.of(layer, rows, by_column=True)
    if isinstance(layer, nn.Linear):
        forms["CSR"] = CSRLinear(layer)
    return forms


def _check_outputs(model: nn.Module, fast: nn.Module, inputs: Inputs) -> None:
    distance = difference(call(model, inputs), call(fast, inputs))
    digits = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if distance > torch.finfo(digits).eps ** 0.5:
        raise ValueError(
            f"model must give the same outputs with layers in other forms, got a difference of {distance:.2e}: its "
            f"outputs must not be random in eval mode"
        )


def _alternate(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median milliseconds of each call, in turns of all."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    times = {}
    for name, run in calls.items():
        run()  # what is set up at first is not measured
        began = time.perf_counter()
        run()
        times[name] = max(1, int(_SECONDS / max(1e-7, time.perf_counter() - began)))
    for _ in range(_ROUNDS):
        for name, run in calls.items():
            began = time.perf_counter()
            for _ in range(times[name]):
                run()
            seconds[name].append((time.perf_counter() - began) / times[name])
    return {name: 1e3 * median(found) for name, found in seconds.items()}
