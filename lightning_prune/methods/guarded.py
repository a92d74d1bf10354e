"""Guarded pruning: as sparse as possible, as long as a metric stays within a bound."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_prune import scopes
from lightning_prune.criteria import Criterion, Magnitude
from lightning_prune.granularities import Granularity, Weight
from lightning_prune.masks import Masks
from lightning_prune.methods import rewinding
from lightning_prune.methods.guarded_state import GuardedState
from lightning_prune.methods.judged_run import go_back_in_run, monitored, remember_run, verdict_text
from lightning_prune.methods.sparsity_search import Mode, Search, checked_mode, settled
from lightning_prune.schedules import Horizon
from lightning_prune.training.consistency import restore
from lightning_prune.training.hooks import training_methods
from lightning_prune.training.resumed_arguments import reject_changes
from lightning_prune.training.scheduled import decide
from lightning_prune.training.sparsity_log import log_info
from lightning_prune.training.state import RunState
from lightning_prune.updates.target_sparsity import SparsityTarget
from lightning_prune.validation.arguments import integer, number
from lightning_prune.validation.instances import text


class GuardedPruning(rewinding.Rewinding):
    """Raise the sparsity step by step while a monitored metric stays within a bound of the dense model's.

    The first validation measures the dense model. Each further sparsity is pruned in one step and fine-tuned for up to
    ``patience`` validations. Once it is within the bound, the model is remembered (weights, buffers, masks, optimizers
    and learning-rate schedulers, on the CPU and in checkpoints) and the next one is tried. If it does not come within
    the bound, training goes back to what was remembered, and half the step is tried. Validations count once all other
    pruning callbacks have reached their target, and their masks are remembered, too. When the step falls below
    ``precision``, the best is trained for one more validation, and the run stops. Every verdict is logged as a line of
    text. However a run ends, it leaves the sparsest model that was within the bound when it was validated. To resume
    exactly, resume from checkpoints that are saved after validation: Lightning never repeats one that was due when a
    checkpoint was saved.

    Args:
        monitor: The name of a metric that validation logs.
        max_drop: By how much it may be worse than the reference, in its own units.
        mode: Whether more ("max") or less ("min") of it is better; None is "min" for names with "loss", "error" and the
            like, otherwise "max". A mode that contradicts the name is refused.
        sparsity: The most to try: a fraction of zeros among the targets, in [0, 1).
        reference: The value to hold; None is that of the first validation after the ``warmup``, before any pruning.
        step: By how much the sparsity is raised at first, in (0, 1).
        precision: The least step; the search ends below it.
        patience: How many validations a sparsity gets to come within the bound.
        warmup: How many validations pass first, while the dense model is trained; "settled" are as many as it takes
            until the metric has not become better by more than ``max_drop`` for ``patience`` validations. A run that
            starts from scratch needs one of the two: otherwise the reference is that of a model that has hardly begun.
        criterion: Scores the units; the lowest go first.
        granularity: Which weights form a unit.
        scope: How the sparsity is shared out over the targets: "global", "local", "erk", "lamp" or a callable. None is
            "global" for single weights and blocks, and "local" for channels and heads, which keeps every layer alive.
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out, in the same form.
        log_layers: Whether to log the sparsity of every target beside the total ``pruning/sparsity``.

    Raises:
        ValueError: If an argument is out of range; before training, if there is no validation, parameters are sharded,
            or stochastic weight averaging replaces the schedulers; at the first validation, if it does not log the
            metric.

    >>> GuardedPruning("val_acc", max_drop=0.01).trials
    []
    """

    State: ClassVar[type[RunState]] = GuardedState
    state: GuardedState
    mask_arguments: ClassVar[tuple[str, ...]] = (
        *rewinding.Rewinding.mask_arguments,
        "monitor",
        "mode",
        "reference",
        "step",
    )

    def __init__(
        self,
        monitor: str,
        max_drop: float = 0.01,
        mode: Literal["max", "min"] | None = None,
        sparsity: float = 0.99,
        reference: float | None = None,
        step: float = 0.2,
        precision: float = 0.01,
        patience: int = 3,
        warmup: int | Literal["settled"] = 0,
        criterion: Criterion = Magnitude(),
        granularity: Granularity = Weight(),
        scope: scopes.ScopeName | scopes.Scope | None = None,
        targets: Sequence[str] = (),
        ignore: Sequence[str] = (),
        log_layers: bool = False,
    ) -> None:
        self.monitor = text("monitor", monitor, "the name of a metric")
        self.max_drop = number("max_drop", max_drop, "[0, inf)")
        self.mode: Mode = checked_mode(mode, self.monitor)
        self.reference = None if reference is None else number("reference", reference)
        self.step = number("step", step, "(0, 1)")
        self.precision = number("precision", precision, "(0, 1)")
        self.patience = integer("patience", patience, 1, unit="validation")
        until = isinstance(warmup, str) and warmup == "settled"
        self.warmup: int | Literal["settled"] = "settled" if until else integer("warmup", warmup, 0, unit="validations")
        self._ceiling = number("sparsity", sparsity, "[0, 1)")
        target = SparsityTarget(self._ceiling).for_granularity(granularity)
        super().__init__(target, criterion, granularity, scope, Horizon(0, 0), targets, ignore, log_layers)

    @property
    def _search(self) -> Search:
        limits = (self.mode, self.max_drop, self._ceiling, self.step, self.precision, self.patience, self.reference)
        return replace(Search(*limits), **(self.state.search or {}))

    @property
    def trials(self) -> list[tuple[int, float, float, bool]]:
        """What was judged, in order: (optimizer step, sparsity, value of the metric, whether it was kept)."""
        return list(self.state.trials)

    @property
    @override
    def reached(self) -> bool:
        return self._search.settled

    @override
    def resume_with(self, changed: Mapping[str, str]) -> None:
        reject_changes(self, changed, "sparsity", "monitor", "mode", "reference", "step")
        super().resume_with(changed)

    @override
    def plan(self, first: int, last: int) -> list[tuple[int, float]]:
        return self.state.planned

    @override
    def describe(self) -> tuple[str, str, list[tuple[int, float]]]:
        return f"at most {self.max_drop} of {self.monitor} lost", "sparsity", self.state.planned

    @override
    def explain(self) -> str:
        targets = super().explain().rpartition("\n")[0]  # without the updates, which are decided on the way
        first = "the first that settles" if self.warmup == "settled" else f"validation {self.warmup + 1}"
        dense = f"that of {first}" if self.reference is None else f"{self.reference:g}"
        patience = f"{self.patience} validation{'s' * (self.patience > 1)}"
        return (
            f"{targets}\nsearch up to {self._ceiling:.1%}, in steps of {self.step:.1%} down to {self.precision:.1%}, "
            f"each fine-tuned for up to {patience}; reference of {self.monitor} ({self.mode}): {dense}"
        )

    @override
    def choose_masks(self, model: torch.nn.Module, position: int, amount: float) -> Masks:
        return decide(self, SparsityTarget(amount).for_granularity(self.granularity))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not trainer.enable_validation:
            raise ValueError(
                f"validation must log {self.monitor!r}, got a run without validation: give the model a validation_step "
                f"and a val_dataloader, and do not limit its batches to 0"
            )

    @override
    def on_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_start(trainer, pl_module)
        if self.state.best is not None:
            rewinding.check_memory(type(self).__name__, trainer, pl_module, self.state.best)
        if self._search.done:  # resumed from the last checkpoint
            trainer.should_stop = True

    @override
    def maybe_update(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.state.back_at is not None and self.state.steps >= self.state.back_at:
            self._go_back(trainer, pl_module)
        super().maybe_update(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        value = monitored(trainer, self.monitor)
        planned = self.state.planned
        pending = self.state.back_at is not None or (bool(planned) and self.state.applied < planned[-1][0])
        others = all(callback.reached for callback in training_methods(trainer) if callback is not self)
        if trainer.sanity_checking or self._search.done or pending or not others:
            return
        self.state.validations += 1
        if self._is_warm(value):
            self._judge(trainer, pl_module, value)

    def _is_warm(self, value: float) -> bool:
        if self.warmup != "settled":
            return self.state.validations > self.warmup
        if not self.state.trials:
            self.state.settling.append(value)
        return bool(self.state.trials) or settled(self.state.settling, self.mode, self.patience, self.max_drop)

    def _judge(self, trainer: Trainer, pl_module: LightningModule, value: float) -> None:
        """Decide what is done after the next optimizer step; until then, what was validated may be saved."""
        search = self._search
        before, verdict = replace(search), search.judge(value)
        self.state.search = search.found()
        self.state.trials.append((self.state.steps, before.level, value, verdict == "keep"))
        log_info(f"{type(self).__name__}: {verdict_text(self.monitor, before, search, value, verdict)}")
        if self.reference is None and not self.state.outgrown and search.outgrows(value):
            self.state.outgrown = True
            rank_zero_warn(
                f"{type(self).__name__} holds {self.monitor!r} against {search.reference:g}, that of a model in "
                f'training: it has come to {value:g} since. Train longer before the search, with warmup="settled" or a '
                f"number of validations, start from trained weights, or give a reference"
            )
        if verdict == "keep":
            self.state.best = {**remember_run(trainer, pl_module, self), "steps": self.state.steps}
        if verdict == "back":
            self.state.back_at = self.state.steps + 1
        if search.done:
            trainer.should_stop = True
        elif verdict != "wait" and not search.last:
            self.state.planned.append((self.state.steps + 1 + self.criterion.steps, search.level))

    def _go_back(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.state.best is not None
        self.state.back_at = None
        self.observation.reset()
        go_back_in_run(trainer, pl_module, self, self.state.best)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.state.best is not None and self.state.best["steps"] != self.state.steps:
            self._go_back(trainer, pl_module)
        search = self._search
        if not search.good:
            rank_zero_warn(
                f"{type(self).__name__} ended without pruning anything: no sparsity held {self.monitor!r} within "
                f"{self.max_drop} of {search.reference}, judged: {self.state.trials}"
            )
        search.settled = self.state.best is not None
        self.state.search = search.found()
        restore(self, pl_module, self.masks, "when training ended")
        self.release(pl_module)
