"""ONNX Runtime as the clock: what whole models take in it, and how that follows from the work of their layers.

ONNX Runtime merges layers with what follows them, so that a layer has no time of its own there. But its time follows
the products that it computes closely, at a speed that depends on the kind of layer.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import nn

from lightning_prune.export.onnx import export_onnx, known_to_onnx
from lightning_prune.export.sparse_layers import CSRLinear
from lightning_prune.models.flops import dense_flops
from lightning_prune.models.forward import Inputs, tensors
from lightning_prune.models.parameters import named_parameters
from lightning_prune.models.preserving import cacheless
from lightning_prune.updates.latency import LayerTime, values_left
from lightning_prune.updates.smaller_copies import SmallerCopy
from lightning_prune.updates.timed_layers import (
    Clock,
    Run,
    Sample,
    Spot,
    at_least_zero,
    in_levels,
    rounds_within,
    took,
)

_KINDS = 5  # of layers that have a speed of their own; the others share one
_MOST, _SECONDS = 51, 0.3  # rounds of each, and what the dense model may take in all


@dataclass(frozen=True)
class Work:
    """What a layer has to compute.

    Args:
        spot: The layer.
        kind: What its speed depends on: its class, and the kernel of a convolution.
        flops: FLOPs of the whole layer.
        values: How many values it outputs.
    """

    spot: Spot
    kind: str
    flops: float
    values: int

    def layer(self, ms: float) -> LayerTime:
        """Return its time, from the milliseconds of one FLOP."""
        return LayerTime(self.spot.weight, self.spot.dims, (0.0, 0.0, 0.0, ms * self.flops), self.values)


def works_of(dense: SmallerCopy, inputs: Inputs, values: dict[str, int]) -> list[Work]:
    """Return what the layers of a model have to compute.

    Args:
        dense: The model.
        inputs: Its example inputs.
        values: How many values each layer outputs, by the name of its weight.
    """
    flops = dense_flops(dense.model, inputs)
    names = {parameter: name for name, parameter in named_parameters(dense.model).items()}
    works = []
    for module, spot in dense.spots.items():
        own = sum(flops.get(names[parameter], 0) for parameter in set(module.parameters()))
        works.append(Work(spot, _kind(module), float(own), values.get(spot.weight, 0)))
    total = dict.fromkeys((work.kind for work in works), 0.0)
    for work in works:
        total[work.kind] += work.flops
    largest = sorted(total, key=lambda kind: -total[kind])[:_KINDS]
    return [work if work.kind in largest else Work(work.spot, "", work.flops, work.values) for work in works]


def _kind(module: nn.Module) -> str:
    kernel = getattr(module, "kernel_size", "")
    return f"{type(module).__name__} {kernel} {getattr(module, 'groups', 1) > 1}"


def timed(
    dense: SmallerCopy, smaller: Iterable[SmallerCopy], inputs: Inputs, clock: Clock
) -> tuple[float, list[Sample]]:
    """Return the milliseconds of a model in ONNX Runtime, and what part of them smaller ones take.

    Raises:
        ImportError: If ONNX Runtime, or what it takes to export models, is not installed.
        ValueError: If a model cannot be exported.
    """
    every_layer = {spot.weight for spot in dense.spots.values()}
    whole, samples, first = list[float](), [Sample(dense.parts, 1.0, every_layer)], session(dense.model, inputs)
    for small in smaller:
        with cacheless(small.model):
            second = session(small.model, inputs)
        before, after = in_turns(first, second, clock)
        whole.append(before)
        samples.append(Sample(small.parts, after / before, {*small.dense, *_dense_in_onnx(small)}))
    return 1e3 * median(whole), samples


def _dense_in_onnx(small: SmallerCopy) -> Iterator[str]:
    """Yield the weights of layers that are sparse in torch, but dense in ONNX Runtime."""
    for layer, spot in small.spots.items():
        if isinstance(layer, CSRLinear) and isinstance(known_to_onnx(layer), nn.Linear):
            yield spot.weight


def session(model: nn.Module, inputs: Inputs) -> Run:
    """Return a function that runs a model in ONNX Runtime, on as many threads as torch has."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export_onnx(model, inputs, file, batch_axis=None)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        running = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in running.get_inputs()]
    arrays = [tensor.detach().numpy() for tensor in tensors(inputs)]
    feed = dict(zip(names, arrays, strict=True))
    return lambda: running.run(None, feed)


def in_turns(first: Run, second: Run, clock: Clock) -> tuple[float, float]:
    """Return the median seconds of two functions that run in turns."""
    took(second, clock)  # what is set up at first is not measured
    rounds = rounds_within(_SECONDS, took(first, clock), _MOST)
    found = [(took(first, clock), took(second, clock)) for _ in range(rounds)]
    before, after = zip(*found, strict=True)
    return median(before), median(after)


def by_work(
    works: Sequence[Work], ms: float, samples: Sequence[Sample]
) -> tuple[tuple[LayerTime, ...], tuple[float, float]]:
    """Return the times of layers and of the rest that together explain what smaller models take.

    Args:
        works: What the layers have to compute.
        ms: Milliseconds of the whole model.
        samples: What is left of smaller models, and what part of the time they take.

    >>> works = [Work(Spot(name, (0, None)), "Linear", 10.0, 0) for name in ("a", "b")]
    >>> found = ({}, 1.0), ({("a", 0): 0.5}, 0.8), ({("a", 0): 0.5, ("b", 0): 0.5}, 0.6)
    >>> samples = [Sample(parts, part) for parts, part in found]
    >>> layers, rest = by_work(works, 5.0, samples)
    >>> [round(layer.time({}), 6) for layer in layers], [round(part, 6) for part in rest]
    ([2.0, 2.0], [1.0, 0.0])
    """
    kinds = sorted({work.kind for work in works})
    layers = [work.layer(1.0) for work in works]
    scale = max(1.0, sum(work.flops for work in works))
    rows = []
    for parts, _, _ in samples:
        left = dict.fromkeys(kinds, 0.0)
        for work, layer in zip(works, layers, strict=True):
            left[work.kind] += layer.time(parts) / scale
        rows.append([1.0, values_left(layers, parts), *(left[kind] for kind in kinds)])
    columns = torch.tensor(rows, dtype=torch.float64)
    least, by_value, *speeds = at_least_zero(columns, [ms * sample.part for sample in samples])
    speed = dict(zip(kinds, speeds, strict=True))
    return tuple(work.layer(speed[work.kind] / scale) for work in works), (least, by_value)


def by_level(
    works: Sequence[Work], ms: float, samples: Sequence[Sample]
) -> tuple[tuple[LayerTime, ...], tuple[float, float]]:
    """Return the times of layers that keep their shape, level by level, and the time that pruning does not save.

    The time that each model saves over the one before it is divided among the layers that are not dense in it, by the
    FLOPs that they skip in addition.

    Args:
        works: What the layers have to compute.
        ms: Milliseconds of the whole model.
        samples: The dense model, and sparser and sparser ones.

    >>> spots = [Spot(name, (0, None), keeps_shape=True) for name in ("a", "b")]
    >>> works = [Work(spot, "Linear", 20.0, 0) for spot in spots]
    >>> found = (1.0, 1.0, {"a", "b"}), (0.5, 0.8, {"b"}), (0.25, 0.4, ())
    >>> samples = [Sample({("a", 0): left, ("b", 0): left}, part, dense) for left, part, dense in found]
    >>> layers, rest = by_level(works, 10.0, samples)
    >>> [[round(layer.time(sample.parts), 6) for sample in samples] for layer in layers]
    [[3.0, 1.0, 0.0], [3.0, 3.0, 0.0]]
    >>> rest
    (4.0, 0.0)
    """
    targets = {work.spot.weight: work for work in works if work.spot.keeps_shape}
    shapes = {name: work.layer(1.0) for name, work in targets.items()}
    saved, lefts = dict.fromkeys(targets, 0.0), dict.fromkeys(targets, 1.0)
    each, before = list[dict[str, float]](), 1.0
    for sample in samples:
        now = {name: shape.left(sample.parts)[0] for name, shape in shapes.items() if name not in sample.dense}
        skipped = {name: targets[name].flops * max(0.0, lefts[name] - left) for name, left in now.items()}
        if sum(skipped.values()):
            gain = max(0.0, before - sample.part) / sum(skipped.values())
            saved |= {name: saved[name] + gain * flops for name, flops in skipped.items()}
            lefts, before = lefts | now, min(before, sample.part)
        each.append(dict(saved))

    def remaining(name: str, sample: Sample, at: dict[str, float]) -> Sample:
        return Sample(sample.parts, saved[name] - (0.0 if name in sample.dense else at[name]), sample.dense)

    found = list(zip(samples, each, strict=True))
    layers = [
        in_levels(work.spot, ms, [remaining(name, sample, at) for sample, at in found])
        for name, work in targets.items()
    ]
    return tuple(layers), (ms * before, 0.0)
