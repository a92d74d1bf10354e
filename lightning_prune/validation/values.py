"""Values: an argument as a plain Python scalar, and as text in an error message."""

import math
import sys
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

T = TypeVar("T")
Rest = ParamSpec("Rest")

_MAX_LENGTH = 80  # of a value in a message


def scalar(value: Any) -> Any:
    """Return the Python number in a 0-d array or tensor, anything else as it is.

    >>> import torch
    >>> scalar(torch.tensor(2)), scalar([2])
    (2, [2])
    """
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        try:
            return value.item()
        except RuntimeError:  # a tensor without data
            return value
    return value


def plain_number(value: Any) -> int | float | None:
    """Return a number as a plain Python one; None for anything else, bools included.

    >>> plain_number(True) is None, plain_number(0.5)
    (True, 0.5)
    """
    found = scalar(value)
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    if abs(found) > sys.float_info.max:  # an int beyond the range of floats counts as infinite
        return math.inf if found > 0 else -math.inf
    return int(found) if isinstance(found, int) else float(found)


def optional(
    check: Callable[Concatenate[str, Any, Rest], T], argument: str, value: Any, *rest: Rest.args, **also: Rest.kwargs
) -> T | None:
    """Return None for None, and the result of an argument's check for any other value.

    >>> optional(lambda argument, value: int(value), "window", None) is None
    True
    """
    return None if value is None else check(argument, value, *rest, **also)


def install(extra: str) -> str:
    """Return how an extra of this package is installed, for the errors of what needs it.

    >>> install("export")
    "pip install '.[export]' in the repository"
    """
    return f"pip install '.[{extra}]' in the repository"


def shown(value: Any) -> str:
    """Return a value as error messages show it: its repr, or what it is if the repr is unclear or too long.

    >>> import torch
    >>> shown("0.9"), shown(int), shown(torch.zeros(2, 3)), shown(torch.tensor(2.5))
    ("the string '0.9'", 'the class int', 'a Tensor of shape (2, 3)', '2.5')
    """
    value = scalar(value)
    if isinstance(value, str):
        return f"the string {_short(value)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"{article(type(value).__name__)} of shape {tuple(shape)}"
    text = _short(value)
    if hasattr(value, "__qualname__"):
        return f"the function {value.__qualname__}"
    return article(type(value).__name__) if "\n" in text or text.startswith("<") else text


def article(name: str) -> str:
    """Return a noun with its article.

    >>> article("Entropy"), article("Linear")
    ('an Entropy', 'a Linear')
    """
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_LENGTH else f"{text[: _MAX_LENGTH - 3]}..."
