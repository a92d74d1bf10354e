"""Plots: schedules, sparsity, history, sensitivity and masks, as matplotlib figures.

Each function draws on ``ax`` if one is given, and returns the figure and the axes.
"""

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_prune.models import summary as report
from lightning_prune.posttraining.sensitivity import SensitivityAnalysis
from lightning_prune.reporting.history import History
from lightning_prune.validation.arguments import integer, text
from lightning_prune.validation.instances import by_name, instance
from lightning_prune.validation.values import optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_prune.training.pruning import Pruning

_ROW, _LETTER = 0.19, 0.058  # inches: line height and letter width of small print
_CELLS = 128  # maximum cells a side in the picture of a mask


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
    fig, ax = _axes(ax, 6.4, 3.2)
    updates = callback.plan(*callback.horizon.window(length))
    final = callback.sparsity if isinstance(callback.sparsity, float) else 1.0
    steps = [0, *(position for position, _ in updates), length]
    levels = [0.0, *(fraction * final for _, fraction in updates)]
    label = f"{callback.schedule}, {report.counted_as(len(updates), 'update')}"
    ax.step(steps, [*levels, levels[-1]], where="post", label=label)
    ax.set_xlabel(callback.interval)
    _percent(ax, "sparsity" if isinstance(callback.sparsity, float) else "fraction of the target")
    ax.legend(loc="lower right")
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
    fig, ax = _axes(ax, 4.4 + _longest(names), 0.9 + _ROW * max(3, len(names)))
    bars = ax.barh(range(len(names)), levels, height=0.75)
    ax.bar_label(bars, [f" {level:.1%}" for level in levels], fontsize=7)
    total = found.total.sparsity
    ax.axvline(total, color="C1", linestyle="--", linewidth=1, label=f"total {total:.1%}")
    _rows(ax, names)
    ax.set_xlim(0, 1.12)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    ax.set_xlabel("sparsity")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    return fig, ax


def plot_history(history: History, metric: str | None = None, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
    """Plot the sparsity over a run and, on a second axis, one metric.

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
    fig, ax = _axes(ax, 6.4, 3.2)
    points = history.metrics[metric] if metric is not None else []
    last = max([step for step, _ in [*history.sparsity, *points]], default=0)
    levels = [*history.sparsity, (last, history.sparsity[-1][1])] if history.sparsity else []
    ax.step(*_columns(levels), where="post", color="C0")
    ax.set_xlabel("optimizer step")
    _percent(ax, "sparsity")
    if metric is not None:
        ax.yaxis.label.set_color("C0")
        second = ax.twinx()
        second.plot(*_columns(points), color="C1", marker="o", markersize=3)
        second.set_ylabel(metric, color="C1", parse_math=False)  # a name may have a $
    return fig, ax


def plot_sensitivity(analysis: SensitivityAnalysis, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
    """Plot how much pruning each layer alone costs, by sparsity.

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
    fig, ax = _axes(ax, 1.4 + 0.62 * len(levels) + _longest(names), 1.2 + _ROW * max(5, len(names)))
    highest = max((drop for row in drops for drop in row if drop > 0), default=1.0)
    image = ax.imshow(drops, cmap="YlOrRd", vmin=0, vmax=highest, aspect="auto")
    for y, row in enumerate(drops):
        for x, drop in enumerate(row):
            colour = "white" if drop > 0.6 * highest else "black"
            ax.text(
                x,
                y,
                f"{drop:.3f}" if abs(drop) < 10 else f"{drop:.3g}",
                ha="center",
                va="center",
                fontsize=7,
                color=colour,
            )
    _rows(ax, names)
    ax.set_xticks(range(len(levels)), [f"{level:.4g}%" for level in (100 * level for level in levels)])
    ax.set_xlabel("sparsity of this layer alone")
    ax.set_title(f"dense {analysis.metric}: {analysis.dense:.4g}", fontsize=8)
    fig.colorbar(image, ax=ax, label=f"degradation of {analysis.metric}")
    return fig, ax


def plot_masks(
    masks: Mapping[str, Tensor], ax: "Axes | Sequence[Axes] | None" = None
) -> "tuple[Figure, Sequence[Axes]]":
    r"""Plot masks as images: dark is kept, light is pruned, grey cells of large masks are averages.

    Args:
        masks: Bool masks by name, such as those of a callback; rows are output channels.
        ax: Where to draw, one for each mask of two or more dimensions.

    Raises:
        ValueError: If there is no such mask, or the number of axes differs.

    >>> fig, axes = plot_masks({"weight": nn.Linear(4, 4).weight.new_tensor([[1, 0, 0, 0]]).bool()})
    >>> axes[0].get_title()
    'weight\n75.0% pruned'
    """
    pictures = {name: _picture(mask) for name, mask in by_name("masks", masks, Tensor).items() if mask.ndim >= 2}
    if not pictures:
        raise ValueError(f"masks must contain one of two or more dimensions, got {list(masks)}")
    given = [] if ax is None else [*ax] if isinstance(ax, Sequence) and not isinstance(ax, str | bytes) else [ax]
    axes = _grid(len(pictures)) if ax is None else [_axes(each, 0, 0)[1] for each in given]
    if len(axes) != len(pictures):
        raise ValueError(f"ax must be one for each of {len(pictures)} masks, got {len(axes)}")
    for place, (name, (picture, density)) in zip(axes, pictures.items(), strict=True):
        place.imshow(picture, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        # wrapped, since layers often differ in the middle of long names
        place.set_title("\n".join([*wrap(name, 26), f"{1 - density:.1%} pruned"]), fontsize=6, parse_math=False)
        place.set_xticks([])
        place.set_yticks([])
    return axes[0].get_figure(), axes  # type: ignore[return-value]


def _picture(mask: Tensor) -> tuple[Any, float]:
    """Return a mask as an image of bounded size, whose cells are fractions of kept weights, and its density."""
    rows = mask.detach().cpu().flatten(1)
    size = (min(_CELLS, rows.shape[0]), min(_CELLS, rows.shape[1]))
    cells = nn.functional.adaptive_avg_pool2d(rows[None].float(), size)[0]
    return cells.numpy(), float(rows.float().mean())


def _grid(count: int) -> "list[Axes]":
    columns = min(count, 3 if count <= 12 else 6)
    lines = -(-count // columns)
    side = 2.4 if count <= 12 else 1.5
    size = (side * columns, (side + 0.2) * lines)
    _, axes = _pyplot().subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    flat = [*axes.flat]
    for left in flat[count:]:
        left.remove()
    return flat[:count]


def _axes(ax: "Axes | None", width: float, height: float) -> "tuple[Figure, Axes]":
    if ax is not None:
        from matplotlib.axes import Axes

        instance("ax", ax, Axes)
        return ax.get_figure(), ax  # type: ignore[return-value]
    fig, ax = _pyplot().subplots(figsize=(width, height), layout="constrained")
    return fig, ax


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install '.[plots]' in the repository") from error
    return plt


def _rows(ax: "Axes", names: Sequence[str]) -> None:
    """Label each row with its name, the first at the top."""
    ax.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
    ax.set_ylim(len(names) - 0.5, -0.5)


def _longest(names: Sequence[str]) -> float:
    return _LETTER * max(map(len, names), default=0)


def _percent(ax: "Axes", label: str) -> None:
    from matplotlib.ticker import PercentFormatter

    ax.set_ylim(-0.03, 1.03)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_ylabel(label)


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
