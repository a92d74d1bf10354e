"""Measuring latency: makes the table of what the layers of a model take on this machine."""

import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Literal, get_args

import torch
from torch import nn

from lightning_prune.export.fast import layers_with_forms
from lightning_prune.granularities import Channel, Granularity, SharedFanIn
from lightning_prune.granularities.shrinkable import shrinkable
from lightning_prune.models.forward import Inputs, call, device_of, fitting, needed_example_of, tensors
from lightning_prune.models.parameters import find, plain_name
from lightning_prune.models.preserving import cacheless, eager
from lightning_prune.models.summary import shape_text
from lightning_prune.tensors.distributed import from_first_rank
from lightning_prune.units.units import Units
from lightning_prune.updates import onnx_timing
from lightning_prune.updates.latency import LatencyTable, LayerTime, measure_name, values_left
from lightning_prune.updates.smaller_copies import SmallerCopy, smaller_copy
from lightning_prune.updates.timed_layers import (
    Clock,
    Sample,
    Spot,
    at_least_zero,
    fitted,
    in_levels,
    rounds_within,
    took,
    watching,
)
from lightning_prune.validation.arguments import choice
from lightning_prune.validation.instances import instance

_ALIKE = (0.25, 0.5, 0.75)  # of all units, in the first smaller models
_RANDOM = {"torch": 16, "onnxruntime": 8}  # more, each of whose targets keeps another part; exports take long
_MOST, _SECONDS = 25, 0.1  # rounds of each, and what the dense model may take in all
_SPARSE = (0.4, 0.24, 0.12, 0.06, 0.03, 0.015)  # of all units, where layers that keep their shape have other forms
Runtime = Literal["torch", "onnxruntime"]
_RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)


def measure_latency(
    model: nn.Module,
    example_inputs: Inputs = None,
    granularity: Granularity = Channel(),
    runtime: Runtime = "torch",
) -> LatencyTable:
    """Return what each layer of a model takes on this machine, in eval mode: for ``of=``, to keep and to use again.

    The model and some twenty smaller copies of it, of random widths, run in turns. Every layer is timed while they run,
    and its time is fitted as a function of how many outputs and inputs it has. The batch size is that of the example
    inputs, the number of threads the one that torch has now. With one thread, time is CPU time, which other processes
    hardly disturb. It takes as long as some 300 forward passes.

    ONNX Runtime has no time for a layer, which it merges with its neighbours. There the copies are exported and run
    whole, and their times are explained by the FLOPs of each kind of layer. To export them takes a minute or so.

    With ``SharedFanIn()`` there are six copies, each with the same fraction of all units. Every layer is in the form
    that ``to_fast`` chooses, and the table holds its times. ONNX Runtime runs the copies in these forms; what one saves
    is divided among its layers by their FLOPs.

    Args:
        model: Any module on the CPU; it is left as it is.
        example_inputs: A tensor, a tuple of arguments or a dict of keyword arguments, with the batch size of use; None
            takes the ``example_input_array`` of a ``LightningModule``.
        granularity: What is going to be pruned: ``Channel()``, ``Head()``, ``Layer()`` or ``ResidualChannel()``, whose
            ``round_to`` counts, since odd numbers of channels may be slow; or ``SharedFanIn()``, with the form of each
            layer that ``to_fast`` chooses.
        runtime: What is going to run the model: "torch" or "onnxruntime".

    Raises:
        ValueError: If the model is not on the CPU or cannot be exported, or its units cannot be found.
        ImportError: If ONNX Runtime, or what it takes to export models, is not installed.

    Reference: Frantar and Alistarh, 2022, "SPDY: Accurate Pruning with Speedup Guarantees", arXiv:2201.13096.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> table = measure_latency(model, torch.randn(2, 8))
    >>> [layer.weight for layer in table.layers], table.runtime, table.inputs
    (['0.weight', '2.weight'], 'torch', '2 x 8')
    """
    instance("model", model, nn.Module)
    inputs = needed_example_of(model, example_inputs)
    granularity = _timed(granularity, "measure_latency")
    runtime = choice("runtime", runtime, _RUNTIMES)
    units, _ = granularity.find_units(find(model), model, inputs)
    return latency_table(units, granularity, model, inputs, runtime=runtime)


def check_measure(of: str | LatencyTable, granularity: Granularity) -> None:
    """Reject what a sparsity cannot be a fraction of with these units.

    Raises:
        ValueError: If they cannot be counted in it, or a table is one of other units.
    """
    if measure_name(of) not in granularity.measures:
        allowed = " or ".join(f'"{measure}"' for measure in granularity.measures)
        raise ValueError(f"of must be {allowed} for {granularity}, got {of!r}")
    if measure_name(of) == "latency":
        _timed(granularity, f"of={of!r}")
    if isinstance(of, LatencyTable) and of.granularity != type(granularity).__name__:
        raise ValueError(f"of must be a latency table for {granularity}, got one for {of.granularity}()")


def _timed(granularity: Granularity, where: str) -> Granularity:
    """Return a granularity that makes models faster, whose channels are coupled.

    Raises:
        ValueError: If it does not.
    """
    if "latency" not in instance("granularity", granularity, Granularity).measures:
        raise ValueError(
            f"granularity must be Channel(), Head(), Layer(), ResidualChannel() or SharedFanIn() to make the model "
            f"faster, got {granularity} with {where}"
        )
    # layers with shared fan-in are not cut, but run in another form
    return granularity if isinstance(granularity, SharedFanIn) else shrinkable(granularity, where)


def latency_table(
    units: Sequence[Units],
    granularity: Granularity,
    model: nn.Module,
    inputs: Inputs,
    distributed: bool = False,
    runtime: Runtime = "torch",
) -> LatencyTable:
    """Return the table for units that are known; with several ranks that of the first one, which all must call.

    Raises:
        ValueError: If there are no example inputs, or the model is not on the CPU.
    """
    if inputs is None:
        raise ValueError('of="latency" needs example inputs: example_input_array, or example_inputs of prune()')
    if device_of(model).type != "cpu":
        raise ValueError(
            f"the model must be on the CPU to be timed, got {device_of(model)}: give of= a LatencyTable that "
            f"measure_latency(model, ...) has made on the CPU"
        )
    measure = partial(_measured, units, granularity, model, fitting(inputs, model), runtime)
    return from_first_rank(measure) if distributed else measure()


def _measured(
    units: Sequence[Units], granularity: Granularity, model: nn.Module, inputs: Inputs, runtime: Runtime
) -> LatencyTable:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    dense = smaller_copy(model, units, [1.0] * len(units))
    designs: Iterable[list[float]] = _designs(len(units), _RANDOM[runtime])
    if isinstance(granularity, SharedFanIn):
        _check_forms(units, model, dense)
        # ONNX Runtime has timed the dense model beside each copy
        designs = ([level] * len(units) for level in ((1.0, *_SPARSE) if runtime == "torch" else _SPARSE))
    smaller = (smaller_copy(model, units, levels, inputs) for levels in designs)
    with torch.no_grad(), eager(), torch.random.fork_rng(devices=[]), cacheless(dense.model):
        with watching(dense.spots, clock) as watch:
            call(dense.model, inputs)
        if runtime == "torch":
            layers, rest, ms = _in_torch(dense, smaller, inputs, clock, watch.values)
        else:
            ms, samples = onnx_timing.timed(dense, smaller, inputs, clock)
            explained = onnx_timing.by_level if isinstance(granularity, SharedFanIn) else onnx_timing.by_work
            layers, rest = explained(onnx_timing.works_of(dense, inputs, watch.values), ms, samples)
    shapes = ", ".join(shape_text(tensor.shape) for tensor in tensors(inputs))
    return LatencyTable(layers, rest, ms, type(granularity).__name__, runtime, shapes, torch.get_num_threads())


def _check_forms(units: Sequence[Units], model: nn.Module, dense: SmallerCopy) -> None:
    """Reject targets whose zeros cannot make a model faster, or of which the time is not known."""
    names, timed = [unit.name for unit in units], {spot.weight for spot in dense.spots.values()}
    if not {f"{plain_name(name)}.weight".lstrip(".") for name, _ in layers_with_forms(model)}.intersection(names):
        raise ValueError(
            f'targets must hold linear layers or 1 x 1 convolutions, which to_fast makes faster, for of="latency" with '
            f"SharedFanIn(), got {names[:5]}"
        )
    if missing := [name for name in names if name not in timed]:
        raise ValueError(f'targets must be one for each layer for of="latency", got {missing[:5]} too: ignore them')


def _in_torch(
    dense: SmallerCopy, smaller: Iterator[SmallerCopy], inputs: Inputs, clock: Clock, values: Mapping[str, int]
) -> tuple[tuple[LayerTime, ...], tuple[float, float], float]:
    """Return the times of layers, of the rest, and of the whole model, by what layers take in smaller models."""
    samples: dict[Spot, list[Sample]] = {spot: [] for spot in dense.spots.values()}
    rest, whole = list[Sample](), list[float]()
    for small in smaller:
        with cacheless(small.model):
            took, alone, inside = _in_turns(dense, small, inputs, clock)
        whole.append(took)
        rest.append(Sample(small.parts, (alone - sum(inside.values())) / took))
        for spot, found in samples.items():
            found.append(Sample(small.parts, inside.get(spot.weight, 0.0) / took, small.dense))
    ms = 1e3 * median(whole)
    layers = [
        in_levels(spot, ms, found) if spot.keeps_shape else fitted(spot, values.get(spot.weight, 0), ms, found)
        for spot, found in samples.items()
    ]
    columns = [[1.0, values_left(layers, sample.parts)] for sample in rest]
    least, by_value = at_least_zero(torch.tensor(columns, dtype=torch.float64), [ms * sample.part for sample in rest])
    return tuple(layers), (least, by_value), ms


def _designs(targets: int, others: int) -> Iterator[list[float]]:
    """Yield what is left of each target in each of the smaller models."""
    source = random.Random(0)
    yield from ([level] * targets for level in _ALIKE)
    yield from ([source.uniform(0.1, 1.0) for _ in range(targets)] for _ in range(others))


def _in_turns(
    dense: SmallerCopy, small: SmallerCopy, inputs: Inputs, clock: Clock
) -> tuple[float, float, dict[str, float]]:
    """Return the seconds of a model, of a smaller one, and of each spot of the latter by the name of its weight."""
    first, second = partial(call, dense.model, inputs), partial(call, small.model, inputs)
    took(second, clock)  # what is set up at first is not measured
    rounds = rounds_within(_SECONDS, took(first, clock), _MOST)
    before, alone, inside = list[float](), list[float](), list[Mapping[str, float]]()
    for _ in range(rounds):
        before.append(took(first, clock))
        alone.append(took(second, clock))
        with watching(small.spots, clock) as watch:
            second()
        inside.append(watch.seconds)
    return median(before), median(alone), {name: median(each[name] for each in inside) for name in inside[0]}
