"""Pairwise coverage: a few combinations of variants in which each variant meets each of every other axis."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

Row = dict[str, int]  # the number of a value, by its axis
Pair = tuple[tuple[str, int], tuple[str, int]]


def covering(
    axes: Mapping[str, Sequence[Any]], possible: Callable[[dict[str, Any]], bool] = lambda case: True
) -> list[dict[str, Any]]:
    """Return cases, a value for each axis, in which every two values of two axes meet.

    Where all combinations of 11 criteria, 4 granularities, 7 scopes and 6 schedules are 1,848, these are some eighty.

    Args:
        axes: The values of each axis, which need no hash.
        possible: Whether values go together; it is asked about some axes, too. Pairs that do not are left out.
    """

    def allowed(row: Row) -> bool:
        return possible({axis: axes[axis][number] for axis, number in row.items()})

    left = dict.fromkeys(pair for pair in _pairs(axes) if allowed(dict(pair)))  # in order, unlike a set
    rows = []
    while left:
        row = _complete(dict(next(iter(left))), axes, left, allowed)
        rows.append(row)
        for pair in _within(row, axes):
            left.pop(pair, None)
    return [{axis: axes[axis][row[axis]] for axis in axes} for row in rows]


def _pairs(axes: Mapping[str, Sequence[Any]]) -> Iterable[Pair]:
    for one, other in combinations(axes, 2):
        for i in range(len(axes[one])):
            for j in range(len(axes[other])):
                yield (one, i), (other, j)


def _within(row: Row, axes: Iterable[str]) -> Iterable[Pair]:
    return combinations([(axis, row[axis]) for axis in axes if axis in row], 2)


def _complete(
    row: Row, axes: Mapping[str, Sequence[Any]], left: Mapping[Pair, None], allowed: Callable[[Row], bool]
) -> Row:
    """Add a value of each axis that is missing: that with the most pairs that have not met."""
    for axis in axes:
        if axis in row:
            continue
        tried = [{**row, axis: number} for number in range(len(axes[axis]))]
        tried = [candidate for candidate in tried if allowed(candidate)]
        if not tried:
            raise ValueError(f"possible must leave a value of {axis!r} to {row}, got none")
        # among equals by turns, so that no value is met more often than others
        turn = len(left) % len(tried)
        row = max([*tried[turn:], *tried[:turn]], key=lambda candidate: _new(candidate, axes, left))
    return row


def _new(row: Row, axes: Mapping[str, Sequence[Any]], left: Mapping[Pair, None]) -> int:
    return sum(pair in left for pair in _within(row, axes))
