"""Sensitivity analysis: what each layer, pruned alone, costs in the user's own metric."""

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from tqdm import tqdm
from typing_extensions import override

from lightning_prune import scopes
from lightning_prune.criteria import Criterion, Loss, Magnitude
from lightning_prune.granularities import Granularity, Weight
from lightning_prune.models import summary as report
from lightning_prune.models.parameters import find
from lightning_prune.models.preserving import keeping_gradients, keeping_modes
from lightning_prune.posttraining.observing import observed_units
from lightning_prune.posttraining.score_cache import Trials, fingerprint, lasting_name
from lightning_prune.updates.decision import decide
from lightning_prune.validation.arguments import choice, flag, number, numbers, real, text
from lightning_prune.validation.instances import batches, function, instance, settle
from lightning_prune.validation.instances import path as as_path
from lightning_prune.validation.values import optional, shown

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

Metric = str | Callable[[nn.Module, Any], float]


@dataclass(frozen=True)
class SensitivityAnalysis:
    """The scores of a model with one layer pruned at a time; as text a table.

    Args:
        metric: Name of the metric.
        mode: Whether more ("max") or less ("min") of it is better.
        dense: The score of the model as it was.
        scores: The score by layer and sparsity.

    >>> analysis = SensitivityAnalysis("accuracy", "max", 0.9, {"0.weight": {0.5: 0.9, 0.9: 0.7}})
    >>> print(analysis)
    accuracy  dense      50%     90%
    --------------------------------
    0.weight  0.9000  0.9000  0.7000
    >>> analysis.recommend(max_drop=0.01)
    {'0.weight': 0.5}
    """

    metric: str
    mode: Literal["max", "min"]
    dense: float
    scores: dict[str, dict[float, float]]

    def __post_init__(self) -> None:
        """Check the arguments."""
        text("metric", self.metric, "the name of a metric")
        choice("mode", self.mode, ("max", "min"))
        settle(self, dense=real("dense", self.dense))
        for name, scores in instance("scores", self.scores, dict).items():
            for level, score in instance(f"scores[{name!r}]", scores, dict).items():
                real(f"scores[{name!r}][{shown(level)}]", score)

    def drop(self, name: str, level: float) -> float:
        """Return by how much the score of a layer at a sparsity is worse than that of the dense model."""
        worse = self.dense - self.scores[name][level]
        return worse if self.mode == "max" else -worse

    def recommend(self, max_drop: float = 0.01) -> dict[str, float]:
        """Return ``{pattern: sparsity}`` for ``Pruning(sparsity=...)``.

        Each layer gets the highest level up to which, pruned alone, it costs no more than that; 0.0 if there is none.
        Layers pruned together cost more than each alone: fine-tune, and check.

        Args:
            max_drop: By how much the metric may become worse, in its own units.

        Raises:
            ValueError: If the bound is negative or not a number.
        """
        max_drop = number("max_drop", max_drop, "[0, inf]")
        found = {}
        for name, scores in self.scores.items():
            found[glob.escape(name)] = 0.0
            for level in sorted(scores):
                if not self.drop(name, level) <= max_drop:  # also where the score is NaN
                    break
                found[glob.escape(name)] = level
        return found

    @override
    def __str__(self) -> str:
        levels = sorted({level for scores in self.scores.values() for level in scores})
        cells = [(self.metric, "dense", *(f"{level:.4g}%" for level in (100 * level for level in levels)))]
        for name, scores in self.scores.items():
            cells.append((name, f"{self.dense:.4f}", *(f"{scores[level]:.4f}" for level in levels)))
        lines = report.table(cells)
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def sensitivity(
    model: nn.Module,
    data: "Trainer | Iterable[Any]",
    metric: Metric,
    levels: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95),
    *,
    mode: Literal["max", "min"] = "max",
    criterion: Criterion = Magnitude(),
    granularity: Granularity = Weight(),
    targets: Sequence[str] = (),
    ignore: Sequence[str] = (),
    dataloaders: Any = None,
    samples: Iterable[Any] | None = None,
    loss: Loss | None = None,
    path: str | Path | None = None,
    progress: bool = True,
) -> SensitivityAnalysis:
    """Prune each layer alone, at several levels, and score the model; it is left as it was, bit for bit.

    Args:
        model: The trained model; a LightningModule where a Trainer validates it.
        data: A Trainer, whose ``validate`` scores the model, or a loader that ``metric`` is given.
        metric: The name of a metric that validation logs, or for a loader ``metric(model, loader) -> float``, called
            in eval mode without gradients.
        levels: Sparsities to try, each in (0, 1).
        mode: Whether more ("max") or less ("min") of the metric is better.
        criterion: Scores the units; the lowest go.
        granularity: Which weights form a unit.
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out.
        dataloaders: Passed on to ``Trainer.validate``; None is the model's own.
        samples: Batches for a criterion that observes, as ``data`` of ``prune``; None is the loader.
        loss: ``loss(model, batch)`` for a criterion that needs gradients, as in ``prune``.
        path: A JSON file that keeps every score, so that an interrupted analysis goes on where it stopped.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If an argument is out of range, validation logs no such metric, or the file at ``path`` belongs to
            another model or analysis.

    Reference: Li et al., 2017, "Pruning Filters for Efficient ConvNets", arXiv:1608.08710, section 3.2.

    >>> model = nn.Linear(10, 1, bias=False)
    >>> model.weight.data = torch.arange(10.0)[None]
    >>> def total(model, loader):
    ...     return sum(float(model(batch)) for batch in loader)
    >>> print(sensitivity(model, [torch.ones(1, 10)], total, levels=[0.2, 0.5], progress=False))
    total   dense        20%      50%
    ---------------------------------
    weight  45.0000  44.0000  35.0000
    """
    instance("model", model, nn.Module)
    instance("criterion", criterion, Criterion)
    instance("granularity", granularity, Granularity)
    levels = numbers("levels", levels, "(0, 1)")
    mode = choice("mode", mode, ("max", "min"))
    flag("progress", progress)
    optional(batches, "samples", samples)
    optional(function, "loss", loss, "model", "batch")
    optional(as_path, "path", path)
    evaluate = _evaluation(model, data, metric, dataloaders)
    found = find(model, targets, ignore)
    units = observed_units(
        model, found, criterion, granularity, samples if samples is not None else _loader(data), loss
    )
    measured = {
        "weights": fingerprint(_tensors(model)),
        "layers": [unit.name for unit in units],
        "metric": lasting_name(metric),
        "levels": list(levels),
        "mode": mode,
        "criterion": lasting_name(criterion),
        "granularity": lasting_name(granularity),
    }
    store = Trials(path, measured)
    with _restoring(model) as restore:
        trials = [("", 0.0), *((unit.name, level) for unit in units for level in levels)]
        by_name = {unit.name: unit for unit in units}
        for name, level in _bar([trial for trial in trials if trial not in store.scores], progress):
            if name:
                allocate = partial(scopes.local, sparsity=level)
                decide([by_name[name]], criterion, allocate, {}).masks.apply(model)
            store.add(name, level, evaluate())
            restore()
    scores = {unit.name: {level: store.scores[unit.name, level] for level in levels} for unit in units}
    return SensitivityAnalysis(lasting_name(metric), mode, store.scores["", 0.0], scores)


def _loader(data: Any) -> Iterable[Any] | None:
    return None if hasattr(data, "validate") and not isinstance(data, type) else batches("data", data)


def _evaluation(model: nn.Module, data: Any, metric: Metric, dataloaders: Any) -> Callable[[], float]:
    """Return the function that scores the model as it is now."""
    if _loader(data) is None:
        if not isinstance(metric, str):
            raise ValueError(
                f"metric must be the name of a metric that the Trainer's validation logs, got {shown(metric)}"
            )
        return lambda: _validate(model, data, metric, dataloaders)
    if isinstance(metric, str):
        raise ValueError(f"metric must be a function of model and loader where no Trainer is given, got {metric!r}")
    score = function("metric", metric, "model", "loader")

    def evaluate() -> float:
        model.eval()
        with torch.no_grad():
            found: Any = score(model, data)
            return real("what metric returns", found.squeeze() if isinstance(found, Tensor) else found)

    return evaluate


def _validate(model: nn.Module, trainer: Any, metric: str, dataloaders: Any) -> float:
    logged = {
        name: value for result in trainer.validate(model, dataloaders, verbose=False) for name, value in result.items()
    }
    if metric not in logged:
        raise ValueError(f"metric must be one that validation logs, got {metric!r}; logged: {sorted(logged)}")
    return float(logged[metric])


@contextmanager
def _restoring(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Give a function that puts parameters and buffers back; the end does so too, and puts modes and gradients back."""
    saved = {name: tensor.detach().clone() for name, tensor in _tensors(model)}

    @torch.no_grad()
    def restore() -> None:
        for name, tensor in _tensors(model):
            tensor.copy_(saved[name])

    with keeping_modes(model), keeping_gradients(model):
        try:
            yield restore
        finally:
            restore()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from (entry for entry in model.named_parameters() if not is_lazy(entry[1]))
    yield from (entry for entry in model.named_buffers() if not is_lazy(entry[1]))


def _bar(trials: list[tuple[str, float]], progress: bool) -> Iterable[tuple[str, float]]:
    bar: Iterable[tuple[str, float]] = tqdm(
        trials, "sensitivity", unit="validation", disable=not progress or not trials
    )
    return bar
