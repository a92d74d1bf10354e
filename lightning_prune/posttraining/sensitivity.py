"""Sensitivity analysis: what pruning each layer alone costs in the user's metric."""

import glob
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from tqdm import tqdm
from typing_extensions import override

from lightning_prune import scopes
from lightning_prune.criteria import Criterion, Loss, Magnitude
from lightning_prune.granularities import Granularity, Weight
from lightning_prune.models import summary as report
from lightning_prune.models.parameters import find
from lightning_prune.posttraining.evaluation import Metric, evaluation, loader_of, restoring, tensors_of
from lightning_prune.posttraining.observing import observed_units
from lightning_prune.posttraining.score_cache import Trials, fingerprint, lasting_name
from lightning_prune.updates.decision import decide
from lightning_prune.validation.arguments import choice, number, numbers, real
from lightning_prune.validation.instances import batches, flag, function, instance, settle, text
from lightning_prune.validation.instances import path as as_path
from lightning_prune.validation.values import optional, shown

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


@dataclass(frozen=True)
class SensitivityAnalysis:
    """The scores of a model with one layer pruned at a time; ``str`` returns a table.

    Args:
        metric: Name of the metric.
        mode: Whether a higher ("max") or lower ("min") metric is better.
        dense: The score of the dense model.
        scores: The scores by layer and sparsity.

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
        """Return how much worse than the dense model it is with this layer pruned to this sparsity."""
        worse = self.dense - self.scores[name][level]
        return worse if self.mode == "max" else -worse

    def recommend(self, max_drop: float = 0.01) -> dict[str, float]:
        """Return ``{pattern: sparsity}`` for ``Pruning(sparsity=...)``.

        Each layer gets the highest sparsity up to which, pruned alone, it costs at most ``max_drop``; 0.0 if there is
        none. Pruning layers together costs more than each alone: fine-tune and check.

        Args:
            max_drop: How much worse the metric may become, in its own units.

        Raises:
            ValueError: If ``max_drop`` is negative or not a number.
        """
        max_drop = number("max_drop", max_drop, "[0, inf]")
        found = {}
        for name, scores in self.scores.items():
            found[glob.escape(name)] = 0.0
            for level in sorted(scores):
                if not self.drop(name, level) <= max_drop:  # a NaN stops here too
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
    """Prune each layer alone to each sparsity and score the model, which is left as it was, bit for bit.

    Args:
        model: The trained model; a LightningModule where a Trainer validates it.
        data: A Trainer, whose ``validate`` scores the model, or a loader to pass to ``metric``.
        metric: The name of a metric that validation logs, or, for a loader, ``metric(model, loader) -> float``, called
            in eval mode without gradients.
        levels: Sparsities to try, each in (0, 1).
        mode: Whether a higher ("max") or lower ("min") metric is better.
        criterion: Scores the units; the lowest are pruned.
        granularity: Which weights form a unit.
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out.
        dataloaders: Passed to ``Trainer.validate``; None is the model's own.
        samples: Batches for a criterion that needs data, as ``data`` in ``prune``; None is the loader.
        loss: ``loss(model, batch)`` for a criterion that needs gradients, as in ``prune``.
        path: A JSON file that stores every score, so that an interrupted analysis resumes where it stopped.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If an argument is out of range, validation logs no such metric, or the file at ``path`` belongs to
            another model or analysis.

    Reference: Li et al., 2017, "Pruning Filters for Efficient ConvNets", arXiv:1608.08710, section 3.2.

    >>> import torch
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
    if instance("granularity", granularity, Granularity).normalized:
        raise ValueError(
            f"granularity must have units of single layers, got {granularity}, whose units lie in all of them"
        )
    levels = numbers("levels", levels, "(0, 1)")
    mode = choice("mode", mode, ("max", "min"))
    flag("progress", progress)
    optional(batches, "samples", samples)
    optional(function, "loss", loss, "model", "batch")
    optional(as_path, "path", path)
    evaluate = evaluation(model, data, metric, dataloaders)
    found = find(model, targets, ignore)
    units = observed_units(
        model, found, criterion, granularity, samples if samples is not None else loader_of(data), loss
    )
    analysis = {
        "weights": fingerprint(tensors_of(model)),
        "layers": [unit.name for unit in units],
        "metric": lasting_name(metric),
        "levels": list(levels),
        "mode": mode,
        "criterion": lasting_name(criterion),
        "granularity": lasting_name(granularity),
    }
    cache = Trials(path, analysis)
    with restoring(model) as restore:
        trials = [("", 0.0), *((unit.name, level) for unit in units for level in levels)]
        by_name = {unit.name: unit for unit in units}
        for name, level in _bar([trial for trial in trials if trial not in cache.scores], progress):
            if name:
                allocate = partial(scopes.local, sparsity=level)
                decide([by_name[name]], criterion, allocate, {}).masks.apply(model)
            cache.add(name, level, evaluate())
            restore()
    scores = {unit.name: {level: cache.scores[unit.name, level] for level in levels} for unit in units}
    return SensitivityAnalysis(lasting_name(metric), mode, cache.scores["", 0.0], scores)


def _bar(trials: list[tuple[str, float]], progress: bool) -> Iterable[tuple[str, float]]:
    bar: Iterable[tuple[str, float]] = tqdm(
        trials, "sensitivity", unit="validation", disable=not progress or not trials
    )
    return bar
