"""Timed layers: what each layer takes while the whole model runs, and how that follows from its size.

A layer that is run again and again on its own finds its weights in the cache, and is faster than in its model.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune.models.forward import tensors
from lightning_prune.models.parameters import plain_name
from lightning_prune.models.sizes import outputs_second
from lightning_prune.updates.latency import LayerTime
from lightning_prune.updates.parts import Parts

_LEAST = 5  # rounds
_STEP = 1e-6  # of all units, below the least that one of them can be

Clock = Callable[[], float]
Run = Callable[[], object]
Dims = tuple[int | None, int | None]


class Sample(NamedTuple):
    """The time of a layer, or of the whole model, in a smaller model.

    Args:
        parts: What is left of the model.
        part: The time, as a fraction of that of the whole dense model.
        dense: The weights of layers that are dense in it, because no other form is faster.
    """

    parts: Parts
    part: float
    dense: Collection[str] = ()


@dataclass(frozen=True)
class Spot:
    """A part of a model that is timed.

    Args:
        weight: The name of its weight, by which it is known.
        dims: The dimensions of the weight that hold its outputs and its inputs.
        keeps_shape: Whether pruning leaves zeros in it, with which it may be faster in another form.
    """

    weight: str
    dims: Dims
    keeps_shape: bool = False


def layer_spots(model: nn.Module, places: Mapping[tuple[str, int], float]) -> dict[nn.Module, Spot]:
    """Return the layers with weights; their dimensions are those among the places that can shrink.

    >>> list(layer_spots(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), {("0.weight", 0): 1.0}).values())
    [Spot(weight='0.weight', dims=(0, None), keeps_shape=False)]
    """
    names: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters():
        names[parameter] = plain_name(name)
    spots = {}
    for module in model.modules():
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        inner = any(True for child in module.children() for _ in child.parameters())
        if own and (not inner or isinstance(module, nn.MultiheadAttention)):
            weight = max(own, key=lambda parameter: parameter.ndim)
            name = names[weight]
            outputs, inputs = (dim if (name, dim or 0) in places else None for dim in _dims(module, weight))
            spots[module] = Spot(name, (outputs, inputs))
    return spots


def _dims(layer: nn.Module, weight: Tensor) -> Dims:
    depthwise = isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == layer.in_channels == layer.out_channels
    if weight.ndim == 1 or (depthwise and weight.shape[1] == 1 < weight.shape[0]):
        return (0, None)
    if isinstance(layer, nn.Embedding):
        return (1, None)
    outputs = int(outputs_second(layer))
    return (outputs, 1 - outputs)


def took(run: Run, clock: Clock) -> float:
    """Return the seconds that a function takes."""
    began = clock()
    run()
    return clock() - began


def rounds_within(seconds: float, once: float, most: int) -> int:
    """Return how many rounds to time of what takes so many seconds once: no more than fit, but five at least.

    >>> rounds_within(1.0, 0.1, 25), rounds_within(1.0, 0.001, 25), rounds_within(1.0, 10.0, 25)
    (10, 25, 5)
    """
    return round(min(most, max(_LEAST, seconds / max(1e-6, once))))


@dataclass
class Watch:
    """What each spot of a model has taken in one forward pass."""

    seconds: dict[str, float] = field(default_factory=dict)
    values: dict[str, int] = field(default_factory=dict)


@contextmanager
def watching(spots: Mapping[nn.Module, Spot], clock: Clock) -> Iterator[Watch]:
    """Time the spots of a model in the forward passes inside.

    >>> layer = nn.Linear(2, 3)
    >>> from time import perf_counter
    >>> with watching({layer: Spot("weight", (0, 1))}, perf_counter) as watch:
    ...     _ = layer(torch.zeros(4, 2))
    >>> watch.values, watch.seconds.keys()
    ({'weight': 12}, dict_keys(['weight']))
    """
    watch, began = Watch(), list[float]()

    def enter(module: nn.Module, args: Any) -> None:
        began.append(clock())

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        passed, name = clock() - began.pop(), spots[module].weight
        watch.seconds[name] = watch.seconds.get(name, 0.0) + passed
        watch.values[name] = watch.values.get(name, 0) + max((part.numel() for part in tensors(output)), default=0)

    handles = [spot.register_forward_pre_hook(enter) for spot in spots]
    handles += [spot.register_forward_hook(leave) for spot in spots]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def fitted(spot: Spot, values: int, ms: float, samples: Sequence[Sample]) -> LayerTime:
    """Return the time of a layer as a function of its size, from samples of smaller models.

    Args:
        spot: The layer.
        values: How many values it outputs.
        ms: What the whole model takes.
        samples: Of the layer.

    >>> parts = [{("weight", 0): left} for left in (1.0, 0.75, 0.5)]
    >>> layer = fitted(Spot("weight", (0, None)), 64, 10.0, list(map(Sample, parts, (0.5, 0.4, 0.3))))
    >>> [round(ms, 6) for ms in layer.ms]
    [1.0, 4.0, 0.0, 0.0]
    """
    shape = LayerTime(spot.weight, spot.dims, (0.0, 0.0, 0.0, 0.0), values)
    outputs, inputs = torch.tensor([shape.left(sample.parts) for sample in samples], dtype=torch.float64).unbind(1)
    columns = {0: torch.ones_like(outputs)}
    columns |= {1: outputs} if spot.dims[0] is not None else {}
    columns |= {2: inputs} if spot.dims[1] is not None else {}
    columns |= {3: outputs * inputs} if None not in spot.dims else {}
    found = at_least_zero(torch.stack(list(columns.values()), 1), [ms * sample.part for sample in samples])
    factors = dict(zip(columns, found, strict=True))
    least, by_output, by_input, by_both = (factors.get(place, 0.0) for place in range(4))
    return LayerTime(spot.weight, spot.dims, (least, by_output, by_input, by_both), values)


def in_levels(spot: Spot, ms: float, samples: Sequence[Sample]) -> LayerTime:
    """Return the time of a layer that keeps its shape, level by level; fewer units never take longer.

    Args:
        spot: The layer.
        ms: What the whole model takes.
        samples: Of the layer, in sparser models and in the dense one.

    >>> found = (1.0, 0.5, {"weight"}), (0.2, 0.6, {"weight"}), (0.1, 0.2, ())
    >>> samples = [Sample({("weight", 0): left}, part, dense) for left, part, dense in found]
    >>> in_levels(Spot("weight", (0, None), keeps_shape=True), 10.0, samples).levels
    ((0.1, 2.0), (0.100001, 5.5), (0.2, 5.5), (1.0, 5.5))
    """
    place = (spot.weight, spot.dims[0] or 0)
    whole = ms * median(sample.part for sample in samples if spot.weight in sample.dense)
    faster = {sample.parts[place]: ms * sample.part for sample in samples if spot.weight not in sample.dense}
    taken, most = dict[float, float](), whole
    for left in sorted({sample.parts[place] for sample in samples}, reverse=True):
        most = taken[left] = min(most, faster.get(left, whole))
    levels = list[tuple[float, float]]()
    for left, time in sorted(taken.items()):
        if levels and time == whole > levels[-1][1]:
            levels.append((levels[-1][0] + _STEP, whole))  # in between it may be dense as well
        levels.append((left, time))
    return LayerTime(spot.weight, spot.dims, (0.0, 0.0, 0.0, 0.0), levels=tuple(levels))


def at_least_zero(columns: Tensor, wanted: Sequence[float]) -> list[float]:
    """Return the factors of a few columns, none below 0, whose sum is nearest to what is wanted.

    >>> at_least_zero(torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64), [2.0, -1.0])
    [2.0, 0.0]
    """
    goal = torch.tensor(wanted, dtype=torch.float64)
    least, best = float(goal.square().sum()), [0.0] * columns.shape[1]
    for count in range(1, columns.shape[1] + 1):
        for some in combinations(range(columns.shape[1]), count):
            chosen = columns[:, some]
            factors = torch.linalg.lstsq(chosen, goal[:, None], driver="gelsd").solution[:, 0]
            error = float((chosen @ factors - goal).square().sum())
            if factors.min() >= 0 and error < least * (1 - 1e-9):
                least, found = error, dict(zip(some, factors.tolist(), strict=True))
                best = [found.get(place, 0.0) for place in range(columns.shape[1])]
    return best
