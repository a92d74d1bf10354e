"""Patterns: globs and regular expressions on names."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase


def matches(pattern: str, names: Sequence[str]) -> bool:
    """Return whether a glob, or a regular expression with the prefix ``re:``, matches one of the names.

    >>> matches("encoder.*.weight", ["encoder.0.weight"]), matches("re:encoder", ["decoder.weight"])
    (True, False)
    """
    if pattern.startswith("re:"):
        return any(re.match(pattern[3:], name) for name in names)
    return pattern in names or any(fnmatchcase(name, pattern) for name in names)


def check_match(argument: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Reject a pattern that matches none of the names, and list close ones.

    Raises:
        ValueError: If there is one, or a regular expression is not valid.
    """
    for pattern in patterns:
        try:
            found = matches(pattern, names)
        except re.error as error:
            raise ValueError(f"{argument} must be valid globs or expressions, got {pattern!r}: {error}") from error
        if not found:
            close = get_close_matches(pattern, names, n=5, cutoff=0.3) or names[:5]
            module = any(name.startswith(f"{pattern}.") for name in names)
            meant = f": did you mean '{pattern}.*'?" if module else f"; close names: {close}"
            raise ValueError(f"{argument} must match a parameter, got {pattern!r}{meant}")
