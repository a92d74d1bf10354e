"""Teachers: where a teacher comes from, and how it travels."""

import weakref
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_prune.models.copying import copied
from lightning_prune.tensors.distributed import is_sharded
from lightning_prune.training.hooks import training_methods

MANY = 10  # losses at the beginning and at the end that say whether a model is still learning


class Teacher:
    """The teacher of a run: a module that is given, a copy of the dense model, or weights from a file.

    Args:
        source: "dense", a module, or the path of a checkpoint.
        network: Name of the network inside the model that the teacher is a copy of.

    Attributes:
        module: The teacher, as soon as there is one.
    """

    def __init__(self, source: str | nn.Module, network: str) -> None:
        self.module: nn.Module | None = None
        self._source = source
        self._network = network
        self._restored: dict[str, Any] | None = None  # the weights in a checkpoint, until there is a model for them
        self._model: weakref.ref[nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}

    def watch(self, pl_module: LightningModule) -> bool:
        """Copy the model while it is dense, if that is the teacher, and return whether it was copied."""
        self._know(pl_module)
        if self._source != "dense" or self._restored is not None or self.module is not None:
            return False
        self.module = self._copy(pl_module).eval()
        return True

    def appoint(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find or make the teacher, if it is not there yet."""
        self._know(pl_module)
        if isinstance(self._source, nn.Module):
            self.module = trainer.precision_plugin.convert_module(self._source)
        elif self._restored is not None:
            self.module = self._copy(pl_module)
            self.module.load_state_dict(self._restored)
        elif self.module is None and self._source != "dense":
            self.module = self._copy(pl_module, _read(self._source))
        elif self.module is None:
            _expect_dense(trainer, pl_module)
            self._copy(pl_module)  # for nothing: what cannot be copied is better known before the first step
        self._restored = None
        if self.module is not None:
            self.module.to(pl_module.device).eval()

    def saved(self) -> dict[str, Any] | None:
        """Return its weights, where no argument gives them again."""
        known = self.module.state_dict() if self.module is not None and self._source == "dense" else None
        return self._restored or (None if known is None else dict(known))

    def load(self, weights: dict[str, Any] | None, model: "weakref.ref[nn.Module] | None") -> None:
        """Take the weights in a checkpoint, of the teacher of this model; None is any model."""
        self._model = model
        self.module, self._restored = None, weights

    def _know(self, pl_module: LightningModule) -> None:
        if self._model is not None and self._model() is not pl_module:
            self.module = self._restored = None  # those of an earlier run
        self._model = weakref.ref(pl_module)

    def _copy(self, pl_module: LightningModule, weights: dict[str, Any] | None = None) -> nn.Module:
        if any(map(is_sharded, pl_module.parameters())):
            raise ValueError(f"teacher must be a module where the model is sharded, got {self._source!r}")
        try:
            model = copied(pl_module).requires_grad_(False)
        except Exception as error:  # of any type: whatever a user's attributes raise
            raise ValueError(
                f"teacher must be a module where copy.deepcopy cannot copy the model, got {self._source!r} ({error})"
            ) from error
        if weights is not None:
            model.load_state_dict(weights)
        return model.get_submodule(self._network)


def warn_if_it_learns(losses: Sequence[Tensor]) -> None:
    """Warn of a teacher whose loss is still falling: it fell by more than a tenth, from the first ones to the last."""
    half = len(losses) // 2
    if half < MANY // 2:
        return
    first, last = (float(torch.stack(list(part)).mean()) for part in (losses[:half], losses[-half:]))
    if first - last > 0.1 * abs(first):
        rank_zero_warn(
            f'teacher="dense" is the model as it is now, while its loss is still falling, from {first:.3g} to '
            f"{last:.3g}: start from trained weights, let pruning start later, or give a trained teacher"
        )


def find_layer(module: nn.Module, argument: str, name: str) -> nn.Module:
    """Return the module of this name inside another one.

    Raises:
        ValueError: If there is none; the message names the argument and close names.
    """
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        names = [known for known, _ in module.named_modules() if known]
        close = get_close_matches(name, names, n=5, cutoff=0.3) or names[:5]
        raise ValueError(f"{argument} must be the name of a module, got {name!r}; close names: {close}") from error


def _read(path: str | Path) -> dict[str, Any]:
    """Return the weights in a checkpoint of Lightning or in a saved ``state_dict``."""
    if not Path(path).is_file():
        raise ValueError(f'teacher must be "dense", a module or the path of a checkpoint, got no such file: {path}')
    found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    weights: dict[str, Any] = found.get("state_dict", found)
    return weights


def _expect_dense(trainer: Trainer, pl_module: LightningModule) -> None:
    """Reject a teacher that there will never be."""
    pruning = training_methods(trainer)
    if not pruning or any(callback.sparsity_now and callback.state.concerns(pl_module) for callback in pruning):
        found = "a model that is pruned already" if pruning else "no pruning callback in the Trainer"
        raise ValueError(f'teacher="dense" is the model before it is pruned, got {found}')
