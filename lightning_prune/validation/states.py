"""States: what a callback's state in a checkpoint must look like, checked before any of it is used."""

from collections.abc import Callable, Mapping
from reprlib import repr as short
from typing import Any

from torch import Tensor

from lightning_prune.tensors.packing import unpack_all

VERSION = 1  # of the states that this release writes
Rule = Callable[[str, Any], None]  # takes the path of a value and the value; raises a ValueError if it is wrong


def check(owner: str, state: Any, *keys: str) -> None:
    """Raise if a state is damaged, or was written by a later release.

    Keys that are not in ``RULES`` belong to a user's subclass.

    Args:
        owner: The name of the callback.
        state: Its state in the checkpoint.
        keys: Required keys; others are checked if present.

    Raises:
        ValueError: If the state is invalid; the message names the key.

    >>> check("Pruning", {"version": 1, "steps": -3}, "steps")
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
    missing = set(keys).difference(state)
    if missing:
        raise ValueError(f"the state of {owner} must have {sorted(missing)}, got {list(state)}")
    try:
        for key, rule in RULES.items():
            if key in state:
                rule(key, state[key])
    except ValueError as error:
        raise ValueError(f"the state of {owner} must have {error}") from error
    _check_levels(owner, state)
    _check_position(owner, state)


def _check_levels(owner: str, state: Mapping[str, Any]) -> None:
    """Raise if a target has no mask."""
    masks = state["masks"]["shapes"] if "masks" in state else state.get("levels", {})
    for name in state.get("levels", ()):
        if name not in masks:
            raise ValueError(f"the state of {owner} must have a mask of {name!r} in 'masks', got {list(masks)}")


def _check_position(owner: str, state: Mapping[str, Any]) -> None:
    """Raise if the last update lies after all planned updates."""
    window, planned = state.get("window") or (), state.get("planned", ())
    last = max([-1, *window, *(position for position, _ in planned)])
    if state.get("applied", -1) > last:
        raise ValueError(
            f"the state of {owner} must have the position of an update in 'applied', at most {last} according to "
            f"'window' and 'planned', got {state['applied']}"
        )


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
        _DICT(path, value)
        for name, item in value.items():
            rule(f"{path}.{name}", item)

    return each


def record(**rules: Rule) -> Rule:
    """Return the rule for a dict with at least these keys."""

    def each(path: str, value: Any) -> None:
        _DICT(path, value)
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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


_LIST = one("a list", _is_list)
_DICT = one("a dict of names", lambda value: isinstance(value, Mapping) and all(isinstance(n, str) for n in value))
ANY: Rule = one("anything", lambda value: True)
FLAG = one("True or False", lambda value: isinstance(value, bool))
TEXT = one("a string", lambda value: isinstance(value, str))
NUMBER = one("a number", _is_number)
FRACTION = one("a fraction in [0, 1]", lambda value: _is_number(value) and 0 <= value <= 1)
TENSOR = one("a tensor", lambda value: isinstance(value, Tensor))
IN_ORDER = one("a first position that is not after the last", lambda value: value[0] <= value[1])


def _unpacks(path: str, value: Any) -> None:
    try:
        unpack_all(value)
    except ValueError as error:
        raise ValueError(f"complete masks in {path!r}: {error}") from error


_BITS = one("a tensor of one dimension", lambda value: isinstance(value, Tensor) and value.ndim == 1)
MASKS = every(record(shapes=table(items(whole())), bits=_BITS), _unpacks)
_OPTIMIZER = record(state=ANY, param_groups=items(record(params=items(whole()))))
MEMORY = record(tensors=table(TENSOR), optimizers=items(_OPTIMIZER), schedulers=items(_DICT))
_SEARCH = record(
    reference=optional(NUMBER),
    step=one("a number in (0, 1)", lambda value: _is_number(value) and 0 < value < 1),
    level=FRACTION,
    good=optional(FRACTION),
    bad=FRACTION,
    waited=whole(),
    last=FLAG,
    done=FLAG,
    settled=FLAG,
)

# every key that a callback of this package saves: a name means the same in all of them
RULES: dict[str, Rule] = {
    # every masked training
    "steps": whole(),
    "levels": table(FRACTION),
    "masks": MASKS,
    # every scheduled training
    "applied": whole(-1),
    "window": optional(every(row(whole(), whole()), IN_ORDER)),
    "observed": record(steps=whole(), seen=items(TEXT), statistics=table(items(optional(TENSOR)))),
    "unseen": items(TEXT),
    "arguments": optional(table(TEXT)),
    # LotteryTicket
    "memory": optional(MEMORY),
    "moment": optional(whole()),
    "back": optional(whole()),
    "again": optional(row(whole(), MEMORY)),
    # GuardedPruning
    "search": _SEARCH,
    "planned": items(row(whole(), FRACTION)),
    "best": optional(every(MEMORY, record(masks=MASKS, steps=whole()))),
    "back_at": optional(whole()),
    "validations": whole(),
    "settling": items(NUMBER),
    "trials": items(row(whole(), FRACTION, NUMBER, FLAG)),
    # SRSTE
    "dense": table(TENSOR),
    # Distillation
    "teacher": optional(table(ANY)),
    # PruningReport
    "sparsity": items(row(whole(), FRACTION)),
    "metrics": table(items(row(whole(), NUMBER))),
    "before": table(NUMBER),
    "validated": items(TEXT),
}
