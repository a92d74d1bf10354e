"""Masked training: what every callback that trains under masks does in the hooks of Lightning."""

import copy
import weakref
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.masks import Masks
from lightning_prune.models.kept_norms import follow_masks
from lightning_prune.models.parameters import named_parameters
from lightning_prune.tensors.distributed import reshard
from lightning_prune.training.checks import check_strategy, check_targets, explain_mismatch, warn_of_judges
from lightning_prune.training.consistency import drop_missing, fitting, place, restore
from lightning_prune.training.enforcement import MaskEnforcement, is_elementwise, reset_changed
from lightning_prune.training.gradient_readers import GradientReaders
from lightning_prune.training.hooks import TrainingMethod
from lightning_prune.training.protocols import KeepsAverage, SeesDenseModel, averaged_models, mask_averages
from lightning_prune.training.resumed_arguments import changes, texts
from lightning_prune.training.sparsity_log import counted, log_sparsity, metric_name
from lightning_prune.validation.arguments import explain_renamed


class MaskedTraining(TrainingMethod):
    """The abstract base of the callbacks: a subclass decides on masks, this enforces, saves and logs them.

    A subclass overrides hooks of ``TrainingMethod``: ``on_start`` (pick targets), ``before_optimizer_step`` and
    ``maybe_update`` (decide), and calls ``set_masks`` with new masks.

    Args:
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out, in the same form.
        log_layers: Whether to log the sparsity of every target beside the total.
    """

    _running: "weakref.ref[nn.Module] | None" = None  # the model of the run that a trainer is in, of any kind
    _readers = GradientReaders()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__init__" in vars(cls):  # of every method, so that none has to remember it
            cls.__init__ = explain_renamed(cls.__init__)  # type: ignore[method-assign]

    @override
    def set_masks(self, trainer: Trainer, pl_module: LightningModule, masks: Masks) -> None:
        before, parameters = self.state.masks, named_parameters(pl_module)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if not self.state.sparsity and not all(map(torch.all, masks.values())):
            for callback in callbacks:
                if isinstance(callback, SeesDenseModel):
                    callback.on_before_pruning(trainer, pl_module)
        self.enforcement.enforce(parameters, masks)
        if masks is not before:
            reset_changed(trainer.optimizers, parameters, before, masks)
        self.state.masks = masks
        if self.normalized:
            for each in (pl_module, *averaged_models(callbacks)):
                follow_masks(each, masks)
        if averaging := [callback for callback in callbacks if isinstance(callback, KeepsAverage)]:
            mask_averages(averaging, masks)
        self.state.levels, self.state.sparsity = counted(masks, parameters, self.target_names())

    def rebuild(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enforce the masks on the parameters that the model has now, since layers have been replaced."""
        self.state.masks = drop_missing(self, self.masks, named_parameters(pl_module))
        self.set_masks(trainer, pl_module, self.masks)

    # ------------------------------------------------------------------------------------------------ hooks

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            check_strategy(self, trainer)
            self.max_epochs = trainer.max_epochs
        self._running = weakref.ref(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reshard(pl_module)
        if not self.state.concerns(pl_module):
            self.reset()  # the callback of an earlier run, now with another model
        state = self.state
        steps = trainer.global_step if pl_module.automatic_optimization else state.steps
        # a step that was taken, and not yet counted when the checkpoint was saved
        missed = state.restored and state.steps < steps
        state.model, state.steps, state.logged = weakref.ref(pl_module), steps, None
        state.masks = place(self, state.masks, named_parameters(pl_module), state.restored)
        if state.restored:
            restore(self, pl_module, state.masks, "in the checkpoint")
            if changed := changes(state.arguments, texts(self, self.mask_arguments), self.not_given):
                self.resume_with(changed)
        state.restored = False
        self.on_start(trainer, pl_module)
        if missed:
            self.after_batch()
        check_targets(self, trainer)
        warn_of_judges(self, trainer)
        self._readers = GradientReaders.of(trainer, pl_module)
        state.metric = metric_name(self, trainer)
        for optimizer in trainer.optimizers:
            self._attach(trainer, optimizer)
        self.set_masks(trainer, pl_module, self.masks)
        self.maybe_update(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reshard(pl_module)
        parameters = named_parameters(pl_module)
        if not self.enforcement.covers([parameters.get(name) for name in self.masks]):  # layers have been replaced
            self.rebuild(trainer, pl_module)
        self.maybe_update(trainer, pl_module)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._readers.after_backward and not self.needs_dense_gradients(trainer):
            self.enforcement.mask_gradients()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._attach(trainer, optimizer)
        if pl_module.automatic_optimization:
            self._look(trainer, optimizer)

    def _attach(self, trainer: Trainer, optimizer: Optimizer) -> None:
        # in manual optimization nothing but the step itself tells when gradients are complete
        look = None if trainer.lightning_module.automatic_optimization else partial(self._look, trainer)
        self.enforcement.attach(optimizer, look, self.after_optimizer_step)

    def _look(self, trainer: Trainer, optimizer: Optimizer) -> None:
        self.before_optimizer_step(trainer, optimizer)
        # weights are masked after the step; gradients only where those of pruned elements would touch others
        if not self.trains_pruned and (self._readers.before_step or not is_elementwise(optimizer)):
            self.enforcement.mask_gradients(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # with several optimizers global_step counts each of them, with raw ones none
        before, stepped = self.state.steps, self.enforcement.stepped
        steps = trainer.global_step if pl_module.automatic_optimization else before + stepped
        self.enforcement.stepped = False
        if steps != before:
            self.state.steps = steps
            self.after_batch()
            self.maybe_update(trainer, pl_module)
        # what was logged is shown, and logged, until the end of the epoch
        if self.state.logged != (trainer.current_epoch, self.state.levels):
            self.state.logged = trainer.current_epoch, self.state.levels
            log_sparsity(self, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        restore(self, pl_module, self.masks, "when training ended")
        self.release(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.release(pl_module)
        self._running = None
        explain_mismatch(trainer, pl_module, exception)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.release(pl_module)
        if stage == "fit" and self.state.model is not None:  # what other callbacks did when training ended
            restore(self, pl_module, self.masks, "after training")
        self._running = None

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _follow_restored(self, pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _follow_restored(self, pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _follow_restored(self, pl_module)

    # ------------------------------------------------------------------------------------------------ state

    @override
    def state_dict(self) -> dict[str, Any]:
        model = self.state.placed_model()
        if model is not None and self.state.settled:
            restore(self, model, self.masks, "when a checkpoint was saved")
        if not self.state.restored:
            self.state.arguments = texts(self, self.mask_arguments)
        return self.state.saved()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = self.State.load(type(self).__name__, state_dict)
        self.reset()
        self.state = state
        state.model = self._running  # whose state it is; that of any model where the user loads it

    def __getstate__(self) -> dict[str, Any]:
        # a copy keeps what was decided, and nothing that is tied to this process or to the model
        kept = {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict", "_running")}
        return {**kept, "state": copy.copy(self.state), "enforcement": MaskEnforcement()}


def _follow_restored(callback: MaskedTraining, pl_module: LightningModule) -> None:
    """Let norms follow the masks in a checkpoint that is evaluated, before or without a fit."""
    if callback.normalized and callback.state.restored:
        follow_masks(pl_module, fitting(callback.masks, named_parameters(pl_module)))
