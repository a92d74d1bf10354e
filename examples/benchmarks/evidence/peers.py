"""Other libraries, used as they document, on the same networks, data and budget."""

from collections.abc import Callable
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from torch.nn.utils import prune

WEIGHTS: dict[str, Any] = {"parameter_names": ["weight"], "use_lottery_ticket_hypothesis": False}
START, END = 0.1, 0.7  # fractions of the run: the window of gradual pruning, as in lightning_prune


def layers(module: nn.Module) -> list[nn.Module]:
    """Return the layers whose weights are pruned."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def cubic(progress: float) -> float:
    """Return the fraction of the sparsity that is scheduled at this progress through the run."""
    return 1 - (1 - min(1.0, max(0.0, (progress - START) / (END - START)))) ** 3


class GradualModelPruning(ModelPruning):
    """Lightning's callback along the cubic schedule, epoch by epoch."""

    def __init__(self, sparsity: float) -> None:
        self.sparsity = sparsity
        super().__init__("l1_unstructured", amount=self.due, apply_pruning=lambda epoch: self.due(epoch) > 0, **WEIGHTS)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.epochs = trainer.max_epochs
        super().setup(trainer, pl_module, stage)

    def due(self, epoch: int) -> float:
        """Return the fraction of the remaining weights to prune at the end of an epoch, since amounts compound here."""
        before, after = (1 - self.sparsity * cubic(done / self.epochs) for done in (epoch, epoch + 1))
        return 1 - after / before


class OneShotModelPruning(ModelPruning):
    """Lightning's callback, one-shot, in the middle of the run."""

    def __init__(self, sparsity: float) -> None:
        super().__init__("l1_unstructured", amount=sparsity, apply_pruning=self.is_due, **WEIGHTS)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.epochs = trainer.max_epochs
        super().setup(trainer, pl_module, stage)

    def is_due(self, epoch: int) -> bool:
        """Return whether half of the epochs are done at the end of this one."""
        return epoch + 1 == self.epochs // 2


class TorchPrune(Callback):
    """torch.nn.utils.prune by hand, one-shot, in the middle of the run."""

    def __init__(self, sparsity: float) -> None:
        self.sparsity = sparsity

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == trainer.max_epochs // 2:
            weights = [(layer, "weight") for layer in layers(pl_module)]
            prune.global_unstructured(weights, prune.L1Unstructured, amount=self.sparsity)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for layer in layers(pl_module):
            prune.remove(layer, "weight")


class FasterAI(Callback):
    """fasterai's Sparsifier along its AGP schedule, which is the cubic one; its own callback needs fastai's Learner."""

    def __init__(self, sparsity: float) -> None:
        self.sparsity = sparsity

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from fasterai.core.criteria import large_final
        from fasterai.sparse.sparsifier import Sparsifier

        self.steps = trainer.estimated_stepping_batches
        kinds = (nn.Linear, nn.Conv2d)
        self.sparsifier = Sparsifier(pl_module, "weight", "global", large_final, layer_type=kinds)
        self.due = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        due = self.sparsity * cubic(round(trainer.global_step / self.steps, 3))
        if due != self.due:
            self.due = due
            self.sparsifier.sparsify_model(due)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.sparsifier._apply_masks()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sparsifier._clean_buffers()


class TorchPruning(Callback):
    """Torch-Pruning removes the neurons with the smallest weight groups, in the middle of the run."""

    def __init__(self, sparsity: float, shape: tuple[int, ...] = (1, 28, 28)) -> None:
        self.sparsity, self.shape = sparsity, shape

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch != trainer.max_epochs // 2:
            return
        import torch_pruning

        importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
        ignored = [layers(pl_module)[-1]]
        example = torch.zeros(1, *self.shape)
        pruner = torch_pruning.pruner.BasePruner(
            pl_module.network, example, importance, pruning_ratio=self.sparsity, ignored_layers=ignored
        )
        pruner.step()
        schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        trainer.strategy.setup_optimizers(trainer)  # the parameters are new ones
        for config, state in zip(trainer.lr_scheduler_configs, schedules, strict=True):
            config.scheduler.load_state_dict(state)


PEERS: dict[str, Callable[[float, int], Callback]] = {
    "ModelPruning, gradual": lambda sparsity, seed: GradualModelPruning(sparsity),
    "ModelPruning, one-shot": lambda sparsity, seed: OneShotModelPruning(sparsity),
    "torch.nn.utils.prune, one-shot": lambda sparsity, seed: TorchPrune(sparsity),
    "fasterai, gradual": lambda sparsity, seed: FasterAI(sparsity),
    "Torch-Pruning, neurons": lambda sparsity, seed: TorchPruning(sparsity),
}
