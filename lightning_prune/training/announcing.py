"""Announcing: what a run is going to do is logged when it starts, with a warning if it may not come to it."""

from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.parameter import is_lazy

from lightning_prune.training.run_length import length, warn_if_too_short
from lightning_prune.training.sparsity_log import log_info
from lightning_prune.updates.output_neurons import UNKNOWN

if TYPE_CHECKING:
    from lightning_prune.training.scheduled import ScheduledTraining


def announce(callback: "ScheduledTraining", trainer: Trainer, pl_module: LightningModule) -> None:
    """Log what is going to happen, and warn if it may not."""
    log_info(callback.explain())
    if not callback.state.outputs_known:
        rank_zero_warn(f"{type(callback).__name__}: {UNKNOWN}")
    lazy = any(map(is_lazy, pl_module.parameters()))
    if not callback.state.units and not callback.target_names() and not lazy:
        name = type(callback).__name__
        rank_zero_warn(f"{name} finds all its targets frozen: it prunes them once they are trained")
    if not callback.reached:
        last = callback.state.updates[-1][0] if callback.state.updates else 0
        warn_if_too_short(callback, callback.interval, last, length(trainer, callback.interval, callback.max_epochs))
