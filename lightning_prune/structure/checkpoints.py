"""Loading: how the kept channels of a shrunk model travel in its checkpoint, and how its own class takes them up."""

import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar, cast

import torch
from torch import nn

from lightning_prune.models.copying import copied
from lightning_prune.structure.cut_record import CutRecord, cut_record_of, record_cut
from lightning_prune.structure.surgery import cut
from lightning_prune.validation.instances import instance
from lightning_prune.validation.instances import path as as_path
from lightning_prune.validation.values import shown

Model = TypeVar("Model", bound=nn.Module)

KEY = "lightning_prune"  # of a checkpoint
_FROM_CLI = ("lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module")


def save_shrunk(model: nn.Module, path: str | Path) -> None:
    """Save the weights of a shrunk model, and which channels of its class they are; ``load_shrunk`` reads it.

    Of a ``LightningModule`` ``Trainer.save_checkpoint`` saves both as well.

    Raises:
        ValueError: If the model has never been shrunk.
    """
    instance("model", model, nn.Module)
    file = as_path("path", path)
    kept = cut_record_of(model)
    if kept is None:
        raise ValueError(f"the model must have been shrunk, got a {type(model).__name__} that has not")
    torch.save({"state_dict": model.state_dict(), KEY: kept.state_dict()}, file)


def load_shrunk(
    model: Model | Callable[..., Model], checkpoint: str | Path | Mapping[str, Any], **kwargs: Any
) -> Model:
    """Return a shrunk model, of its own class, from its checkpoint: no pickled model, no trace, no example input.

    Args:
        model: The class of the model, or a function, which makes it as it was before it was shrunk; or such a model.
        checkpoint: A file of ``Trainer.save_checkpoint`` or ``save_shrunk``, or what ``torch.load`` makes of it.
        kwargs: Arguments of the class. Those that a ``LightningModule`` has saved in a Trainer's checkpoint need not be
            given; this is then its ``load_from_checkpoint``.

    Raises:
        ValueError: If the checkpoint is none of a shrunk model, or of another one; a model that was given stays as it
            was.

    >>> from lightning_prune.structure.shrinking import shrink
    >>> def build():
    ...     return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> model = build()
    >>> _ = nn.init.zeros_(model[2].weight[:, 1:])
    >>> small = shrink(model, torch.randn(2, 4))
    >>> state = {"state_dict": small.state_dict(), "lightning_prune": small._kept_channels.state_dict()}
    >>> load_shrunk(build, state)[0]
    Linear(in_features=4, out_features=1, bias=True)
    """
    if not callable(model):
        raise TypeError(f"model must be a class, a function that makes a model, or a model, got {shown(model)}")
    if not isinstance(checkpoint, Mapping):
        checkpoint = as_path("checkpoint", checkpoint)
    load = getattr(model, "load_from_checkpoint", None) if isinstance(model, type) else None
    if load is not None and isinstance(checkpoint, Path) and not _is_ours(checkpoint):
        return cast(Model, load(checkpoint, map_location="cpu", **kwargs))
    state = checkpoint if isinstance(checkpoint, Mapping) else _read(checkpoint)
    if isinstance(model, nn.Module) and kwargs:
        raise ValueError(f"arguments must be given to a class only, got {sorted(kwargs)} for a model")
    loaded = model if isinstance(model, nn.Module) else model(**kwargs)
    if not isinstance(loaded, nn.Module):
        raise TypeError(f"model must make a Module, got {shown(model)}, which made {shown(loaded)}")
    if loaded is model:
        _load_whole(copied(loaded), state)  # what fails halfway has to leave the model as it was
    _load_whole(loaded, state)
    return cast(Model, loaded)


def _load_whole(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Cut a model to what a checkpoint has kept, and load the weights.

    Raises:
        ValueError: If they do not fit; the model may have been cut by then.
    """
    _take_up(model, checkpoint)
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except Exception as error:  # whatever torch, or a hook of the user's, says of weights that do not fit
        raise ValueError(f"checkpoint must fit a {type(model).__name__}, got one that does not: {error}") from error


def _is_ours(path: Path) -> bool:
    """Return whether ``save_shrunk`` wrote a file, and not a Trainer.

    Raises:
        ValueError: If neither did.
    """
    try:
        return set(_read(path, mmap=zipfile.is_zipfile(path))) == {"state_dict", KEY}
    except ValueError as error:
        # hyperparameters of any type, which only a Trainer saves
        if zipfile.is_zipfile(path) and isinstance(error.__cause__, UnpicklingError):
            return False
        raise


def _read(path: Path, mmap: bool = False) -> Mapping[str, Any]:
    """Return what a file holds.

    Raises:
        ValueError: If it is no checkpoint.
        FileNotFoundError: If there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint must be a file of a shrunk model, got {str(path)!r}, where there is none")
    try:
        return _checked(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))
    except (UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"checkpoint must be a file of a shrunk model, got {str(path)!r}: {error}") from error


def _checked(saved: Any) -> Mapping[str, Any]:
    """Return what a file holds.

    Raises:
        ValueError: If it is no checkpoint.
    """
    if not isinstance(saved, Mapping) or "state_dict" not in saved:
        found = f"the entries {list(saved)[:5]}" if isinstance(saved, Mapping) else shown(saved)
        raise ValueError(f"checkpoint must be one of a shrunk model, by save_shrunk or a Trainer, got {found}")
    return saved


def travel_along(model: nn.Module) -> None:
    """Let a ``LightningModule`` add what it has kept to every checkpoint; other modules have no checkpoints."""
    if hasattr(type(model), "on_save_checkpoint"):
        # on this model alone: its class stays what it is
        vars(model)["on_save_checkpoint"] = partial(_save, model)


def _save(model: Any, checkpoint: dict[str, Any]) -> None:
    type(model).on_save_checkpoint(model, checkpoint)
    kept = cut_record_of(model)
    assert kept is not None
    checkpoint[KEY] = kept.state_dict()
    name = checkpoint.get(model.CHECKPOINT_HYPER_PARAMS_NAME)
    if name not in (None, "kwargs"):
        warnings.warn(
            f"load this checkpoint of a shrunk model by load_shrunk({type(model).__name__}(...), path), since "
            f"load_from_checkpoint cannot: its hyperparameters are all in one argument, {name!r}",
            stacklevel=2,
        )
        return
    saved = dict(checkpoint.get(model.CHECKPOINT_HYPER_PARAMS_KEY, {}))
    ours = instantiate_from_cli if saved.get("_instantiator") in _FROM_CLI else instantiate
    checkpoint[model.CHECKPOINT_HYPER_PARAMS_KEY] = {**saved, "_instantiator": _path(ours)}


def instantiate(cls: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """Return a ``LightningModule`` that takes up the kept channels of the checkpoint that it is going to load."""
    return _expecting(cls(**kwargs))


def instantiate_from_cli(cls: Any, kwargs: dict[str, Any]) -> Any:
    """Return likewise one whose arguments ``LightningCLI`` has saved."""
    from lightning.pytorch.cli import instantiate_module

    return _expecting(instantiate_module(cls, kwargs))


def _expecting(model: nn.Module) -> nn.Module:
    vars(model)["on_load_checkpoint"] = partial(_load, model)
    return model


def _load(model: Any, checkpoint: dict[str, Any]) -> None:
    del vars(model)["on_load_checkpoint"]  # the method of the class is next
    _take_up(model, checkpoint)
    model.on_load_checkpoint(checkpoint)


def _take_up(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Cut a model to what a checkpoint has kept.

    Raises:
        ValueError: If the checkpoint is none of a shrunk model, or of another one; the model is left as it was.
    """
    missing = {KEY, "state_dict"}.difference(checkpoint)
    if missing:
        raise ValueError(
            f"the checkpoint must be one of a shrunk model, with {sorted(missing)}, got {list(checkpoint)}"
        )
    kept = CutRecord.from_state_dict(checkpoint[KEY])
    cut(model, kept)
    record_cut(model, kept)
    travel_along(model)


def _path(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _trust() -> None:
    """Let Lightning call the two functions above: they run no code but that of the class that loads."""
    for name in ("lightning.pytorch.core.saving", "pytorch_lightning.core.saving"):
        allowed: set[str] = getattr(
            sys.modules.get(name), "_ALLOWED_INSTANTIATORS", set()
        )  # older Lightnings trust everything
        allowed.update(map(_path, (instantiate, instantiate_from_cli)))


_trust()
