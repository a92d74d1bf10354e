"""Judged run: the metric that a run is judged by, and the run as it was when that was good."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_prune.masks import Masks
from lightning_prune.methods import rewinding
from lightning_prune.models.parameters import named_parameters
from lightning_prune.tensors.packing import pack_all, unpack_all
from lightning_prune.training.consistency import fitting
from lightning_prune.training.hooks import TrainingMethod, training_methods


def monitored(trainer: Trainer, monitor: str) -> float:
    """Return a metric that validation logs, the same on all ranks.

    Raises:
        ValueError: If it logs no metric of that name.
    """
    logged = trainer.callback_metrics
    if monitor not in logged:
        raise ValueError(f"monitor must be a metric that validation logs, got {monitor!r}: {sorted(logged)}")
    return float(trainer.strategy.reduce(logged[monitor].detach().clone(), reduce_op="mean"))


def remember_run(trainer: Trainer, model: LightningModule, owner: TrainingMethod) -> dict[str, Any]:
    """Return what ``rewinding.remember`` does, with the masks of the owner and of all other pruning callbacks."""
    with torch.inference_mode(False):
        memory = rewinding.remember(trainer, model)
    masks = {callback.state_key: pack_all(callback.masks) for callback in training_methods(trainer)}
    return {**memory, "masks": masks.pop(owner.state_key), "others": masks}


def go_back_in_run(trainer: Trainer, model: LightningModule, owner: TrainingMethod, memory: dict[str, Any]) -> None:
    """Put everything back that ``remember_run`` returned."""
    parameters = named_parameters(model)
    packed = {owner.state_key: memory["masks"], **memory.get("others", {})}
    for callback in training_methods(trainer):
        if callback.state_key in packed:
            masks = fitting(unpack_all(packed[callback.state_key]), parameters).items()
            callback.set_masks(trainer, model, Masks({name: m.to(parameters[name].device) for name, m in masks}))
    # afterwards, since the optimizers' state of elements that come back is reset
    rewinding.go_back(trainer, model, memory)
