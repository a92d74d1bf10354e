"""Resumed arguments: those that masks follow from, as a checkpoint remembers them, and how they have changed since."""

import re
from collections.abc import Iterable, Mapping

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # of functions and plain objects, another one in every process


def texts(owner: object, names: Iterable[str]) -> dict[str, str]:
    """Return attributes as text that is the same in every process.

    >>> from types import SimpleNamespace
    >>> texts(SimpleNamespace(sparsity=0.5, schedule=len), ["sparsity", "schedule"])
    {'sparsity': '0.5', 'schedule': '<built-in function len>'}
    """
    return {name: _ADDRESS.sub("", repr(getattr(owner, name))) for name in names}


def changes(before: Mapping[str, str] | None, now: Mapping[str, str]) -> dict[str, str]:
    """Return, by name, what arguments were that are something else now; of a checkpoint without them, nothing.

    >>> changes({"sparsity": "0.5", "end": "8"}, {"sparsity": "0.75", "end": "8", "of": "'units'"})
    {'sparsity': '0.5'}
    """
    return {name: text for name, text in (before or {}).items() if name in now and now[name] != text}


def listed(changed: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return changes in words.

    >>> listed({"sparsity": "0.5"}, {"sparsity": "0.75"})
    'sparsity=0.75 (0.5 before)'
    """
    return ", ".join(f"{name}={now[name]} ({text} before)" for name, text in changed.items())
