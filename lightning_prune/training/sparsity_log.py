"""Sparsity log: the sparsity that masks give, counted and logged."""

import logging
from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lightning_prune.tensors.boolean import count
from lightning_prune.tensors.distributed import counts_here, is_sharded, over_ranks
from lightning_prune.training.hooks import TrainingMethod, training_methods

# below Lightning's logger, whose handlers and level it shares, and with a name of its own to be silenced by
_log = logging.getLogger("lightning.pytorch.lightning_prune")


def counted(
    masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor], targets: Sequence[str]
) -> tuple[dict[str, float], float]:
    """Return the sparsity of every target that has a mask, and that of all targets; all ranks must call it.

    >>> counted({"a": torch.tensor([True, False])}, {"a": torch.ones(2), "b": torch.ones(2)}, ["a", "b"])
    ({'a': 0.5}, 0.25)
    """
    total, sizes, kept, distributed = 0, {}, [], False
    for name in targets:
        total += parameters[name].numel()
        if name in masks:
            sizes[name] = parameters[name].numel()
            distributed = distributed or is_sharded(parameters[name])
    for name in sizes:
        kept.append(count(masks[name]) if not distributed or counts_here(parameters[name]) else 0)
    if distributed:
        kept = over_ranks(torch.tensor(kept)).tolist()
    levels, zeros = {}, 0
    for (name, size), left in zip(sizes.items(), kept, strict=True):
        levels[name] = 1.0 - left / size
        zeros += size - left
    return levels, zeros / total if total else 0.0


def log_sparsity(callback: TrainingMethod, pl_module: LightningModule) -> None:
    """Log the sparsity of a callback and, where it is to, of each of its targets."""
    state = callback.state
    pl_module.log(state.metric, state.sparsity, prog_bar=True, on_step=True, on_epoch=False, batch_size=1)
    if callback.log_layers:
        layers = {f"pruning/sparsity/{layer}": level for layer, level in state.levels.items()}
        pl_module.log_dict(layers, on_step=True, on_epoch=False, batch_size=1)


def metric_name(callback: TrainingMethod, trainer: Trainer) -> str:
    """Return the name by which the sparsity of a callback is logged, another one for each."""
    others = [other for other in training_methods(trainer) if other is not callback]
    if not others:
        return "pruning/sparsity"
    name, *taken = (",".join(c.targets) or type(c).__name__ for c in (callback, *others))
    return f"pruning/sparsity/{name}" + (f" but {','.join(callback.ignore)}" if name in taken else "")


@rank_zero_only
def log_info(message: str) -> None:
    """Log what is going to happen, once for all ranks."""
    _log.info(message)
