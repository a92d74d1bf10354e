"""Protocols: what pruning callbacks ask of the other callbacks of a run, which need not know this package."""

from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_prune.models.parameters import named_parameters
from lightning_prune.tensors.distributed import local
from lightning_prune.tensors.masking import zero_pruned
from lightning_prune.training.consistency import fitting


@runtime_checkable
class SeesDenseModel(Protocol):
    """A callback that wants to see the model while it is dense, such as ``Distillation``."""

    def on_before_pruning(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the model right before its first weight is pruned."""


@runtime_checkable
class KeepsAverage(Protocol):
    """A callback that keeps an averaged copy of the model, as Lightning's ``WeightAveraging`` and its like do."""

    _average_model: nn.Module | None


def averaged_models(callbacks: Iterable[object]) -> list[nn.Module]:
    """Return the copies of the model that averaging callbacks keep; before training there may be none yet.

    >>> averaged_models([object()])
    []
    """
    found = []
    for callback in callbacks:
        average = callback._average_model if isinstance(callback, KeepsAverage) else None
        if isinstance(average, nn.Module):
            found.append(getattr(average, "module", average))
    return found


def mask_averages(callbacks: Iterable[object], masks: Mapping[str, Tensor]) -> None:
    """Apply masks to the copies of the model that averaging callbacks keep."""
    for average in averaged_models(callbacks):
        copies = named_parameters(average)
        held = fitting(masks, copies)
        zero_pruned((local(copies[name]), mask.to(copies[name].device)) for name, mask in held.items())
