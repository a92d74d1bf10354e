"""Remaining: a warning of targets of which pruning leaves nothing, or a single unit."""

from collections.abc import Mapping


def told(owner: str, left: Mapping[str, int]) -> str:
    """Return a warning of targets, at least one, that keep none or one of their units.

    >>> told("Pruning", {"a": 0, "b": 1})[:60]
    "Pruning leaves no unit of ['a'] and one unit of ['b']: hardl"
    """
    empty, single = ([name for name, number in left.items() if number == few] for few in (0, 1))
    found = [f"{what} of {names[:5]}" for what, names in (("no unit", empty), ("one unit", single)) if names]
    return (
        f"{owner} leaves {' and '.join(found)}: hardly any signal passes there. Prune less, or keep a part of every "
        f"layer with min_density"
    )
