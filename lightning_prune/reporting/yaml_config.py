"""Configuration: the arguments of objects as YAML for LightningCLI."""

import inspect
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from torch import nn

from lightning_prune.training.representation import parameters_of, settled
from lightning_prune.validation.values import scalar


def as_yaml(trainer: Mapping[str, Any], callbacks: Iterable[Any], seed: int | None = None) -> str:
    """Return a configuration for LightningCLI, without arguments that have their default values.

    Args:
        trainer: Arguments of the Trainer.
        callbacks: Callbacks that store their arguments as attributes of the same names.
        seed: The argument of ``seed_everything``.

    >>> from lightning_prune import Channel, MagnitudePruning
    >>> print(as_yaml({"max_epochs": 5}, [MagnitudePruning(0.9, granularity=Channel())], seed=1), end="")
    seed_everything: 1
    trainer:
      max_epochs: 5
      callbacks:
      - class_path: lightning_prune.MagnitudePruning
        init_args:
          sparsity: 0.9
          granularity:
            class_path: lightning_prune.Channel
          scope: local
          min_density: 0.05
    """
    found: dict[str, Any] = {} if seed is None else {"seed_everything": seed}
    found |= {"trainer": {**trainer, "callbacks": [plain(callback) for callback in callbacks]}}
    text: str = yaml.safe_dump(found, sort_keys=False)
    return text


def plain(value: Any) -> Any:
    """Return a value in the types of YAML: numbers, strings, lists, dicts, and import paths for anything else.

    A network becomes its class alone: weights are not configuration.

    >>> from lightning_prune import Entropy
    >>> plain((1, 2)), plain(len), plain(Entropy(bins=8))
    ([1, 2], 'builtins.len', {'class_path': 'lightning_prune.Entropy', 'init_args': {'bins': 8}})
    """
    value = scalar(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)  # YAML does not support subclasses, such as NumPy's
    if isinstance(value, Mapping):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(entry) for entry in value]
    if isinstance(value, type) or inspect.isroutine(value):
        return _path(value)
    known = {} if isinstance(value, nn.Module) else arguments_of(value)
    arguments = {name: plain(argument) for name, argument in known.items()}
    return {"class_path": _path(type(value)), **({"init_args": arguments} if arguments else {})}


def arguments_of(value: Any) -> dict[str, Any]:
    """Return the arguments that create an object like this one, from its attributes, without default values.

    >>> from lightning_prune import EntropyPruning
    >>> arguments_of(EntropyPruning(0.5, bins=8, start=2))
    {'sparsity': 0.5, 'bins': 8, 'scope': 'local', 'start': 2, 'min_density': 0.1}
    """
    cls = type(value)
    found: dict[str, Any] = {}
    for name, (declared, own) in parameters_of(cls).items():
        parameter = settled(value, declared)
        argument = getattr(value, name, parameter.default)
        # a preset may fix an argument of its base, and no longer accept it
        if not _same(argument, parameter.default) and (own or _takes(cls, {**found, name: argument})):
            found[name] = argument
    return found


def _takes(cls: type, arguments: Mapping[str, Any]) -> bool:
    try:
        cls(**arguments)
    except TypeError:
        return False
    except ValueError:  # the class has accepted them, but misses another one
        return True
    return True


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and bool(value == default)  # 1 is one step, 1.0 the whole run


def _path(value: Any) -> str:
    """Return the import path of a class or function, the short one if this package exports it."""
    package, name = __name__.partition(".")[0], value.__qualname__
    short = getattr(sys.modules[package], name, None) is value
    return f"{package if short else value.__module__}.{name}"
