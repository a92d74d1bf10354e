"""Plots: schedules, sparsity, history, sensitivity and masks, as matplotlib figures.

Each function draws on ``ax`` if one is given, and returns the figure and the axes.
"""

import math
from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

from torch import nn

from lightning_prune.models import summary as report
from lightning_prune.posttraining.sensitivity import SensitivityAnalysis
from lightning_prune.reporting.drawing import ABOVE, ROW, axes_for, calm, columns, label_rows, lines, longest, percent
from lightning_prune.reporting.history import History
from lightning_prune.reporting.mask_plots import plot_masks as plot_masks
from lightning_prune.validation.arguments import integer
from lightning_prune.validation.instances import instance, text
from lightning_prune.validation.values import optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_prune.training.pruning import Pruning

_SCARCE = {"": "C0", "nearly empty": "#e08214", "empty": "#b2182b"}  # the colours of bars


def plot_schedule(callback: "Pruning", length: int, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
    """Plot the planned sparsity over a run.

    Args:
        callback: A pruning callback.
        length: Length of the run, in the callback's ``interval``: optimizer steps or epochs.
        ax: Where to draw; each schedule on the same axes has its own colour.

    >>> from lightning_prune import MagnitudePruning
    >>> fig, ax = plot_schedule(MagnitudePruning(0.9), length=1000)
    >>> ax.get_xlabel()
    'step'
    """
    from lightning_prune.training.pruning import Pruning  # imported here, since it imports the report

    instance("callback", callback, Pruning)
    length = integer("length", length, 1)
    fig, ax = axes_for(ax, 6.4, 3.2)
    updates = callback.plan(*callback.horizon.window(length))
    final = callback.sparsity if isinstance(callback.sparsity, float) else 1.0
    steps = [0, *(position for position, _ in updates), length]
    levels = [0.0, *(fraction * final for _, fraction in updates)]
    label = f"{callback.schedule}, {report.counted_as(len(updates), 'update')}"
    ax.step(steps, [*levels, levels[-1]], where="post", label=label)
    ax.set_title("Planned sparsity", fontsize=9, loc="left")
    ax.set_xlabel(callback.interval)
    percent(ax, "sparsity" if isinstance(callback.sparsity, float) else "fraction of the target")
    ax.legend(**ABOVE)
    return fig, ax


def plot_sparsity(model: "nn.Module | report.Summary", ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
    """Plot the sparsity of every prunable weight, in the order of the model, and the total.

    Args:
        model: A module, or a ``Summary``.
        ax: Where to draw.

    >>> fig, ax = plot_sparsity(nn.Linear(4, 2))
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['weight']
    """
    if not isinstance(model, report.Summary):
        instance("model", model, nn.Module)
    found = model if isinstance(model, report.Summary) else report.Summary(tuple(report.rows(model, (), ())))
    names, levels = [row.name for row in found.rows], [row.sparsity for row in found.rows]
    fig, ax = axes_for(ax, 4.4 + longest(names), 0.9 + ROW * max(3, len(names)))
    total = found.total.sparsity
    scarce = [report.scarcity(row, found.total) for row in found.rows]
    ax.barh(range(len(names)), levels, height=0.75, color=[_SCARCE[state] for state in scarce])
    for row, (state, level) in enumerate(zip(scarce, levels, strict=True)):  # in a column, so that no line crosses them
        ax.text(1.02, row, state or f"{level:.1%}", va="center", fontsize=7)
    for state in sorted(set(scarce) - {""}):
        ax.barh([0], [0], color=_SCARCE[state], label=state)
    ax.axvline(total, color="C1", linestyle="--", linewidth=1, label=f"total {total:.1%}")
    label_rows(ax, names)
    ax.set_title("Sparsity by layer", fontsize=9, loc="left")
    ax.set_xlim(0, 1.22)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    ax.set_xlabel("sparsity")
    ax.legend(**ABOVE, ncols=3)
    return fig, ax


def plot_history(history: History, metric: str | None = None, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
    """Plot the sparsity over a run and, on a second axis, one metric with its last value before pruning as baseline.

    The axis of the metric spans at least a tenth of its largest value, so that noise does not look like a collapse.

    Args:
        history: The ``history`` of a ``PruningReport``.
        metric: The name of a metric in it; None draws the sparsity alone.
        ax: Where to draw.

    Raises:
        ValueError: If the history has no such metric.

    >>> fig, ax = plot_history(History([(0, 0.0), (10, 0.5)], {"val_acc": [(5, 0.9), (15, 0.8)]}), "val_acc")
    >>> ax.get_ylabel()
    'sparsity'
    """
    instance("history", history, History)
    metric = optional(text, "metric", metric, "the name of a metric")
    if metric is not None and metric not in history.metrics:
        raise ValueError(f"metric must be one of the recorded metrics {sorted(history.metrics)}, got {metric!r}")
    fig, ax = axes_for(ax, 6.4, 3.2)
    points = history.metrics[metric] if metric is not None else []
    last = max([step for step, _ in [*history.sparsity, *points]], default=0)
    levels = [*history.sparsity, (last, history.sparsity[-1][1])] if history.sparsity else []
    ax.step(*columns(levels), where="post", color="C0")
    ax.set_xlabel("optimizer step")
    percent(ax, "sparsity")
    if metric is not None:
        ax.yaxis.label.set_color("C0")
        second = ax.twinx()
        second.plot(*columns(points), color="C1", marker="o", markersize=3)
        second.set_ylabel(lines(metric), color="C1", parse_math=False)  # a name may have a $
        dense = dense_value(history, points)
        if dense is not None:
            second.axhline(dense, color="C1", linestyle=":", linewidth=1, label=f"dense: {dense:.4g}")
            second.legend(**ABOVE)
        second.set_ylim(*calm([value for _, value in points]))
    title = "Sparsity" if metric is None else f"{metric} and sparsity"
    ax.set_title("\n".join(wrap(title, 48)), fontsize=9, loc="left", parse_math=False)
    return fig, ax


def dense_value(history: History, points: Sequence[tuple[int, float]]) -> float | None:
    """Return the last finite value of a metric before anything was pruned; None if there is none.

    >>> history = History([(0, 0.0), (10, 0.5)])
    >>> dense_value(history, [(5, 0.9), (15, 0.8)])
    0.9
    """
    first = min((step for step, level in history.sparsity if level > 0), default=None)
    known = [value for step, value in points if math.isfinite(value) and (first is None or step <= first)]
    return known[-1] if known and first is not None else None


def plot_sensitivity(analysis: SensitivityAnalysis, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
    """Plot how much pruning each layer alone costs, by sparsity: red is worse than dense, blue is better.

    The colours span at least 1 % of the dense value, so that noise stays pale.

    Args:
        analysis: The result of ``sensitivity``.
        ax: Where to draw.

    >>> analysis = SensitivityAnalysis("accuracy", "max", 0.9, {"0.weight": {0.5: 0.9, 0.9: 0.7}})
    >>> fig, ax = plot_sensitivity(analysis)
    >>> [text.get_text() for text in ax.texts]
    ['0.000', '0.200']
    """
    instance("analysis", analysis, SensitivityAnalysis)
    names = list(analysis.scores)
    levels = sorted({level for scores in analysis.scores.values() for level in scores})
    drops = [[analysis.drop(name, level) for level in levels] for name in names]
    fig, ax = axes_for(ax, 1.4 + 0.62 * len(levels) + longest(names), 1.2 + ROW * max(5, len(names)))
    floor = 0.01 * abs(analysis.dense) or 1.0
    highest = max([floor, *(abs(drop) for row in drops for drop in row if math.isfinite(drop))])
    image = ax.imshow(drops, cmap="RdBu_r", vmin=-highest, vmax=highest, aspect="auto")
    for y, row in enumerate(drops):
        for x, drop in enumerate(row):
            colour = "white" if abs(drop) > 0.6 * highest else "black"
            text = f"{drop:.3f}" if abs(drop) < 10 else f"{drop:.3g}"
            ax.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)
    label_rows(ax, names)
    ax.set_xticks(range(len(levels)), [f"{level:.4g}%" for level in (100 * level for level in levels)])
    ax.set_xlabel("sparsity of this layer alone")
    title = f"Each layer pruned alone; dense {analysis.metric}: {analysis.dense:.4g}"
    ax.set_title("\n".join(wrap(title, 30)), fontsize=8, parse_math=False)
    scale = fig.colorbar(image, ax=ax)
    scale.ax.tick_params(labelsize=7)
    scale.set_label(lines(f"degradation of {analysis.metric}"), fontsize=7, parse_math=False)
    return fig, ax
