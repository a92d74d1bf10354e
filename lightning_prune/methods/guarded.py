"""Guarded pruning: as sparse as possible, as long as a metric stays within a bound."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_prune import scopes
from lightning_prune.criteria import Criterion, Magnitude
from lightning_prune.granularities import Granularity, Weight
from lightning_prune.masks import Masks
from lightning_prune.methods import rewinding
from lightning_prune.methods.sparsity_search import Mode, Search, mode_of, settled
from lightning_prune.models.parameters import named_parameters
from lightning_prune.schedules import Horizon
from lightning_prune.tensors.packing import pack_all, unpack_all
from lightning_prune.training.consistency import fitting, restore
from lightning_prune.updates import target_sparsity as goal
from lightning_prune.validation.arguments import choice, integer, number, text


class GuardedPruning(rewinding.Rewinding):
    """Raise the sparsity step by step while a monitored metric stays within a bound of the dense model's.

    The first validation measures the dense model. Each further sparsity is pruned at once and fine-tuned for up to
    ``patience`` validations. Once it is within the bound, the model is remembered (weights, buffers, masks, optimizers
    and learning-rate schedulers, on the CPU and in checkpoints) and the next one is tried. If it does not come within
    the bound, training goes back to what was remembered, and half the step is tried. Validations count once all other
    pruning callbacks have reached their target, and their masks are remembered, too. When the step falls below
    ``precision``, the best is trained for one more validation, and the run stops. However a run ends, it leaves the
    sparsest model that was within the bound when it was validated. To resume exactly, resume from checkpoints that are
    saved after validation: Lightning never repeats one that was due when a checkpoint was saved.

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
        scope: How the sparsity is shared out over the targets: "global", "local", "erk", "lamp" or a callable.
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
        scope: scopes.ScopeName | scopes.Scope = "global",
        targets: Sequence[str] = (),
        ignore: Sequence[str] = (),
        log_layers: bool = False,
    ) -> None:
        self.monitor = text("monitor", monitor, "the name of a metric")
        self.max_drop = number("max_drop", max_drop, "[0, inf)")
        self.mode: Mode = _mode(mode, self.monitor)
        self.reference = None if reference is None else number("reference", reference)
        self.step = number("step", step, "(0, 1)")
        self.precision = number("precision", precision, "(0, 1)")
        self.patience = integer("patience", patience, 1, unit="validation")
        until = isinstance(warmup, str) and warmup == "settled"
        self.warmup: int | Literal["settled"] = "settled" if until else integer("warmup", warmup, 0, unit="validations")
        self._ceiling = number("sparsity", sparsity, "[0, 1)")
        goal.check(self._ceiling, None, granularity)
        super().__init__(sparsity, criterion, granularity, scope, Horizon(0, 0), targets, ignore, log_layers=log_layers)

    @override
    def forget(self) -> None:
        super().forget()
        limits = (self.mode, self.max_drop, self._ceiling, self.step, self.precision, self.patience, self.reference)
        self._search = Search(*limits)
        self._planned: list[tuple[int, float]] = []  # all updates so far, and one that is due
        self._best: dict[str, Any] | None = None
        self._back_at: int | None = None  # the optimizer step at which to go back to it
        self._validations = 0
        self._outgrown = False  # whether the metric has become much better than the reference
        self._settling: list[float] = []  # the metric in the validations that were waited for it to settle
        self._trials: list[tuple[int, float, float, bool]] = []

    @property
    def trials(self) -> list[tuple[int, float, float, bool]]:
        """What was judged, in order: (optimizer step, sparsity, value of the metric, whether it was kept)."""
        return list(self._trials)

    @property
    @override
    def reached(self) -> bool:
        return self._search.settled

    @override
    def chosen_by(self) -> tuple[str, ...]:
        return (*super().chosen_by(), "monitor", "mode", "reference", "step")

    @override
    def resume_with(self, changed: Mapping[str, str]) -> None:
        self._refuse_changes(changed, "sparsity", "monitor", "mode", "reference", "step")
        super().resume_with(changed)

    @override
    def plan(self, first: int, last: int) -> list[tuple[int, float]]:
        return self._planned

    @override
    def describe(self) -> tuple[str, str, list[tuple[int, float]]]:
        return f"at most {self.max_drop} of {self.monitor} lost", "level", self._planned

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
    def choose(self, model: torch.nn.Module, position: int, amount: float) -> Masks:
        return self.choose_for(model, amount)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not trainer.enable_validation:
            raise ValueError(
                f"validation must log {self.monitor!r}, got a run without validation: give the model a validation_step "
                f"and a val_dataloader, and do not limit its batches to 0"
            )

    @override
    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().begin(trainer, pl_module)
        if self._best is not None:
            rewinding.check_memory(type(self).__name__, trainer, pl_module, self._best)
        if self._search.done:  # resumed from the last checkpoint
            trainer.should_stop = True

    @override
    def advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._back_at is not None and self._steps >= self._back_at:
            self._go_back(trainer, pl_module)
        super().advance(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        value = self._value(trainer)
        pending = self._back_at is not None or (bool(self._planned) and self._applied < self._planned[-1][0])
        others = all(callback.reached for callback in rewinding.masked(trainer) if callback is not self)
        if trainer.sanity_checking or self._search.done or pending or not others:
            return
        self._validations += 1
        if self._is_warm(value):
            self._judge(trainer, pl_module, value)

    def _is_warm(self, value: float) -> bool:
        if self.warmup != "settled":
            return self._validations > self.warmup
        if not self._trials:
            self._settling.append(value)
        return bool(self._trials) or settled(self._settling, self.mode, self.patience, self.max_drop)

    def _value(self, trainer: Trainer) -> float:
        """Return the metric, the same on all ranks."""
        logged = trainer.callback_metrics
        if self.monitor not in logged:
            raise ValueError(f"monitor must be a metric that validation logs, got {self.monitor!r}: {sorted(logged)}")
        return float(trainer.strategy.reduce(logged[self.monitor].detach().clone(), reduce_op="mean"))

    def _judge(self, trainer: Trainer, pl_module: LightningModule, value: float) -> None:
        """Decide what is done after the next optimizer step; until then, what was validated may be saved."""
        level = self._search.level
        verdict = self._search.judge(value)
        self._trials.append((self._steps, level, value, verdict == "keep"))
        if self.reference is None and not self._outgrown and self._search.outgrows(value):
            self._outgrown = True
            rank_zero_warn(
                f"{type(self).__name__} holds {self.monitor!r} against {self._search.reference:g}, that of a model in "
                f'training: it has come to {value:g} since. Train longer before the search, with warmup="settled" or a '
                f"number of validations, start from trained weights, or give a reference"
            )
        if verdict == "keep":
            with torch.inference_mode(False):
                memory = rewinding.remember(trainer, pl_module)
            masks = {callback.state_key: pack_all(callback.masks) for callback in rewinding.masked(trainer)}
            self._best = {**memory, "masks": masks.pop(self.state_key), "others": masks, "steps": self._steps}
        if verdict == "back":
            self._back_at = self._steps + 1
        if self._search.done:
            trainer.should_stop = True
        elif verdict != "wait" and not self._search.last:
            self._planned.append((self._steps + 1 + self.criterion.steps, self._search.level))

    def _go_back(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._best is not None
        self._back_at = None
        self._observation.reset()
        parameters = named_parameters(pl_module)
        packed = {self.state_key: self._best["masks"], **self._best.get("others", {})}
        for callback in rewinding.masked(trainer):
            if callback.state_key in packed:
                masks = fitting(unpack_all(packed[callback.state_key]), parameters).items()
                placed = Masks({name: mask.to(parameters[name].device) for name, mask in masks})
                callback.put_in_force(trainer, pl_module, placed)
        # afterwards, since optimizers forget entries that come back
        rewinding.go_back(trainer, pl_module, self._best)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._best is not None and self._best["steps"] != self._steps:
            self._go_back(trainer, pl_module)
        if not self._search.good:
            rank_zero_warn(
                f"{type(self).__name__} ended without pruning anything: no sparsity held {self.monitor!r} within "
                f"{self.max_drop} of {self._search.reference}, judged: {self._trials}"
            )
        self._search.settled = self._best is not None
        restore(self, pl_module, self.masks, "when training ended")
        self._let_go(pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        found = asdict(self._search)
        return {
            **super().state_dict(),
            "search": {name: found[name] for name in _FOUND},
            "planned": [list(update) for update in self._planned],
            "best": self._best,
            "back_at": self._back_at,
            "validations": self._validations,
            "settling": list(self._settling),
            "trials": [list(trial) for trial in self._trials],
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._expect(state_dict, "search", "planned", "best", "back_at", "validations", "trials")
        super().load_state_dict(state_dict)
        for name in _FOUND:
            setattr(self._search, name, state_dict["search"][name])
        self._planned = [(position, level) for position, level in state_dict["planned"]]
        self._best, self._back_at = state_dict["best"], state_dict["back_at"]
        self._validations, self._settling = state_dict["validations"], list(state_dict.get("settling", []))
        self._trials = [(step, level, value, held) for step, level, value, held in state_dict["trials"]]


def _mode(mode: Literal["max", "min"] | None, monitor: str) -> Mode:
    """Return whether more or less is better, as is said or as the name says."""
    named = mode_of(monitor)
    chosen: Mode = (named or "max") if mode is None else choice("mode", mode, ("max", "min"))
    if named is not None and named != chosen:
        raise ValueError(
            f'mode must be "{named}" for {monitor!r}, by its name, got {mode!r}: log it under another name'
        )
    return chosen


# what a search has found out; the rest are arguments, which a resumed run may change
_FOUND = ("reference", "step", "level", "good", "bad", "waited", "last", "done", "settled")
