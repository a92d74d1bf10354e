"""Checks of numbers and patterns given as arguments; errors name the argument, the rule and the value.

Every check takes the name of an argument and its value, and returns the value to use. Scalars of NumPy and PyTorch
are accepted as numbers and returned as plain Python ones; bools are not numbers.
"""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from lightning_prune.validation.values import plain_number, scalar, shown

Given = ParamSpec("Given")
Option = TypeVar("Option", bound=str)
Result = TypeVar("Result")

_TOO_LONG = 2**63
_ELSEWHERE = {"amount": "sparsity"}  # in torch.nn.utils.prune and Lightning's ModelPruning
_IN_WORDS = {
    "[0, inf]": "at least 0",
    "(-inf, inf)": "a finite number",
    "[0, inf)": "at least 0",
    "(0, inf)": "above 0",
}


def explain_renamed(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Return a function whose error for an argument that is called otherwise here says so.

    >>> @explain_renamed
    ... def halve(model, sparsity=0.5):
    ...     return sparsity
    >>> halve(None, amount=0.9)
    Traceback (most recent call last):
    TypeError: halve() got an unexpected keyword argument 'amount': it is called sparsity here
    """
    known = inspect.signature(function).parameters
    names = {name: here for name, here in _ELSEWHERE.items() if here in known and name not in known}
    if not names:
        return function

    @wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        for name in names.keys() & kwargs.keys():
            unexpected = f"{function.__qualname__}() got an unexpected keyword argument {name!r}"
            raise TypeError(f"{unexpected}: it is called {names[name]} here")
        return function(*args, **kwargs)

    return call


def integer(argument: str, value: Any, least: int | None = None, most: int | None = None, unit: str = "") -> int:
    """Return an int within bounds.

    Raises:
        TypeError: If it is not an int; floats are not, whatever their value.
        ValueError: If it is too small or too large.

    >>> integer("window", 0, least=1)
    Traceback (most recent call last):
    ValueError: window must be at least 1, got 0
    """
    found = value if type(value) is int else scalar(value)
    if isinstance(found, bool) or not isinstance(found, int):
        integral = isinstance(found, float) and found.is_integer()
        raise TypeError(f"{argument} must be an int, got {shown(value)}{_suggest(int(found)) if integral else ''}")
    if abs(found) >= _TOO_LONG:
        raise ValueError(f"{argument} must fit into 64 bits, got {shown(found)}")
    if least is not None and found < least:
        raise ValueError(f"{argument} must be at least {f'{least} {unit}'.strip()}, got {found}")
    if most is not None and found > most:
        raise ValueError(f"{argument} must be at most {most}, got {found}")
    return int(found)


def number(argument: str, value: Any, interval: str = "(-inf, inf)") -> int | float:
    """Return a number in an interval, such as "[0, 1)"; NaN lies in no interval.

    Raises:
        ValueError: If it is not a number, or outside the interval.

    >>> number("sparsity", 90, "[0, 1)")
    Traceback (most recent call last):
    ValueError: sparsity must be in [0, 1), got 90: did you mean 0.9?
    """
    plain = type(value) is float or (type(value) is int and abs(value) < _TOO_LONG)
    found = value if plain else plain_number(value)
    if found is not None and _lies_in(found, interval):
        return found
    rule = _IN_WORDS.get(interval, f"in {interval}")
    if found is not None and interval in ("[0, inf)", "(0, inf)") and not math.isfinite(found):
        rule += " and finite"
    raise ValueError(f"{argument} must be {rule}, got {shown(value)}{_meant(value, interval)}")


def real(argument: str, value: Any) -> int | float:
    """Return any number, NaN and infinity included.

    Raises:
        TypeError: If it is not a number.

    >>> real("dense", "0.9")
    Traceback (most recent call last):
    TypeError: dense must be a number, got the string '0.9'
    """
    found = plain_number(value)
    if found is None:
        raise TypeError(f"{argument} must be a number, got {shown(value)}")
    return found


def numbers(argument: str, value: Any, interval: str) -> tuple[int | float, ...]:
    """Return the numbers of a sequence, at least one, each in an interval.

    Raises:
        ValueError: If one is not a number or outside the interval, or there are none.
        TypeError: If it is not a sequence.

    >>> numbers("levels", [0.5, 90], "(0, 1)")
    Traceback (most recent call last):
    ValueError: levels must be numbers in (0, 1), got 90: did you mean 0.9?
    """
    if (
        not isinstance(value, Iterable)
        or isinstance(value, str | bytes | Mapping | type)
        or getattr(value, "ndim", 1) != 1
    ):
        raise TypeError(f"{argument} must be a sequence of numbers in {interval}, got {shown(value)}")
    given = list(value)
    if not given:
        raise ValueError(f"{argument} must be numbers in {interval}, at least one, got {given}")
    for entry in given:
        found = plain_number(entry)
        if found is None or not _lies_in(found, interval):
            raise ValueError(f"{argument} must be numbers in {interval}, got {shown(entry)}{_meant(entry, interval)}")
    return tuple(number(argument, entry, interval) for entry in given)


def position(argument: str, value: Any) -> int | float:
    """Return a position in a run: an int counts intervals, a float is a fraction of the run.

    Raises:
        ValueError: If it is neither.

    >>> position("start", 2), position("start", 0.5)
    (2, 0.5)
    """
    found = plain_number(value)
    if found is None or found < 0 or (isinstance(found, float) and not found <= 1.0):
        raise ValueError(f"{argument} must be an int of at least 0 or a float in [0, 1], got {shown(value)}")
    return found


def fractions(argument: str, value: Any) -> int | float | dict[str, float]:
    """Return a fraction in [0, 1), or a dict from patterns to fractions.

    Raises:
        ValueError: If it is neither.
        TypeError: If a pattern is not a string.

    >>> fractions("sparsity", {"net.0.*": 1.5})
    Traceback (most recent call last):
    ValueError: sparsity['net.0.*'] must be in [0, 1), got 1.5
    """
    if not isinstance(value, Mapping):
        return number(argument, value, "[0, 1)")
    if not value:
        raise ValueError(f"{argument} must map at least one pattern to a fraction, got {value}")
    keys = patterns(argument, tuple(value))
    return {
        key: number(f"{argument}[{key!r}]", given, "[0, 1)") for key, given in zip(keys, value.values(), strict=True)
    }


def choice(argument: str, value: Any, options: Sequence[Option]) -> Option:
    """Return one of the options.

    Raises:
        ValueError: If it is not one of them.

    >>> choice("interval", "batch", ("step", "epoch"))
    Traceback (most recent call last):
    ValueError: interval must be "step" or "epoch", got 'batch'
    """
    for option in options if isinstance(value, str) else ():
        if option == value:
            return option
    *first, last = (f'"{option}"' for option in options)
    given = repr(value) if isinstance(value, str) else shown(value)
    raise ValueError(f"{argument} must be {', '.join(first)} or {last}, got {given}")


def patterns(argument: str, value: Any) -> tuple[str, ...]:
    """Return patterns of names: globs, or regular expressions with the prefix "re:".

    Raises:
        ValueError: If it is a string, or a regular expression is invalid.
        TypeError: If it is not a sequence of strings.

    >>> patterns("targets", ["net.*"])
    ('net.*',)
    """
    if isinstance(value, str):
        raise ValueError(f"{argument} must be a sequence of patterns, got the string {value!r}: write [{value!r}]")
    if not isinstance(value, Iterable) or isinstance(value, bytes | Mapping | type) or hasattr(value, "ndim"):
        raise TypeError(f"{argument} must be a sequence of patterns, got {shown(value)}")
    return tuple(_pattern(argument, entry) for entry in value)


def _pattern(argument: str, entry: Any) -> str:
    if not isinstance(entry, str):
        raise TypeError(
            f"{argument} must contain patterns of parameter names, got {shown(entry)}: "
            f'names are those of model.named_parameters(), and "*" matches any part of one'
        )
    if entry.startswith("re:"):
        try:
            re.compile(entry[3:])
        except re.error as error:
            raise ValueError(f"{argument} must be valid globs or expressions, got {entry!r}: {error}") from error
    return str(entry)


def _lies_in(found: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = found > low or (interval[0] == "[" and found == low)
    below = found < high or (interval[-1] == "]" and found == high)
    return above and below


def _meant(value: Any, interval: str) -> str:
    """Return a hint with the fraction that was probably meant by a percentage, or by a number in quotes."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return ""
        return _suggest(value) if _lies_in(value, interval) else ""
    found = plain_number(value)
    percent = found is not None and 2 <= found < 100 and interval in ("[0, 1)", "[0, 1]", "(0, 1)", "(0, 1]")
    return _suggest(round(found / 100, 9)) if found is not None and percent else ""


def _suggest(value: float) -> str:
    return f": did you mean {value}?"
