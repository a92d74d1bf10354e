"""The field's standard picture: accuracy against the part of the weights that is kept, on a log scale."""

import statistics
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from running import Results, Setting
from tasks import TASKS

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vP*X"


def draw(results: Results, seeds: range, path: Path) -> None:
    """Draw each task of which at least three sparsities of a method were run."""
    panels = {name: found for name in TASKS if (found := curves(name, results, seeds))}
    if not panels:
        return
    figure = Figure(figsize=(6.4 * len(panels), 5.0), layout="constrained")
    for place, (name, methods) in enumerate(panels.items(), 1):
        _panel(figure.add_subplot(1, len(panels), place), name, methods, results, seeds)
    figure.savefig(path, dpi=120)


def curves(task: str, results: Results, seeds: range) -> dict[str, list[tuple[float, float, float]]]:
    """Return (part that is kept, mean, standard deviation) by method, if three sparsities were run."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for setting in sorted({setting for setting, _ in results.rows}):
        values = results.accuracies(setting, seeds)
        if values and setting.task == task and setting.method != "dense":
            point = (1 - setting.sparsity, statistics.mean(values), statistics.stdev(values))
            found.setdefault(setting.method, []).append(point)
    return {method: sorted(points, reverse=True) for method, points in found.items() if len(points) >= 3}


def _panel(
    axes: Axes, task: str, methods: dict[str, list[tuple[float, float, float]]], results: Results, seeds: range
) -> None:
    looks = cycle(zip(COLOURS, MARKERS, strict=True))
    order = sorted(methods, key=lambda method: -methods[method][-1][1])  # the legend in the order of the curves' ends
    for method, (colour, marker) in zip(order, looks, strict=False):
        kept, means, spreads = zip(*methods[method], strict=True)
        axes.errorbar(kept, means, spreads, color=colour, marker=marker, markersize=5, capsize=2, label=method)
    dense = results.accuracies(Setting(task, "dense", 0.0), seeds)
    if dense:
        axes.axhline(statistics.mean(dense), color="#666666", linestyle=":", label="dense")
    levels = sorted({point[0] for points in methods.values() for point in points})
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks(levels)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda kept, _: f"{100 * kept:.3g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="weights kept (%, log scale)", ylabel="test accuracy (%)", title=TASKS[task].title)
    axes.legend(frameon=False, loc="lower left", fontsize="small")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
