"""Drawing: axes, labels and limits that all plots share."""

import math
from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from lightning_prune.validation.instances import instance
from lightning_prune.validation.values import install

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW, _LETTER = 0.19, 0.058  # inches: line height and letter width of small print

ABOVE: dict[str, Any] = {  # a legend above the axes, to the right, where it covers nothing
    "loc": "lower right",
    "bbox_to_anchor": (1, 1),
    "frameon": False,
    "fontsize": 7,
    "borderaxespad": 0.2,
}


def axes_for(ax: "Axes | None", width: float, height: float) -> "tuple[Figure, Axes]":
    """Return the figure and the axes that are given, or new ones of this size in inches."""
    if ax is not None:
        from matplotlib.axes import Axes

        instance("ax", ax, Axes)
        return ax.get_figure(), ax  # type: ignore[return-value]
    fig, ax = pyplot().subplots(figsize=(width, height), layout="constrained")
    return fig, ax


def pyplot() -> Any:
    """Return ``matplotlib.pyplot``.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"plots need matplotlib: {install('plots')}") from error
    return plt


def label_rows(ax: "Axes", names: Sequence[str]) -> None:
    """Label each row with its name, the first at the top."""
    ax.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
    ax.set_ylim(len(names) - 0.5, -0.5)


def longest(names: Sequence[str]) -> float:
    """Return the width of the longest name in inches."""
    return _LETTER * max(map(len, names), default=0)


def lines(label: str) -> str:
    """Return the label of an axis in lines that fit a low one."""
    return "\n".join(wrap(label, 24))


def percent(ax: "Axes", label: str) -> None:
    """Label the vertical axis as a fraction in percent."""
    from matplotlib.ticker import PercentFormatter

    ax.set_ylim(-0.03, 1.03)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_ylabel(label)


def columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Return points as a list of positions and a list of values."""
    return [x for x, _ in points], [y for _, y in points]


def calm(values: Sequence[float]) -> tuple[float, float]:
    """Return limits of an axis that are a tenth of the largest value apart at least."""
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    least = 0.1 * max(abs(low), abs(high)) or 1.0
    missing = max(0.0, least - (high - low)) / 2
    margin = 0.05 * max(high - low, least)
    return low - missing - margin, high + missing + margin
