"""Allocation search: tries on the model what a searching scope proposes; the weights come back bit for bit."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lightning_prune.criteria import Criterion, Loss
from lightning_prune.granularities import Granularity
from lightning_prune.models.forward import tensors
from lightning_prune.models.preserving import keeping_values
from lightning_prune.posttraining.calibration import take, undisturbed
from lightning_prune.posttraining.divergence import Divergence
from lightning_prune.posttraining.evaluation import evaluation, tensors_of
from lightning_prune.posttraining.observing import forward_stages
from lightning_prune.posttraining.placing import Placed
from lightning_prune.posttraining.score_cache import Trials, fingerprint, lasting_name
from lightning_prune.scopes.searching import Room, Search, Trial
from lightning_prune.tensors.distributed import is_sharded
from lightning_prune.tensors.selection import Scores
from lightning_prune.units.units import Units
from lightning_prune.updates.decision import round_keep, stay_pruned
from lightning_prune.updates.target_sparsity import SparsityTarget

Measure = Callable[[Sequence[int]], float]


@dataclass
class Bench:
    """Where allocations are tried: a model, its targets and the data.

    Args:
        search: The scope.
        floor: The fraction of every target that is kept at least.
        model: The model.
        units: The targets.
        criterion: Scores them.
        batches: The data.
        loss: Runs the model on a batch, if it is given.
    """

    search: Search
    floor: float
    model: nn.Module
    units: Sequence[Units]
    criterion: Criterion
    batches: list[Any]
    loss: Loss | None
    _measure: Measure | None = field(default=None, init=False)
    _known: Trials | None = field(default=None, init=False)

    def measure(self) -> Measure:
        """Return what gives the loss of the model as it is for some batches; the model is dense at the first call."""
        if self._measure is None:
            self._measure = self._dense_divergence() if isinstance(self.search.metric, str) else self._own_metric
        return self._measure

    def _dense_divergence(self) -> Measure:
        fitted = [unit.parameter for unit in self.units]
        (stage,) = forward_stages(self.model, self.batches, self.loss, fitted=fitted)
        return Divergence(stage, self.search.metric)  # type: ignore[arg-type]

    def _own_metric(self, drawn: Sequence[int]) -> float:
        with keeping_values(self.model.buffers()):
            found = evaluation(self.model, [self.batches[number] for number in drawn], self.search.metric, None)()
        return found if self.search.mode == "min" else -found

    def known(self) -> Trials:
        """Return the results of earlier trials, also of an interrupted search; the model is dense at the first call."""
        if self._known is None:
            search = self.search
            data = {str(number): tensor for number, tensor in enumerate(tensors(self.batches))}
            analysis = search.path and {
                "weights": fingerprint(tensors_of(self.model)),
                "targets": [unit.name for unit in self.units],
                "units": [unit.size for unit in self.units],
                "data": fingerprint(data.items()),
                "criterion": lasting_name(self.criterion),
                "loss": self.loss and lasting_name(self.loss),
                "metric": lasting_name(search.metric),
                "mode": search.mode,
            }
            self._known = Trials(search.path, analysis or {})
        return self._known

    def rooms(self, start: Mapping[str, int], scores: Scores) -> dict[str, Room]:
        """Return how many units of each target may stay, at least one if the first allocation keeps any."""
        pruned, found = scores.pruned(), {}
        for unit in self.units:
            least = max(1, unit.minimum, int(self.floor * unit.size))
            low, step = min(start[unit.name], round_keep(unit, least)), unit.round_to
            found[unit.name] = Room(low, max(start[unit.name], unit.size - pruned[unit.name]), step)
        return found


def searched(
    allocations: Sequence[partial[Mapping[str, int]]],
    target: SparsityTarget,
    search: Search,
    granularity: Granularity,
    model: nn.Module,
    units: Sequence[Units],
    criterion: Criterion,
    data: Iterable[Any] | None,
    loss: Loss | None,
    distributed: bool,
) -> tuple[list[Any], list[partial[Mapping[str, int]]]]:
    """Return the data, held in memory, and allocations that search where those given are the ones to begin with.

    Raises:
        ValueError: If the search cannot try anything with these arguments.
    """
    _check(target, search, granularity, units, data, distributed)
    with undisturbed(model):  # a loader may draw random numbers
        batches = list(take(data, None, model))
    if not batches:
        raise ValueError("data must have a batch, got none")
    bench = Bench(search, target.floor, model, units, criterion, batches, loss)
    return batches, [partial(_best, first=first, scope=search, bench=bench) for first in allocations]


def _check(
    target: SparsityTarget,
    search: Search,
    granularity: Granularity,
    units: Sequence[Units],
    data: Iterable[Any] | None,
    distributed: bool,
) -> None:
    if data is None:
        raise ValueError(f"data must be given to try allocations on the model, got None for {search}")
    if not target.is_single or target.of != "units":
        raise ValueError(f'scope must share out one sparsity, of="units", to search, got {search} for {target}')
    if granularity.even or granularity.normalized:
        raise ValueError(f"scope must not search for {granularity}, which leaves nothing to share out, got {search}")
    if distributed:
        raise ValueError(f"distributed must be False for {search}, which compares trials on one rank, got True")
    for unit in units:
        if is_sharded(unit.parameter):
            raise ValueError(f"targets must not be sharded over ranks for {search}, got {unit.name!r}")


@torch.no_grad()
def _best(
    scores: Scores, *, first: Callable[[Scores], Mapping[str, int]], scope: Search, bench: Bench
) -> Mapping[str, int]:
    """Return the best allocation that a search finds."""
    wanted, sizes = first(scores), scores.sizes
    due = {unit.name: unit.size - round_keep(unit, int(wanted[unit.name])) for unit in bench.units}
    start = {name: sizes[name] - count for name, count in stay_pruned(due, scores.pruned(), bench.units).items()}
    trials = scope.trials(start, bench.rooms(start, scores), len(bench.batches))
    with undisturbed(bench.model), _bar(scope) as bar:
        measure, known = bench.measure(), bench.known()
        weights = fingerprint((unit.name, unit.parameter) for unit in bench.units) if scope.path else ""
        with Placed(bench.model, bench.units, scores) as placed:
            try:
                trial = next(trials)
                while True:
                    key = _key(weights, trial)
                    if key not in known.scores:
                        placed.keep(trial.keep)
                        known.add(*key, measure(trial.batches))
                    bar(trial, known.scores[key])
                    loss = known.scores[key]
                    trial = trials.send(loss if loss == loss else float("inf"))
            except StopIteration as end:
                found: dict[str, int] = end.value
                return found


def _key(weights: str, trial: Trial) -> tuple[str, float]:
    """Return what a result is stored under: all that it depends on, and how many batches it is of."""
    what = json.dumps([weights, trial.keep, trial.batches])
    return hashlib.sha256(what.encode()).hexdigest()[:24], len(trial.batches)


@contextmanager
def _bar(search: Search) -> Iterator[Callable[[Trial, float], None]]:
    """Yield a function that shows how far a search is."""
    with tqdm(
        total=search.generations, desc=type(search).__name__, unit="generation", disable=not search.progress
    ) as bar:

        def show(trial: Trial, loss: float) -> None:
            bar.update(trial.generation - bar.n)
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)

        yield show
