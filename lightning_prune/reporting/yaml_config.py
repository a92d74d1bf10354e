"""Configuration: the arguments of objects as YAML that LightningCLI reads back."""

import inspect
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from lightning.pytorch import Trainer
from torch import nn

from lightning_prune.methods.distillation import Distillation
from lightning_prune.training.masked import MaskedTraining
from lightning_prune.training.representation import parameters_of
from lightning_prune.validation.values import scalar


def as_yaml(trainer: Mapping[str, Any], callbacks: Iterable[Any], seed: int | None = None) -> str:
    """Return a configuration for LightningCLI, without the arguments that have their defaults.

    Args:
        trainer: Arguments of the Trainer.
        callbacks: Callbacks, each of which has its arguments as attributes of the same names.
        seed: What ``seed_everything`` was given.

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
    """
    found: dict[str, Any] = {} if seed is None else {"seed_everything": seed}
    found |= {"trainer": {**trainer, "callbacks": [plain(callback) for callback in callbacks]}}
    text: str = yaml.safe_dump(found, sort_keys=False)
    return text


def plain(value: Any) -> Any:
    """Return a value in the words of YAML: numbers, strings, lists, dicts, and import paths of all else.

    Of a network only the class is told: its weights are no configuration.

    >>> from lightning_prune import Entropy
    >>> plain((1, 2)), plain(len), plain(Entropy(bins=8))
    ([1, 2], 'builtins.len', {'class_path': 'lightning_prune.Entropy', 'init_args': {'bins': 8}})
    """
    value = scalar(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)  # a subclass, such as NumPy's, is nothing that YAML knows
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
    """Return the arguments that make an object like this one, from its attributes, without those that are defaults.

    >>> from lightning_prune import EntropyPruning
    >>> arguments_of(EntropyPruning(0.5, bins=8, start=2))
    {'sparsity': 0.5, 'bins': 8, 'start': 2}
    """
    cls = type(value)
    found: dict[str, Any] = {}
    for name, (parameter, own) in parameters_of(cls).items():
        argument = getattr(value, name, parameter.default)
        # a preset may fix an argument of its base, and then takes it no more
        if not _same(argument, parameter.default) and (own or _takes(cls, {**found, name: argument})):
            found[name] = argument
    return found


def _takes(cls: type, arguments: Mapping[str, Any]) -> bool:
    try:
        cls(**arguments)
    except TypeError:
        return False
    except ValueError:  # the class has looked at them: another one is still missing
        return True
    return True


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and bool(value == default)  # 1 step is not all of the run, 1.0


def _path(value: Any) -> str:
    """Return the import path of a class or function, the short one where this package has it."""
    package, name = __name__.partition(".")[0], value.__qualname__
    short = getattr(sys.modules[package], name, None) is value
    return f"{package if short else value.__module__}.{name}"


def configuration(trainer: Trainer) -> str:
    """Return the YAML of this package's callbacks, and of the Trainer's arguments that decide over the steps."""
    defaults = inspect.signature(Trainer.__init__).parameters
    names = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision")
    given = {name: getattr(trainer, name) for name in names if getattr(trainer, name) != defaults[name].default}
    own: list[Any] = [c for c in trainer.callbacks if isinstance(c, MaskedTraining | Distillation)]  # type: ignore[attr-defined]
    seed = os.environ.get("PL_GLOBAL_SEED")
    return as_yaml(given, own, None if seed is None else int(seed))
