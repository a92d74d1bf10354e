"""Latency: a table of what each layer of a model takes on one machine, and what of that is left in a smaller model."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NoReturn

from typing_extensions import override

from lightning_prune.units.coupled import CoupledUnits
from lightning_prune.units.layers import LayerUnits
from lightning_prune.units.units import Units
from lightning_prune.updates.parts import Parts
from lightning_prune.validation.arguments import integer, number, numbers
from lightning_prune.validation.instances import path as as_path
from lightning_prune.validation.instances import sequence_of, settle, text
from lightning_prune.validation.states import FRACTION, NUMBER, TEXT, Rule, every, items, optional, record, row, whole


@dataclass(frozen=True)
class LayerTime:
    """What one layer takes, by what is left of its outputs and of its inputs.

    Args:
        weight: The name of its weight.
        dims: The dimensions of the weight that hold its outputs and its inputs; None where these always stay. Of a
            layer that keeps its shape, the first one stands for its units.
        ms: Milliseconds of a forward pass: at least, for all outputs, for all inputs, for all products of both.
        values: How many values it outputs; 0 for a layer that keeps its shape.
        levels: What a layer that keeps its shape takes in place of ``ms``: pairs of the fraction of its units that is
            left and milliseconds in its fastest form, in ascending order. In between, they are interpolated.

    >>> layer = LayerTime("weight", (0, 1), (0.5, 1.0, 0.0, 4.0), 64)
    >>> layer.time({}), layer.time({("weight", 0): 0.5, ("weight", 1): 0.25})
    (5.5, 1.5)
    """

    weight: str
    dims: tuple[int | None, int | None]
    ms: tuple[float, float, float, float]
    values: int = 0
    levels: tuple[tuple[float, float], ...] = ()

    def time(self, parts: Parts) -> float:
        """Return the milliseconds with what is left of its weight."""
        outputs, inputs = self.left(parts)
        least, by_output, by_input, by_both = self.ms
        if self.levels:
            return interpolated(self.levels, outputs)
        return least + by_output * outputs + by_input * inputs + by_both * outputs * inputs

    def left(self, parts: Parts) -> tuple[float, float]:
        """Return which fractions of its outputs and inputs, 0 to 1, are left."""
        outputs, inputs = (1.0 if dim is None else parts.get((self.weight, dim), 1.0) for dim in self.dims)
        return outputs, inputs


@dataclass(frozen=True, repr=False)
class LatencyTable:
    """What each layer of a model takes on one machine: with ``of=table`` a sparsity is a fraction of this time.

    ``measure_latency`` makes one. A pruned model takes the sum of what its layers take, and the rest: what the model
    does outside of layers with weights, by how many values these output.

    Args:
        layers: The layers.
        rest: Milliseconds of the rest: at least, and for all values.
        dense: Milliseconds of the whole model as it was measured.
        granularity: The granularity that it has been measured for, by the name of its class.
        runtime: What ran the model.
        inputs: The shapes of the example inputs, as text.
        threads: How many threads it had.

    Raises:
        ValueError: If a time is negative, that of the whole model is 0, or levels do not ascend.

    >>> table = LatencyTable((LayerTime("weight", (0, None), (0.5, 1.5, 0.0, 0.0), 64),), (0.5, 1.5), 4.0, "Channel")
    >>> table.time({("weight", 0): 0.5}), table.left({("weight", 0): 0.5})
    (2.5, 0.625)
    """

    layers: tuple[LayerTime, ...]
    rest: tuple[float, float]
    dense: float
    granularity: str
    runtime: str = "torch"
    inputs: str = "unknown"
    threads: int = 1

    def __post_init__(self) -> None:
        """Check the arguments."""
        layers = sequence_of("layers", self.layers, LayerTime)
        settle(self, layers=layers, dense=number("dense", self.dense, "(0, inf)"), rest=_times("rest", self.rest, 2))
        settle(self, granularity=text("granularity", self.granularity, "the name of a granularity"))
        settle(self, runtime=text("runtime", self.runtime, "what ran the model"))
        settle(self, threads=integer("threads", self.threads, 1), inputs=text("inputs", self.inputs, "shapes"))
        for layer in layers:
            _times(f"ms of {layer.weight!r}", layer.ms, 4)
            _check_levels(f"levels of {layer.weight!r}", layer.levels)

    def time(self, parts: Parts) -> float:
        """Return the milliseconds of a model of whose parameters these parts are left."""
        least, by_value = self.rest
        return sum(layer.time(parts) for layer in self.layers) + least + by_value * values_left(self.layers, parts)

    def left(self, parts: Parts) -> float:
        """Return the fraction of the dense time, 0 to 1, that such a model takes."""
        return min(1.0, self.time(parts) / self.dense)

    def check(self, units: Sequence[Units], shapes: Mapping[str, Sequence[int]]) -> None:
        """Reject a table of another model, or one that does not say what units cost.

        Args:
            units: Those that are to be pruned.
            shapes: The shapes of the parameters of the model, by name.

        Raises:
            ValueError: If it is not one of this model and these units.
        """
        known = {layer.weight: layer.dims for layer in self.layers}
        for name, dims in known.items():
            if any(dim is not None and dim >= len(shapes.get(name, ())) for dim in dims):
                self._reject(f"of this model, got one with {name!r}")
        for unit in units:
            if not (unit.even or isinstance(unit, CoupledUnits | LayerUnits)):
                self._reject(f"and Channel(coupled=True), got {unit.name!r} without what depends on its channels")
            places = [(name, dim) for name, dim in unit.shares if name in known]
            if not places or (places[0][1] not in known[places[0][0]]):
                self._reject(f"that says what the units of {unit.name!r} cost, got one of {list(known)[:5]}")

    def _reject(self, what: str) -> NoReturn:
        raise ValueError(f"of must be a latency table {what}: make one with measure_latency")

    def to_dict(self) -> dict[str, Any]:
        """Return it in plain numbers, strings, lists and dicts."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LatencyTable":
        """Return the table of what ``to_dict`` returned.

        Raises:
            ValueError: If it is damaged.
        """
        try:
            TABLE("table", values)
        except ValueError as error:
            raise ValueError(f"a latency table must have {error}") from error
        layers = [LayerTime(**{key: _frozen(layer.get(key, ())) for key in _LAYER_KEYS}) for layer in values["layers"]]
        return cls(**{**{key: _frozen(values[key]) for key in _KEYS}, "layers": tuple(layers)})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a JSON file."""
        as_path("path", path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LatencyTable":
        """Return the table of a JSON file.

        Raises:
            ValueError: If ``save`` did not write it.
        """
        file = as_path("path", path)
        try:
            return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"path must be a file that LatencyTable.save wrote, got {file}: {error}") from error

    @override
    def __repr__(self) -> str:
        """Return what it is of, short enough for a plan; other times are told from these by their sum."""
        return (
            f"LatencyTable({len(self.layers)} layers, {self.dense:.6g} ms in {self.runtime} for {self.inputs}, "
            f"{self.threads} threads)"
        )


def measure_name(of: "str | LatencyTable") -> str:
    """Return what a sparsity is a fraction of, by its name.

    >>> measure_name("flops")
    'flops'
    """
    return "latency" if isinstance(of, LatencyTable) else of


def interpolated(levels: Sequence[tuple[float, float]], at: float) -> float:
    """Return the value between those of the two nearest levels, which are in ascending order; outside, of the nearest.

    >>> interpolated([(0.25, 1.0), (0.5, 3.0)], 0.375), interpolated([(0.25, 1.0), (0.5, 3.0)], 1.0)
    (2.0, 3.0)
    """
    for (low, least), (high, most) in pairwise(levels):
        if low <= at <= high:
            return least + (most - least) * (at - low) / (high - low)
    return levels[0][1] if at < levels[0][0] else levels[-1][1]


def values_left(layers: Sequence[LayerTime], parts: Parts) -> float:
    """Return which fraction, 0 to 1, of the values that layers output is left.

    >>> layers = [LayerTime(name, (0, None), (0.0, 0.0, 0.0, 0.0), 8) for name in ("a", "b")]
    >>> values_left(layers, {("a", 0): 0.5})
    0.75
    """
    total = sum(layer.values for layer in layers)
    return sum(layer.values * layer.left(parts)[0] for layer in layers) / total if total else 1.0


def _times(argument: str, value: Any, count: int) -> tuple[float, ...]:
    """Return milliseconds, none below 0, so that less of a model never takes longer."""
    found = numbers(argument, value, "[0, inf)")
    if len(found) != count:
        raise ValueError(f"{argument} must be {count} numbers, got {value}")
    return tuple(found)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _check_levels(name: str, levels: Any) -> None:
    """Reject levels that do not ascend, so that a layer with fewer units would take longer."""
    _LEVELS(name, levels)
    ascending = all(low < high and least <= most for (low, least), (high, most) in pairwise(levels))
    if not ascending or any(not ms >= 0 for _, ms in levels):
        raise ValueError(f"{name} must ascend, from a time of at least 0, got {levels}")


def _levels(path: str, layer: Mapping[str, Any]) -> None:
    _LEVELS(f"{path}.levels", layer.get("levels", ()))  # absent from tables of earlier releases


_MS, _LEVELS = row(NUMBER, NUMBER, NUMBER, NUMBER), items(row(FRACTION, NUMBER))
_LAYER_RULES = {"weight": TEXT, "dims": row(optional(whole()), optional(whole())), "ms": _MS, "values": whole()}
_RULES: dict[str, Rule] = {
    "layers": items(every(record(**_LAYER_RULES), _levels)),
    "rest": row(NUMBER, NUMBER),
    "dense": NUMBER,
    "granularity": TEXT,
    "runtime": TEXT,
    "inputs": TEXT,
    "threads": whole(1),
}
_LAYER_KEYS, _KEYS = [*_LAYER_RULES, "levels"], list(_RULES)
TABLE = record(**_RULES)  # what a saved table has to look like
