"""Representation: an object as the call that makes one like it, without the arguments that have their defaults."""

import inspect
import math
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import Any

from lightning_prune.updates.latency import LatencyTable

_PACKAGE = __name__.partition(".")[0]
_PLAIN = (bool, int, float, str, NoneType)
# arguments whose default depends on the granularity, and what they are for single weights
_OF_UNITS: dict[str, Any] = {"scope": "global", "min_density": 0.0}
_FUNCTIONS = (FunctionType, BuiltinFunctionType, type)


def call_text(made: object, **instead: Any) -> str:
    """Return the call that makes an object like this one, from the attributes that are named like its arguments.

    It runs no code but this package's: a user's objects are shown by the names of their classes. Attributes may be
    missing, as they are while an object is made.

    Args:
        made: The object.
        **instead: Arguments that its attributes hold in another form.

    >>> from lightning_prune import Channel, Pruning
    >>> call_text(Pruning(0.9, granularity=Channel(), schedule="linear"))
    "Pruning(0.9, granularity=Channel(), scope='local', schedule='linear', min_density=0.05)"
    """
    cls = type(made)
    kept = {**vars(made), **instead}
    given = []
    for place, (name, (declared, _)) in enumerate(parameters_of(cls).items()):
        parameter = settled(made, declared)
        value = kept.get(name, parameter.default)
        if _differs(value, parameter.default):
            by_place = place == 0 and parameter.default in (None, parameter.empty) and not isinstance(value, bool)
            given.append(value_text(value) if by_place else f"{name}={value_text(value)}")
    return f"{cls.__name__}({', '.join(given)})"


def parameters_of(cls: type) -> dict[str, tuple[inspect.Parameter, bool]]:
    """Return the parameters of a class and, as far as it passes on keywords, of its bases; and which are its own."""
    found: dict[str, tuple[inspect.Parameter, bool]] = {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    own = True
    for base in (base for base in cls.__mro__ if "__init__" in vars(base)):
        parameters = [*inspect.signature(vars(base)["__init__"]).parameters.values()][1:]
        found |= {p.name: (_filled(base, p), own) for p in parameters if p.kind in named and p.name not in found}
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
        own = False
    return found


def settled(made: object, parameter: inspect.Parameter) -> inspect.Parameter:
    """Return a parameter with the default that goes without saying.

    What is shared out by the granularity's own rules is told unless they are those of single weights.

    >>> from lightning_prune import Channel, Pruning
    >>> Pruning(0.5, scope="global"), Pruning(0.5, scope="local"), Pruning(0.5, granularity=Channel())
    (Pruning(0.5), Pruning(0.5, scope='local'), Pruning(0.5, granularity=Channel(), scope='local', min_density=0.1))
    """
    units = getattr(made, "__dict__", {}).get("granularity")
    if parameter.name not in _OF_UNITS or parameter.default is not None or units is None:
        return parameter
    own, plain = getattr(units, f"default_{parameter.name}", None), _OF_UNITS[parameter.name]
    return parameter.replace(default=plain if own == plain else None)


def _filled(cls: type, parameter: inspect.Parameter) -> inspect.Parameter:
    """Return a parameter whose default, an empty dict or list that a dataclass makes, is there to be compared with."""
    field = getattr(cls, "__dataclass_fields__", {}).get(parameter.name)
    factory = getattr(field, "default_factory", None)
    return parameter.replace(default=factory()) if factory in (dict, list) else parameter


def _differs(value: Any, default: Any) -> bool:
    if value is default:
        return False
    return not _is_told(value) or value_text(value) != value_text(default)  # 1 step is not all of the run, 1.0


def _is_told(value: Any) -> bool:
    """Return whether the text of a value says all about it."""
    return type(value) in (*_PLAIN, tuple, list, dict) or _is_ours(value)


def _is_ours(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == _PACKAGE


def value_text(value: Any) -> str:
    """Return a value as code, a user's object as the name of its class.

    >>> value_text((1, "a")), value_text(len)
    ("(1, 'a')", 'len')
    """
    kind = type(value)
    if kind in (tuple, list, dict) and value:
        return _container_text(value)
    if kind is float and not math.isfinite(value):
        return f"float('{value}')"
    if kind in (*_PLAIN, tuple, list, dict):
        return repr(value)
    if kind in _FUNCTIONS:
        return str(value.__name__)
    if kind.__module__.startswith("pathlib"):
        return repr(str(value))
    if kind is LatencyTable:
        return repr(value)  # which is short
    return call_text(value) if _is_ours(value) else f"{kind.__name__}(...)"


def _container_text(value: tuple[Any, ...] | list[Any] | dict[Any, Any]) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{value_text(key)}: {value_text(entry)}' for key, entry in value.items())}}}"
    entries = ", ".join(map(value_text, value))
    if isinstance(value, list):
        return f"[{entries}]"
    return f"({entries},)" if len(value) == 1 else f"({entries})"
