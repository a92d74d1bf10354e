"""Scheduled training: masks change at planned positions of the run, from what was observed just before."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_prune import scopes
from lightning_prune.criteria import Criterion
from lightning_prune.granularities import Granularity
from lightning_prune.masks import Masks
from lightning_prune.models.parameters import named_parameters
from lightning_prune.schedules import Horizon
from lightning_prune.tensors.distributed import reshard
from lightning_prune.tensors.selection import Scores
from lightning_prune.training import replanning
from lightning_prune.training.announcing import announce
from lightning_prune.training.checks import check_targets
from lightning_prune.training.consistency import fitting
from lightning_prune.training.observed import ObservedTraining, leave_out_unseen
from lightning_prune.training.plan_text import plan, sharing
from lightning_prune.training.resumed_arguments import earlier_defaults
from lightning_prune.training.run_length import in_steps, length, steps_per_epoch
from lightning_prune.training.step_inputs import inputs_of_step
from lightning_prune.units.units import Units
from lightning_prune.updates import decision
from lightning_prune.updates.output_neurons import UNKNOWN
from lightning_prune.updates.remaining import told
from lightning_prune.updates.target_sparsity import SparsityTarget
from lightning_prune.validation.instances import instance


class ScheduledTraining(ObservedTraining):
    """The abstract base of the callbacks whose masks follow a plan: a subclass defines ``plan``.

    Args:
        sparsity_target: What is to be reached.
        criterion: Scores the units; the lowest go first.
        granularity: Which weights form a unit.
        scope: How the sparsity is shared out over the targets, a name or a callable; None is that of the granularity.
        horizon: When the first and the last update fall.
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out, in the same form.
        log_layers: Whether to log the sparsity of every target beside the total.
    """

    mask_arguments: ClassVar[tuple[str, ...]] = replanning.ARGUMENTS

    def __init__(
        self,
        sparsity_target: SparsityTarget,
        criterion: Criterion,
        granularity: Granularity,
        scope: scopes.ScopeName | scopes.Scope | None,
        horizon: Horizon,
        targets: Sequence[str] = (),
        ignore: Sequence[str] = (),
        log_layers: bool = False,
    ) -> None:
        given = {"scope": scope, "min_density": sparsity_target.min_density}
        self.not_given = tuple(name for name, value in given.items() if value is None)
        granularity = instance("granularity", granularity, Granularity)
        self.scope = granularity.default_scope if scope is None else scope
        scopes.without_search(type(self).__name__, self.scope)
        self.share_out = scopes.resolve(self.scope)
        self.horizon, self.start, self.end = horizon, horizon.start, horizon.end
        self.interval, self.frequency = horizon.interval, horizon.frequency
        super().__init__(sparsity_target, criterion, granularity, targets, ignore, log_layers)

    def plan(self, first: int, last: int) -> list[tuple[int, float]]:
        """Return the updates as (position in intervals, amount), in order, for a window from first to last position."""
        raise NotImplementedError

    def choose_masks(self, model: torch.nn.Module, position: int, amount: float) -> Masks:
        """Return the masks of one update: here, of this fraction of the target sparsity, by the criterion."""
        return decide(self, self.sparsity_target, amount)

    def after_update(self, trainer: Trainer, pl_module: LightningModule, amount: float) -> None:
        """Do what has to follow an update of this amount, when its masks have been set."""

    def describe(self) -> tuple[str, str, list[tuple[int, float]]]:
        """Return the target in words, what the number of an update means, and that number for each position."""
        target = self.sparsity_target
        final = target.of_all(self.state.targets, self.state.left_out)
        return str(target), target.label, [(position, amount * final) for position, amount in self.state.updates]

    @override
    def explain(self) -> str:
        parameters = {name: parameter for unit in self.state.units for name, parameter in unit.weights.items()}
        what, label, updates = self.describe()
        levels = self.sparsity_target.by_target(self.state.targets)
        share = sharing(self.scope, self.sparsity_target) + ("" if self.state.outputs_known else f"\n{UNKNOWN}")
        where = self.interval, label, self.state.left_out, levels, share
        return plan(type(self).__name__, what, parameters, updates, *where)

    @property
    @override
    def reached(self) -> bool:
        updates = self.state.updates
        return bool(updates) and self.state.applied >= updates[-1][0]

    @override
    def on_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.state.inputs is None:
            self.state.inputs = pl_module.example_input_array
        self.find_units(trainer, pl_module)
        self.observation.active = lambda: bool(trainer.training)
        self.state.window = self.state.window or self.horizon.window(length(trainer, self.interval, self.max_epochs))
        self.state.updates = self.plan(*self.state.window)
        self.catch_up(trainer)
        if not self.state.waits:
            announce(self, trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.state.waits:
            self.state.inputs = inputs_of_step(pl_module, batch)
            self.find_units(trainer, pl_module)
            check_targets(self, trainer)
            announce(self, trainer, pl_module)
            self.set_masks(trainer, pl_module, self.masks)
            self.maybe_update(trainer, pl_module)

    @override
    def observing(self, trainer: Trainer) -> bool:
        # from the start of the window of optimizer steps before the next update
        position = self.next_position()
        if position is None or not self.observes:
            return False
        if self.criterion.accumulates and self.observation.steps:
            return True
        return self.state.steps >= in_steps(trainer, self.interval, position) - self.criterion.steps

    @override
    def resume_with(self, changed: Mapping[str, str]) -> None:
        earlier = earlier_defaults(changed, self.not_given)
        self.state.outputs_too = bool(earlier)  # the run goes on as it began
        if "scope" in earlier:
            self.scope, self.share_out = "global", scopes.global_
        if "min_density" in earlier:
            self.min_density, self.sparsity_target = 0.0, replace(self.sparsity_target, default_density=0.0)
        if changed.keys() - earlier:
            replanning.replan(self, self.state, {name: changed[name] for name in changed if name not in earlier})

    def catch_up(self, trainer: Trainer) -> None:
        """Make up for updates of a new plan, when a run is resumed with other arguments."""
        replanning.catch_up(self.state)

    def next_position(self) -> int | None:
        """Return the position of the next update; None after the last one."""
        return next((position for position, _ in self.state.updates if position > self.state.applied), None)

    def clock(self, trainer: Trainer) -> int:
        """Return the position of the run, in the intervals of the plan."""
        return trainer.current_epoch if self.interval == "epoch" else self.state.steps

    @override
    def maybe_update(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # looks at the state and not at events: Lightning skips some hooks when a run is resumed
        clock = self.clock(trainer)
        position = self.next_position()
        if position is not None and position <= clock and self.has_observed:
            # an update that had to wait may end up where the next one is due: one serves both
            per_epoch = steps_per_epoch(trainer) if self.interval == "epoch" else 0
            begins = max(clock, self.state.steps // per_epoch) if per_epoch else clock
            due = [update for update in self.state.updates if update[0] <= begins]
            self.update(trainer, pl_module, *due[-1])
        if self.observing(trainer):
            if not self.observation.steps:
                self.find_units(trainer, pl_module)
            self.observation.open()

    def update(self, trainer: Trainer, pl_module: LightningModule, position: int, amount: float) -> None:
        """Find the targets, finalize their statistics, choose masks and set them; or wait for what is missing."""
        state, reached = self.state, self.reached
        if torch.distributed.is_initialized():  # only then parameters can be sharded
            reshard(pl_module)
        self.find_units(trainer, pl_module)
        # frozen targets are due once they are trained, lazy ones after their first forward, new ones once observed
        if not state.units or not self.has_observed or any(map(is_lazy, pl_module.parameters())):
            return
        if self.observes:
            leave_out_unseen(self, trainer, pl_module)
            self.observation.finish()
        masks = self.choose_masks(pl_module, position, amount)
        frozen: set[str] = set()
        if not state.masks.keys() <= masks.keys():  # frozen parameters keep their zeros
            held = fitting(state.masks, named_parameters(pl_module))
            frozen = state.levels.keys() & held.keys() - masks.keys()
            masks = Masks({**held, **masks})
        state.applied = position
        if frozen and self.reached and not reached:
            rank_zero_warn(
                f"{type(self).__name__} made its last update while {sorted(frozen)[:5]} was frozen, and kept the zeros "
                f"that are there: the goal is met by the other targets alone"
            )
        if self.observes and (self.reached or not self.criterion.accumulates):
            self.observation.reset()
        self.set_masks(trainer, pl_module, masks)
        self.after_update(trainer, pl_module, amount)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if not self.state.units and not self.masks:
            rank_zero_warn(f"{type(self).__name__} pruned nothing: its targets were frozen in the whole run")
        elif self.state.updates and not self.reached:
            due = self.state.updates[-1][0]
            reason = f"the run stopped before the last update, due at {self.interval} {due}"
            if self.clock(trainer) >= due and not self.has_observed:
                reason = f"the window of {self.criterion.steps} steps was not full: choose a shorter one"
            rank_zero_warn(f"{type(self).__name__} ended at a sparsity of {self.sparsity_now:.2%}: {reason}")


def decide(
    callback: ScheduledTraining,
    target: SparsityTarget,
    due: float = 1.0,
    units: Sequence[Units] | None = None,
    criterion: Criterion | None = None,
    held: Masks | None = None,
) -> Masks:
    """Return masks for a sparsity target, and warn of targets of which hardly anything is left.

    Args:
        callback: Whose targets are pruned, from what its criterion has observed.
        target: What is to be reached.
        due: The fraction of it that is due.
        units: Those that are pruned; None is all.
        criterion: Scores them; None is that of the callback.
        held: The masks whose pruned units stay pruned; None is those of the callback.
    """
    state = callback.state
    units, criterion = state.units if units is None else units, criterion or callback.criterion

    def allocate(scores: Scores) -> Mapping[str, int]:
        return target.allocate(scores, state.targets, criterion, callback.share_out, due, state.budget)

    made = decision.decide(units, criterion, allocate, state.masks if held is None else held)
    if new := {unit: left for unit, left in made.scarce(units).items() if left < state.scarce.get(unit, 2)}:
        state.scarce.update(new)
        rank_zero_warn(told(type(callback).__name__, new))
    return made.masks
