"""Checks of objects, functions, strings and flags as arguments; errors name the argument, the rule and the value."""

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import nn

from lightning_prune.validation.values import article, scalar, shown

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])


def settle(instance: Any, **values: Any) -> None:
    """Set the checked arguments of a frozen dataclass, in its ``__post_init__``."""
    for name, value in values.items():
        object.__setattr__(instance, name, value)


def instance(argument: str, value: Any, cls: type[T]) -> T:
    """Return an object of a class.

    Raises:
        TypeError: If it is not one; if a class or its name was given, the message suggests the call.

    >>> instance("model", nn.Linear, nn.Module)
    Traceback (most recent call last):
    TypeError: model must be a Module, got the class Linear: pass Linear(...)
    """
    if isinstance(value, cls):
        return value
    raise TypeError(f"{argument} must be {article(cls.__name__)}, got {shown(value)}{_pass(value, cls)}")


def _pass(value: Any, cls: type) -> str:
    """Return a hint with the call that was probably meant."""
    if isinstance(value, str):
        name = value.replace("_", "").lower()
        value = next((kind for kind in _subclasses(cls) if kind.__name__.lower() == name), None)
    is_one = isinstance(value, type) and cls in value.__mro__[1:]
    return f": pass {_call(value)}" if is_one else ""


def _call(cls: type) -> str:
    parameters = inspect.signature(cls).parameters.values()
    required = any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    return f"{cls.__name__}({'...' if required else ''})"


def _subclasses(cls: type) -> Iterator[type]:
    below: list[type] = type.__subclasses__(cls)
    for kind in below:
        yield kind
        yield from _subclasses(kind)


def function(argument: str, value: Any, *parameters: str) -> Callable[..., Any]:
    """Return a function that takes these positional arguments.

    Raises:
        TypeError: If it is not one, or is a class or a layer of ``torch.nn``.

    >>> function("loss", nn.CrossEntropyLoss(), "model", "batch")
    Traceback (most recent call last):
    TypeError: loss must be a function of model and batch, got CrossEntropyLoss()
    """
    if _is_function(value, len(parameters)):
        return cast(Callable[..., Any], value)
    raise TypeError(
        f"{argument} must be a function of {' and '.join(parameters) or 'no arguments'}, got {shown(value)}"
    )


def named(argument: str, value: Any, options: Mapping[str, Function], *parameters: str) -> Function:
    """Return the function of that name, or the function that was given.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If the value is neither a name nor a function of these parameters.

    >>> named("scope", "layer", {"global": print, "local": print}, "scores", "sparsity")
    Traceback (most recent call last):
    ValueError: scope must be one of ['global', 'local'] or a callable, got 'layer'
    """
    if isinstance(value, str) and value in options:
        return options[value]
    if _is_function(value, len(parameters)):
        return cast(Function, value)
    rule = f"{argument} must be one of {sorted(options)} or a callable"
    if isinstance(value, str):
        raise ValueError(f"{rule}, got {value!r}")
    calls = isinstance(value, type) and any("__call__" in vars(base) for base in value.__mro__)
    hint = f": pass {_call(value)}" if calls else ""
    raise TypeError(f"{rule} of {' and '.join(parameters)}, got {shown(value)}{hint}")


def _is_function(value: Any, arguments: int) -> bool:
    """Return whether a value can be called with this many arguments; classes and layers of torch do not count."""
    if not callable(value) or isinstance(value, type):
        return False
    if isinstance(value, nn.Module) and type(value).__module__.startswith("torch.nn."):
        return False
    try:
        inspect.signature(value.forward if isinstance(value, nn.Module) else value).bind(*range(arguments))
    except TypeError:
        return False
    except ValueError:  # written in C: the signature is unknown
        return True
    return True


def flag(argument: str, value: Any) -> bool:
    """Return a bool.

    Raises:
        TypeError: If it is not one.

    >>> flag("log_layers", True)
    True
    """
    found = scalar(value)
    if not isinstance(found, bool):
        raise TypeError(f"{argument} must be True or False, got {shown(value)}")
    return found


def text(argument: str, value: Any, what: str) -> str:
    """Return a string.

    Raises:
        TypeError: If it is not one.

    >>> text("monitor", 5, "the name of a metric")
    Traceback (most recent call last):
    TypeError: monitor must be the name of a metric, a string, got 5
    """
    if not isinstance(value, str):
        raise TypeError(f"{argument} must be {what}, a string, got {shown(value)}")
    return str(value)


def path(argument: str, value: Any) -> Path:
    """Return a path.

    Raises:
        TypeError: If it is neither a string nor a path.
        ValueError: If it is empty.

    >>> path("path", "model.pt").name
    'model.pt'
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{argument} must be a path, a string or a Path, got {shown(value)}")
    if not os.fspath(value):
        raise ValueError(f"{argument} must be the path of a file, got the string ''")
    return Path(value)


def batches(argument: str, value: Any) -> Iterable[Any]:
    """Return an iterable of batches.

    Raises:
        TypeError: If it is not one.

    >>> batches("data", 5)
    Traceback (most recent call last):
    TypeError: data must be an iterable of batches, such as a DataLoader, got 5
    """
    if hasattr(value, "ndim") and value.ndim:  # iterating over it would give single samples
        raise TypeError(f"{argument} must be an iterable of batches, got {shown(value)}: pass [batch] for one batch")
    is_single = isinstance(value, str | bytes | Mapping | nn.Module | type) or hasattr(value, "ndim")
    if is_single or not (isinstance(value, Iterable) or hasattr(value, "__getitem__")):
        raise TypeError(f"{argument} must be an iterable of batches, such as a DataLoader, got {shown(value)}")
    return cast(Iterable[Any], value)


def by_name(argument: str, value: Any, cls: type[T]) -> dict[str, T]:
    """Return a mapping from names to objects of a class, as a dict.

    Raises:
        TypeError: If it is not one.

    >>> by_name("masks", [], nn.Module)
    Traceback (most recent call last):
    TypeError: masks must be a mapping from names to Modules, got []
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"{argument} must be a mapping from names to {cls.__name__}s, got {shown(value)}")
    for name, entry in value.items():
        if not isinstance(name, str) or not isinstance(entry, cls):
            given = f"{shown(entry)} for {shown(name)}"
            raise TypeError(f"{argument} must be a mapping from names to {cls.__name__}s, got {given}")
    return dict(value)


def sequence_of(argument: str, value: Any, cls: type[T]) -> tuple[T, ...]:
    """Return a sequence of objects of a class, as a tuple.

    Raises:
        TypeError: If it is not one.

    >>> sequence_of("averages", [nn.ReLU()], nn.Module)
    (ReLU(),)
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise TypeError(f"{argument} must be a sequence of {cls.__name__}s, got {shown(value)}")
    return tuple(instance(f"{argument}[{i}]", entry, cls) for i, entry in enumerate(value))
