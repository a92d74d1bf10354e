"""Resumed arguments: those that masks follow from, as a checkpoint has them, and how they have changed since."""

import re
from collections.abc import Iterable, Mapping

# what they were where they were not given, before granularities had defaults of their own
_EARLIER_DEFAULTS = {"scope": "'global'", "min_density": "0.0"}
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # of functions and plain objects: it differs between processes


def texts(owner: object, names: Iterable[str]) -> dict[str, str]:
    """Return attributes as text that is the same in every process.

    >>> from types import SimpleNamespace
    >>> texts(SimpleNamespace(sparsity=0.5, schedule=len), ["sparsity", "schedule"])
    {'sparsity': '0.5', 'schedule': '<built-in function len>'}
    """
    return {name: _ADDRESS.sub("", repr(getattr(owner, name))) for name in names}


def changes(before: Mapping[str, str] | None, now: Mapping[str, str], not_given: Iterable[str] = ()) -> dict[str, str]:
    """Return, by name, the former text of the arguments that have changed.

    A checkpoint without them is of an earlier version: what was not given has changed where its default has.

    >>> changes({"sparsity": "0.5", "end": "8"}, {"sparsity": "0.75", "end": "8", "of": "'units'"})
    {'sparsity': '0.5'}
    """
    if before is None:
        before = {name: _EARLIER_DEFAULTS[name] for name in not_given}
    return {name: text for name, text in before.items() if name in now and now[name] != text}


def earlier_defaults(changed: Mapping[str, str], not_given: Iterable[str]) -> set[str]:
    """Return which arguments have changed only since their defaults have: the checkpoint is of an earlier version.

    >>> earlier_defaults({"scope": "'global'", "min_density": "0.25"}, ["scope", "min_density"])
    {'scope'}
    """
    if "granularity" in changed:  # which defaults follow from
        return set()
    return {name for name in not_given if changed.get(name) == _EARLIER_DEFAULTS[name]}


def listed(changed: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return changes in words.

    >>> listed({"sparsity": "0.5"}, {"sparsity": "0.75"})
    'sparsity=0.75 (0.5 before)'
    """
    return ", ".join(f"{name}={now[name]} ({text} before)" for name, text in changed.items())


def reject_changes(owner: object, changed: Mapping[str, str], *fixed: str) -> None:
    """Reject changes of arguments that have to stay as they were.

    Raises:
        ValueError: If one of them has changed.
    """
    if found := {name: text for name, text in changed.items() if name in fixed}:
        raise ValueError(
            f"arguments of {type(owner).__name__} must be those of the checkpoint, whose masks follow from them, got "
            f"{listed(found, texts(owner, found))}: give those, or begin a new run with the weights alone"
        )
