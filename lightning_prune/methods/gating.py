"""Gating: checkpoints and early stopping that judge only models at their target sparsity."""

from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_prune.training.checks import warn_without_pruning
from lightning_prune.training.compat import EarlyStopping, ModelCheckpoint
from lightning_prune.training.masked import MaskedTraining
from lightning_prune.training.representation import call_text


def target_reached(trainer: Trainer) -> bool:
    """Return whether every pruning callback of the trainer has reached its target; True if there is none."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return all(callback.reached for callback in callbacks if isinstance(callback, MaskedTraining))


class SparseModelCheckpoint(ModelCheckpoint):
    """A ``ModelCheckpoint`` that waits for the target sparsity, so that "best" is never the dense model.

    Takes the arguments of Lightning's ``ModelCheckpoint``. For resuming an interrupted run, add a plain one with
    ``save_last=True``.

    >>> SparseModelCheckpoint(monitor="val_loss").monitor
    'val_loss'
    """

    waits_for_target: ClassVar[bool] = True

    @override
    def __repr__(self) -> str:
        private = ("train_time_interval", "save_on_train_epoch_end", "enable_version_counter")
        kept = {name: vars(self)[f"_{name}"] for name in private if f"_{name}" in vars(self)}
        steps, epochs = (vars(self).get(f"_every_n_{unit}") for unit in ("train_steps", "epochs"))
        epochs = None if epochs in (0, 1) else epochs  # what Lightning makes of None: 1, or 0 with a number of steps
        return call_text(self, every_n_train_steps=steps or None, every_n_epochs=epochs, **kept)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            warn_without_pruning(self, trainer, "it judges every model, like ModelCheckpoint")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if target_reached(trainer):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if target_reached(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if target_reached(trainer):
            super().on_validation_end(trainer, pl_module)


class SparseEarlyStopping(EarlyStopping):
    """An ``EarlyStopping`` that begins to judge, and to lose patience, once the target sparsity is reached.

    Takes the arguments of Lightning's ``EarlyStopping``.

    >>> SparseEarlyStopping(monitor="val_loss").patience
    3
    """

    waits_for_target: ClassVar[bool] = True

    @override
    def __repr__(self) -> str:
        return call_text(self, min_delta=abs(vars(self).get("min_delta", 0.0)))  # its sign is that of the mode

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            warn_without_pruning(self, trainer, "it judges every model, like EarlyStopping")

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if target_reached(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if target_reached(trainer):
            super().on_validation_end(trainer, pl_module)
