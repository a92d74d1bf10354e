"""Checkpoints of shrunk models: they carry the cut record, by which a model of the original class is cut to fit."""

import sys
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar, cast

import torch
from torch import nn

from lightning_prune.models.building import built, check_builds
from lightning_prune.models.copying import copied
from lightning_prune.models.kept_norms import check_weights_suffice
from lightning_prune.structure.configs import tell_configs
from lightning_prune.structure.cut_record import CutRecord, cut_record_of, record_cut
from lightning_prune.structure.surgery import cut
from lightning_prune.validation.instances import instance
from lightning_prune.validation.instances import path as as_path
from lightning_prune.validation.values import shown
from lightning_prune.validation.warning import warn

Model = TypeVar("Model", bound=nn.Module)

KEY = "lightning_prune"  # of a checkpoint
# what checkpoints of earlier versions name
_FORMER_PATHS = ("lightning_prune.loading.instantiate", "lightning_prune.loading.instantiate_from_cli")
_FROM_CLI = ("lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module")


def save_shrunk(model: nn.Module, path: str | Path) -> None:
    """Save the weights of a shrunk model and which channels it has kept; ``load_shrunk`` reads the file.

    For a ``LightningModule``, ``Trainer.save_checkpoint`` saves both as well.

    Raises:
        ValueError: If the model has never been shrunk, or has been pruned by ``ResidualChannel`` since.
    """
    file, kept = as_path("path", path), cut_record_of(instance("model", model, nn.Module))
    check_weights_suffice(model)
    if kept is None:
        raise ValueError(f"the model must have been shrunk, got a {type(model).__name__} that has not")
    torch.save({"state_dict": model.state_dict(), KEY: kept.state_dict()}, file)


def load_shrunk(
    model: Model | Callable[..., Model], checkpoint: str | Path | Mapping[str, Any], **kwargs: Any
) -> Model:
    """Return a shrunk model of its original class from a checkpoint: no pickled model, no trace, no example input.

    Args:
        model: The class of the model, or a function that builds it as it was before shrinking, or such a model.
        checkpoint: A file by ``Trainer.save_checkpoint`` or ``save_shrunk``, or what ``torch.load`` returns for it.
        kwargs: Arguments of the class. Those that a ``LightningModule`` saves in a Trainer's checkpoint can be left
            out, as for ``load_from_checkpoint``.

    Raises:
        ValueError: If the checkpoint is not one of a shrunk model, or does not fit the model; a model that was given is
            then left as it was.

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
    check_builds(model)
    if not isinstance(checkpoint, Mapping):
        checkpoint = as_path("checkpoint", checkpoint)
    load = getattr(model, "load_from_checkpoint", None) if isinstance(model, type) else None
    if load is not None and isinstance(checkpoint, Path) and not _is_ours(checkpoint):
        return cast(Model, _by_lightning(load, checkpoint, kwargs))
    state = checkpoint if isinstance(checkpoint, Mapping) else _read(checkpoint)
    if isinstance(model, nn.Module) and kwargs:
        raise ValueError(f"arguments must be given for a class only, got {sorted(kwargs)} for a model")
    loaded = built(model, **kwargs)
    if isinstance(model, nn.Module):
        _cut_and_load(copied(model), state)  # a failure halfway must leave the model as it was
    _cut_and_load(loaded, state)
    return loaded


def _by_lightning(load: Callable[..., Any], checkpoint: Path, kwargs: Mapping[str, Any]) -> Any:
    """Return the model that Lightning loads from a file of a Trainer."""
    try:
        return load(checkpoint, map_location="cpu", **kwargs)
    except UnpicklingError as error:
        raise ValueError(
            f"checkpoint must be a file by save_shrunk or a Trainer that loads with weights_only=True, got "
            f"{str(checkpoint)!r}, which holds other objects, such as a pickled model: if you trust it, load it with "
            f"torch.load(path, weights_only=False), and give load_shrunk what that returns"
        ) from error


def _cut_and_load(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Cut a model to fit a checkpoint, and load the weights.

    Raises:
        ValueError: If they do not fit; the model may already have been cut.
    """
    _cut_to_fit(model, checkpoint)
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except Exception as error:  # torch and the user's hooks raise errors of any type
        raise ValueError(f"checkpoint must fit a {type(model).__name__}, got one that does not: {error}") from error


def _is_ours(path: Path) -> bool:
    """Return whether ``save_shrunk`` wrote a file, rather than a Trainer.

    Raises:
        ValueError: If it is not a checkpoint.
    """
    try:
        saved = _read(path, mmap=zipfile.is_zipfile(path))
        _check_shrunk(saved)
        return set(saved) == {"state_dict", KEY}
    except ValueError as error:
        # only a Trainer saves hyperparameters of any type
        if zipfile.is_zipfile(path) and isinstance(error.__cause__, UnpicklingError):
            return False
        raise


def is_shrunk(path: str | Path) -> bool:
    """Return whether a file is a checkpoint of a shrunk model."""
    try:
        return KEY in _read(Path(path))
    except (ValueError, OSError):
        return False


def _read(path: Path, mmap: bool = False) -> Mapping[str, Any]:
    """Return the checkpoint in a file.

    Raises:
        ValueError: If it is not a checkpoint.
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint must be an existing file of a shrunk model, got {str(path)!r}")
    try:
        return _checked(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))
    except (UnpicklingError, EOFError, RuntimeError, KeyError, IndexError, AttributeError) as error:  # of any bytes
        raise ValueError(f"checkpoint must be the file of a shrunk model, got {str(path)!r}: {error}") from error


def _checked(saved: Any) -> Mapping[str, Any]:
    """Return what a file holds if it is a checkpoint.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(saved, Mapping) or "state_dict" not in saved:
        found = f"the entries {list(saved)[:5]}" if isinstance(saved, Mapping) else shown(saved)
        raise ValueError(f"checkpoint must be one of a shrunk model, by save_shrunk or a Trainer, got {found}")
    return saved


def travel_along(model: nn.Module) -> None:
    """Let a ``LightningModule`` add its cut record to every checkpoint; other modules save none."""
    if hasattr(type(model), "on_save_checkpoint"):
        # on this instance alone: its class stays as it is
        vars(model)["on_save_checkpoint"] = partial(_save, model)


def _save(model: Any, checkpoint: dict[str, Any]) -> None:
    type(model).on_save_checkpoint(model, checkpoint)
    kept = cut_record_of(model)
    assert kept is not None
    checkpoint[KEY] = kept.state_dict()
    name = checkpoint.get(model.CHECKPOINT_HYPER_PARAMS_NAME)
    if name not in (None, "kwargs"):
        warn(
            f"load this checkpoint of a shrunk model with load_shrunk({type(model).__name__}(...), path): "
            f"load_from_checkpoint cannot, since all hyperparameters are in one argument, {name!r}"
        )
        return
    saved = dict(checkpoint.get(model.CHECKPOINT_HYPER_PARAMS_KEY, {}))
    ours = instantiate_from_cli if saved.get("_instantiator") in _FROM_CLI else instantiate
    checkpoint[model.CHECKPOINT_HYPER_PARAMS_KEY] = {**saved, "_instantiator": _path(ours)}


def instantiate(cls: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """Return a ``LightningModule`` that cuts itself to fit the checkpoint that it is going to load."""
    return _expecting(cls(**kwargs))


def instantiate_from_cli(cls: Any, kwargs: dict[str, Any]) -> Any:
    """Return such a ``LightningModule`` from arguments that ``LightningCLI`` has saved."""
    from lightning.pytorch.cli import instantiate_module

    return _expecting(instantiate_module(cls, kwargs))


def _expecting(model: nn.Module) -> nn.Module:
    vars(model)["on_load_checkpoint"] = partial(_load, model)
    return model


def _load(model: Any, checkpoint: dict[str, Any]) -> None:
    del vars(model)["on_load_checkpoint"]  # so that the method of the class is found next
    _cut_to_fit(model, checkpoint)
    model.on_load_checkpoint(checkpoint)


def _cut_to_fit(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Cut a model to fit a checkpoint.

    Raises:
        ValueError: If the checkpoint is not one of a shrunk model, or of another model, which is left as it was.
    """
    _check_shrunk(checkpoint)
    kept = CutRecord.from_state_dict(checkpoint[KEY])
    cut(model, kept)
    tell_configs(model, kept)
    record_cut(model, kept)
    travel_along(model)


def _check_shrunk(checkpoint: Mapping[str, Any]) -> None:
    missing = {KEY, "state_dict"}.difference(checkpoint)
    if missing:
        whole = ": it is of a whole model, which load_from_checkpoint or load_state_dict loads" * (missing == {KEY})
        raise ValueError(
            f"the checkpoint must be one of a shrunk model, with {sorted(missing)}, got {list(checkpoint)[:9]}{whole}"
        )


def _path(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _trust() -> None:
    """Let Lightning call the two functions above: they run no code but that of the class being loaded."""
    for name in ("lightning.pytorch.core.saving", "pytorch_lightning.core.saving"):
        allowed: set[str] = getattr(
            sys.modules.get(name), "_ALLOWED_INSTANTIATORS", set()
        )  # older Lightnings trust everything
        allowed.update(map(_path, (instantiate, instantiate_from_cli)), _FORMER_PATHS)


_trust()
