"""Pairwise coverage: a few combinations of variants in which each variant meets each of every other axis."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

Row = dict[str, int]  # the number of a value, by its axis
Pair = tuple[tuple[str, int], tuple[str, int]]


def covering(
    axes: Mapping[str, Sequence[Any]],
    possible: Callable[[dict[str, Any]], bool] = lambda case: True,
    cheap: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Return cases, a value for each axis, in which every two values of two axes meet.

    Where all combinations of 11 criteria, 4 granularities, 7 scopes and 6 schedules are 1,848, these are some eighty.

    Args:
        axes: The values of each axis, which need no hash.
        possible: Whether values go together; it is asked about some axes, too. Pairs that do not are left out.
        cheap: Values that take the place of others of their axis, where these meet nothing new.
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
    for axis, value in (cheap or {}).items():
        _spare(rows, axis, list(axes[axis]).index(value), axes, allowed)
    return [{axis: axes[axis][row[axis]] for axis in axes} for row in rows]


def _spare(
    rows: list[Row], axis: str, number: int, axes: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool]
) -> None:
    """Give rows this value of an axis, where all pairs of the value that they have are met in other rows, too."""
    met = Counter(pair for row in rows for pair in _within(row, axes))
    for place, row in enumerate(rows):
        other = {**row, axis: number}
        lost, new = set(_within(row, axes)), set(_within(other, axes))
        if allowed(other) and all(met[pair] > 1 for pair in lost - new):
            met.subtract(lost)
            met.update(new)
            rows[place] = other


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
