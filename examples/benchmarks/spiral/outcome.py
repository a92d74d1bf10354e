"""The least number of weights with which a method reaches an accuracy: a table and a figure."""

from collections.abc import Iterable, Mapping, Sequence
from math import inf
from pathlib import Path
from statistics import mean, median, median_high
from typing import Any

from compared import BEGIN, LEVELS, NAMES, SMALL, TARGETS, levels_of
from drawing import looks_of
from marked import table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

Rows = Sequence[Mapping[str, Any]]
MORE = 1.3 * LEVELS[-1]  # where the figure shows what was not reached


def least(rows: Rows, method: str, target: float) -> list[float]:
    """Return the least number of weights at the target for each seed; infinite if no number that was tried will do."""
    found = []
    for seed in sorted({row["seed"] for row in rows}):
        mine = [row for row in rows if row["method"] == method and row["seed"] == seed]
        if is_over(mine, method):
            found.append(min((row["weights"] for row in mine if row["accuracy"] >= target), default=inf))
    return found


def is_over(rows: Rows, method: str) -> bool:
    """Return whether the search of one seed has come to its end in both directions."""
    if not rows:
        return False
    levels, (fewest, *_, most) = levels_of(method), sorted([*rows, *rows], key=lambda row: row["weights"])
    below = fewest["accuracy"] < TARGETS[0] or fewest["weights"] == levels[0]
    return below and (most["weights"] == levels[-1] or max(row["accuracy"] for row in rows) >= TARGETS[-1])


def make_table(rows: Rows) -> str:
    """Return what each method needs, the best first, and how much of 50 weights lies on a path."""
    methods = ranked(rows)
    header = ["method", "seeds"]
    header += [f"{target:g} %: {what}" for target in TARGETS for what in ("median", "best")]
    header += [f"accuracy at {BEGIN}", "on a path"]
    return table(header, [_line(rows, method) for method in methods])


def ranked(rows: Rows) -> list[str]:
    """Return the methods that were run, by what they need for the first target, then for the second."""
    ran = [method for method in NAMES if least(rows, method, TARGETS[0])]
    return sorted(ran, key=lambda method: [_key(least(rows, method, target)) for target in TARGETS])


def _key(found: list[float]) -> tuple[float, float]:
    return median_high(found), min(found)


def _line(rows: Rows, method: str) -> list[str]:
    found = [least(rows, method, target) for target in TARGETS]
    cells = [
        cell for target, values in zip(TARGETS, found, strict=True) for cell in _cells(rows, method, target, values)
    ]
    begin = next(weights for weights in levels_of(method) if weights >= BEGIN)
    same = [row for row in rows if row["method"] == method and row["weights"] == begin]
    on_path = f"{mean(row['connected'] for row in same):.0f} of {begin}"
    return [method, str(len(found[0])), *cells, f"{median(row['accuracy'] for row in same):.1f}", on_path]


def _cells(rows: Rows, method: str, target: float, found: list[float]) -> list[str]:
    """Return the median and the best number of weights, and what the best one has left on paths, with biases."""
    middle, best = ("> " + str(levels_of(method)[-1]) if value == inf else f"{value:.0f}" for value in _key(found))
    same = [row for row in rows if row["method"] == method and row["weights"] == min(found)]
    left = min((row["with_biases"] for row in same if row["accuracy"] >= target), default=None)
    return [middle, best if left is None else f"{best} ({left})"]


def small_table(rows: Rows) -> str:
    """Return how often small dense networks reach the targets."""
    lines = []
    for method in SMALL:
        found = [row["accuracy"] for row in rows if row["method"] == method]
        if found:
            number = sum(first * second for first, second in zip((2, *SMALL[method]), (*SMALL[method], 1), strict=True))
            reached = [f"{sum(value >= target for value in found)} of {len(found)}" for target in TARGETS]
            lines.append([method, str(number), *reached, f"{max(found):.1f}"])
    return table(["network", "weights", *(f"{target:g} %" for target in TARGETS), "best"], lines)


def draw(rows: Rows, known: Iterable[Iterable[str]], path: Path) -> None:
    """Draw a row for each method and a panel for each target: a point for each seed, and a bar at the median.

    Args:
        rows: The runs.
        known: The methods of each panel of another figure, which have their colours from there.
        path: Where to draw.
    """
    methods = ranked(rows)
    looks = looks_of([*known, [_bare(method) for method in methods]])
    figure = Figure(figsize=(12.8, 1.5 + 0.3 * len(methods)), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, target, small in zip((left, right), TARGETS, (27, 47), strict=True):
        for place, method in enumerate(methods):
            colour, marker = looks[_bare(method)]
            found = [min(value, MORE) for value in least(rows, method, target)]
            axes.plot(found, [place] * len(found), linestyle="", marker=marker, color=colour, alpha=0.6)
            axes.plot([median_high(found)], [place], linestyle="", marker="|", markersize=14, color=colour)
        _finish(axes, target, small, methods)
    figure.savefig(path, dpi=100)


def _bare(method: str) -> str:
    return method.removeprefix("neurons, ")


def _finish(axes: Axes, target: float, small: int, methods: list[str]) -> None:
    axes.axvline(small, color="#666666", linestyle=":")
    axes.set_xscale("log")
    axes.set_xlim(0.9 * LEVELS[0], 1.1 * MORE)
    axes.xaxis.set_major_locator(FixedLocator([*LEVELS, MORE]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda weights, _: f"> {LEVELS[-1]}" if weights == MORE else f"{weights:g}")
    )
    axes.tick_params(axis="x", rotation=90)
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.set_title(f"fewest weights with {target:g} % accuracy", fontsize="medium")
    axes.set_xlabel(f"weights kept, of 560 (log scale)\ndotted: the paper's smallest dense network, {small}")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
