"""The field's standard figure: accuracy against the fraction of weights kept, both on log scales."""

import statistics
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from methods import GROUPS
from numpy.typing import NDArray
from running import Results, Setting
from shapes import PERMUTED, SHAPED
from tasks import TASKS

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#882255")
MARKERS = "osD^vP*Xp"
PANELS = {**GROUPS, "what a unit is": SHAPED, "what a unit is, rows permuted": tuple(PERMUTED)}
TICKS = (0, 20, 40, 60, 70, 80, 85, 90, 92, 94, 95, 96, 97, 98, 99)


def draw(results: Results, seeds: range, path: Path) -> None:
    """Draw each task with at least three sparsities of a method, one panel for each group of methods."""
    panels = panels_of(results, seeds)
    if not panels:
        return
    looks = looks_of(panels.values())
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(12.8, 5.0 * rows), layout="constrained")
    for place, (kind, methods) in enumerate(panels.items(), 1):
        _panel(figure.add_subplot(rows, 2, place), *kind, methods, results, seeds, looks)
    figure.savefig(path, dpi=100)


def panels_of(results: Results, seeds: range) -> dict[tuple[str, str], dict[str, list[tuple[float, float, float]]]]:
    """Return the curves of each panel that has any, by task and group."""
    kinds = [(name, group) for name in TASKS for group in ("", *PANELS, "neurons")]
    return {kind: found for kind in kinds if (found := curves(*kind, results, seeds))}


def looks_of(panels: Iterable[Iterable[str]]) -> dict[str, tuple[str, str]]:
    """Return a colour and a marker for each method, the same in every panel; those of one panel differ in colour."""
    looks: dict[str, tuple[str, str]] = {}
    for methods in map(sorted, panels):
        taken = {looks[method][0] for method in methods if method in looks}
        free = cycle(colour for colour in COLOURS if colour not in taken)
        for method in (method for method in methods if method not in looks):
            looks[method] = next(free), MARKERS[len(looks) % len(MARKERS)]
    return looks


def group_of(method: str) -> str:
    """Return the group of a method; "" is pruning from dense by magnitude."""
    if method.startswith("neurons"):
        return "neurons"
    return next((group for group, methods in PANELS.items() if method in methods), "")


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
    looks: dict[str, tuple[str, str]],
) -> None:
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
    # by errors, on a log scale, with few of them on top: a method that fails does not squash the others
    axes.set_yscale("function", functions=(_of_accuracy, _to_accuracy))
    shown = [accuracy for points in methods.values() for _, accuracy, _ in points]
    axes.set_ylim(max(0.0, min(shown) - 3), max([*shown, *(dense or [])]) + 0.5)
    axes.set_yticks([t for t in TICKS if axes.get_ylim()[0] <= t <= axes.get_ylim()[1]])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda accuracy, _: f"{accuracy:g}"))
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks(levels)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda kept, _: f"{100 * kept:.3g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    title = "\n".join(filter(None, (TASKS[task].title, group)))
    axes.set(xlabel=f"{what} kept (%, log scale)", ylabel="test accuracy (%, log scale of errors)", title=title)
    axes.legend(frameon=False, loc="lower left", fontsize="small")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _of_accuracy(accuracy: NDArray[np.float64]) -> NDArray[np.float64]:
    return -np.log(np.clip(100.5 - accuracy, 0.1, None))


def _to_accuracy(height: NDArray[np.float64]) -> NDArray[np.float64]:
    return 100.5 - np.exp(-height)
