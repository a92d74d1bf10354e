"""States: what a callback's state in a checkpoint must look like, checked before any of it is used."""

from collections.abc import Callable, Mapping, Sequence
from reprlib import repr as short
from typing import Any

from torch import Tensor

from lightning_prune.tensors.packing import unpack_all

VERSION = 1  # of the states that this release writes
Rule = Callable[[str, Any], None]  # takes the path of a value and the value; raises a ValueError if it is wrong


def check(owner: str, state: Any, rules: Mapping[str, Rule], required: Sequence[str]) -> None:
    """Reject a state that is damaged, or that a later release wrote.

    Keys without a rule are not looked at.

    Args:
        owner: The name of the callback.
        state: What a checkpoint has of it.
        rules: What the values have to look like, by key.
        required: The keys that have to be there.

    Raises:
        ValueError: If the state is invalid; the message names the key.

    >>> check("Pruning", {"version": 1, "steps": -3}, {"steps": whole()}, ["steps"])
    Traceback (most recent call last):
    ValueError: the state of Pruning must have a whole number of at least 0 in 'steps', got -3
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"the state of {owner} must be a dict, got {short(state)}")
    version = state.get("version", VERSION)
    if not _is_whole(version) or not 1 <= version <= VERSION:
        raise ValueError(
            f"the state of {owner} must be of 'version' 1 to {VERSION}, got {short(version)}: load a later one "
            f"with the release of lightning-prune that wrote it"
        )
    missing = set(required).difference(state)
    if missing:
        raise ValueError(f"the state of {owner} must have {sorted(missing)}, got {list(state)}")
    try:
        for key, rule in rules.items():
            if key in state:
                rule(key, state[key])
    except ValueError as error:
        raise ValueError(f"the state of {owner} must have {error}") from error


# ---------------------------------------------------------------------------------------------------- rules


def one(what: str, holds: Callable[[Any], bool]) -> Rule:
    """Return the rule that a value must be ``what``."""

    def rule(path: str, value: Any) -> None:
        if not holds(value):
            found = type(value).__name__ if isinstance(value, Tensor) else short(value)
            raise ValueError(f"{what} in {path!r}, got {found}")

    return rule


def whole(least: int = 0) -> Rule:
    """Return the rule for whole numbers of at least ``least``; bools are not numbers."""
    return one(f"a whole number of at least {least}", lambda value: _is_whole(value) and least <= value < 2**63)


def optional(rule: Rule) -> Rule:
    """Return a rule that accepts None as well."""
    return lambda path, value: None if value is None else rule(path, value)


def items(rule: Rule) -> Rule:
    """Return the rule that every item of a list must satisfy a rule."""

    def each(path: str, value: Any) -> None:
        _LIST(path, value)
        for i, item in enumerate(value):
            rule(f"{path}[{i}]", item)

    return each


def row(*rules: Rule) -> Rule:
    """Return the rule for a list with one item for each of these rules, in order."""

    def each(path: str, value: Any) -> None:
        one(f"a list of {len(rules)}", lambda value: _is_list(value) and len(value) == len(rules))(path, value)
        for i, (rule, item) in enumerate(zip(rules, value, strict=True)):
            rule(f"{path}[{i}]", item)

    return each


def table(rule: Rule) -> Rule:
    """Return the rule that every value of a dict with string keys must satisfy a rule."""

    def each(path: str, value: Any) -> None:
        NAMES(path, value)
        for name, item in value.items():
            rule(f"{path}.{name}", item)

    return each


def record(**rules: Rule) -> Rule:
    """Return the rule for a dict with at least these keys."""

    def each(path: str, value: Any) -> None:
        NAMES(path, value)
        if missing := rules.keys() - value.keys():
            raise ValueError(f"{sorted(missing)} in {path!r}, got {list(value)}")
        for name, rule in rules.items():
            rule(f"{path}.{name}", value[name])

    return each


def every(*rules: Rule) -> Rule:
    """Return the rule that a value must satisfy all of these rules, checked in order."""

    def each(path: str, value: Any) -> None:
        for rule in rules:
            rule(path, value)

    return each


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a value is a plain number; a bool is none.

    >>> is_number(0.5), is_number(True)
    (True, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


_LIST = one("a list", _is_list)
NAMES = one("a dict of names", lambda value: isinstance(value, Mapping) and all(isinstance(n, str) for n in value))
ANY: Rule = one("anything", lambda value: True)
FLAG = one("True or False", lambda value: isinstance(value, bool))
TEXT = one("a string", lambda value: isinstance(value, str))
NUMBER = one("a number", is_number)
FRACTION = one("a fraction in [0, 1]", lambda value: is_number(value) and 0 <= value <= 1)
TENSOR = one("a tensor", lambda value: isinstance(value, Tensor))
IN_ORDER = one("a first position that is not after the last", lambda value: value[0] <= value[1])


def _unpacks(path: str, value: Any) -> None:
    try:
        unpack_all(value)
    except ValueError as error:
        raise ValueError(f"complete masks in {path!r}: {error}") from error


_BITS = one("a tensor of one dimension", lambda value: isinstance(value, Tensor) and value.ndim == 1)
MASKS = every(record(shapes=table(items(whole())), bits=_BITS), _unpacks)
