"""The field's standard figure: accuracy against the fraction of weights kept, on a log scale."""

import statistics
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from methods import GROUPS
from running import Results, Setting
from tasks import TASKS

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#882255")
MARKERS = "osD^vP*Xp"


def draw(results: Results, seeds: range, path: Path) -> None:
    """Draw each task with at least three sparsities of a method, one panel for each group of methods."""
    kinds = [(name, group) for name in TASKS for group in ("", *GROUPS, "neurons")]
    panels = {kind: found for kind in kinds if (found := curves(*kind, results, seeds))}
    if not panels:
        return
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(12.8, 5.0 * rows), layout="constrained")
    for place, (kind, methods) in enumerate(panels.items(), 1):
        _panel(figure.add_subplot(rows, 2, place), *kind, methods, results, seeds)
    figure.savefig(path, dpi=100)


def group_of(method: str) -> str:
    """Return the group of a method; "" is pruning from dense by magnitude."""
    if method.startswith("neurons"):
        return "neurons"
    return next((group for group, methods in GROUPS.items() if method in methods), "")


def curves(task: str, group: str, results: Results, seeds: range) -> dict[str, list[tuple[float, float, float]]]:
    """Return (fraction kept, mean, standard deviation) by method, for methods with three sparsities or more."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for setting in sorted({setting for setting, _ in results.rows}):
        values = results.accuracies(setting, seeds)
        mine = setting.task == task and group_of(setting.method) == group
        if values and mine and setting.method != "dense":
            point = (1 - setting.sparsity, statistics.mean(values), statistics.stdev(values))
            found.setdefault(setting.method.removeprefix("neurons, "), []).append(point)
    return {method: sorted(points, reverse=True) for method, points in found.items() if len(points) >= 3}


def _panel(
    axes: Axes,
    task: str,
    group: str,
    methods: dict[str, list[tuple[float, float, float]]],
    results: Results,
    seeds: range,
) -> None:
    looks = dict(zip(sorted(methods), cycle(zip(COLOURS, MARKERS, strict=True)), strict=False))
    what = "neurons" if group == "neurons" else "weights"
    order = sorted(methods, key=lambda method: -methods[method][-1][1])  # legend in the order of the curves
    for method in order:
        colour, marker = looks[method]
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
    title = "\n".join(filter(None, (TASKS[task].title, group)))
    axes.set(xlabel=f"{what} kept (%, log scale)", ylabel="test accuracy (%)", title=title)
    axes.legend(frameon=False, loc="lower left", fontsize="small")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
