"""Scheduled training: masks change at planned positions of the run, from what was observed just before."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune import scopes
from lightning_prune.criteria import Criterion
from lightning_prune.granularities import Granularity
from lightning_prune.masks import Masks
from lightning_prune.models.forward import Inputs
from lightning_prune.models.parameters import left_out, named_parameters
from lightning_prune.schedules import Horizon
from lightning_prune.tensors.distributed import reshard
from lightning_prune.training.consistency import fitting
from lightning_prune.training.enforcement import parameter_ids
from lightning_prune.training.gradient_readers import may_repair
from lightning_prune.training.masked import MaskedTraining, gradient_scale, tell
from lightning_prune.training.plan_text import plan
from lightning_prune.training.resumed_arguments import listed, texts
from lightning_prune.training.run_length import in_steps, length, steps_per_epoch
from lightning_prune.training.step_inputs import inputs_of_step
from lightning_prune.units.units import Units
from lightning_prune.updates import target_sparsity as goal
from lightning_prune.updates.budget import Budget, Measure
from lightning_prune.updates.decision import decide
from lightning_prune.updates.remaining import scarce, told
from lightning_prune.updates.statistics import Observation, scorable
from lightning_prune.validation.instances import instance

_OBSERVED_BY = ("criterion", "granularity")
_WINDOW_BY = ("start", "end", "interval")


class ScheduledTraining(MaskedTraining):
    """The abstract base of the callbacks whose masks follow a plan: a subclass says ``plan``, and may say ``choose``.

    Args:
        sparsity: Fraction of zeros among the targets, in [0, 1), or ``{pattern: fraction}`` per layer.
        criterion: Scores the units; the lowest go first.
        granularity: Which weights form a unit.
        scope: How the sparsity is shared out over the targets, a name or a callable.
        horizon: When the first and the last update fall.
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out, in the same form.
        threshold: Instead of a sparsity: prune every unit that scores below it.
        log_layers: Whether to log the sparsity of every target beside the total.
        min_density: Fraction of every target that is kept at least.
        of: What the sparsity is a fraction of: the "units" of the targets, all "parameters" or "flops" of the model.
    """

    def __init__(
        self,
        sparsity: goal.Sparsity | None,
        criterion: Criterion,
        granularity: Granularity,
        scope: scopes.ScopeName | scopes.Scope,
        horizon: Horizon,
        targets: Sequence[str] = (),
        ignore: Sequence[str] = (),
        threshold: float | None = None,
        log_layers: bool = False,
        min_density: float = 0.0,
        of: Measure = "units",
    ) -> None:
        own = type(instance("criterion", criterion, Criterion))
        if own.backward is not Criterion.backward or own.passes is not Criterion.passes:
            raise ValueError(
                f"criterion must observe the training that is under way, got {criterion}, which needs passes of its "
                f"own: use PruningAtInit(..., criterion={type(criterion).__name__}()), or prune(model, ...) before fit"
            )
        self._scope = scopes.resolve(scope)
        self._horizon = horizon
        self.sparsity = goal.amount(sparsity)
        self.criterion = criterion
        self.granularity = instance("granularity", granularity, Granularity)
        self.scope = scope
        self.start = horizon.start
        self.end = horizon.end
        self.interval = horizon.interval
        self.frequency = horizon.frequency
        self.threshold = goal.level(threshold)
        self.min_density = goal.density(min_density)
        self.of = of
        super().__init__(targets, ignore, log_layers)

    def plan(self, first: int, last: int) -> list[tuple[int, float]]:
        """Return the updates as (position in intervals, amount), in order, for a window from first to last position."""
        raise NotImplementedError

    def choose(self, model: torch.nn.Module, position: int, amount: float) -> Masks:
        """Return the masks of one update: here, of this fraction of the goal, by the criterion."""
        return self.choose_for(model, self.sparsity, amount)

    def choose_for(self, model: torch.nn.Module, sparsity: goal.Sparsity | None, due: float = 1.0) -> Masks:
        """Return masks, by the criterion, for a goal of which this fraction is due."""
        found = goal.find_targets(model, sparsity, self.targets, self.ignore, later=True)
        axes = (sparsity, self.threshold, self.criterion, self._scope)
        allocate = goal.allocation(found, *axes, due, self.min_density, self._budget)
        return decide(self._units, self.criterion, allocate, self.masks).masks

    def after_update(self, trainer: Trainer, pl_module: LightningModule, amount: float) -> None:
        """Do what has to follow an update of this amount, when its masks are in force."""

    def describe(self) -> tuple[str, str, list[tuple[int, float]]]:
        """Return the goal in words, what is told of each update, and that for each position."""
        what, final = goal.describe(self.sparsity, self.threshold)
        what += "" if self.of == "units" else f" of the {self.of}"
        label = "level" if isinstance(self.sparsity, float | int) else "part of that"
        return what, label, [(position, amount * final) for position, amount in self._updates]

    @override
    def explain(self) -> str:
        parameters = {name: parameter for unit in self._units for name, parameter in unit.weights.items()}
        what, told, updates = self.describe()
        return plan(type(self).__name__, what, parameters, updates, self.interval, told, self._left_out)

    @override
    def forget(self) -> None:
        super().forget()
        self._units: list[Units] = []
        self._found: list[int] = []  # ids of the parameters that the units were looked up for
        self._left_out: dict[str, str] = {}
        self._unseen: list[str] = []  # names of targets that were left out since the criterion saw nothing of them
        self._inputs: Inputs = None
        self._budget: Budget | None = None
        self._observation = Observation(self.criterion, [])
        self._observed: dict[str, Any] | None = None  # restored statistics, until there are units for them
        self._window: tuple[int, int] | None = None  # resolved once: a longer resumed run must not move it
        self._updates: list[tuple[int, float]] = []
        self._applied = -1  # position of the last update
        self._replanned = False  # whether a resumed run has other arguments than it had
        self._epochs: int | None = None  # as the user has set them
        self._scarce: dict[str, int] = {}  # targets of which a warning has said how few units are left

    @property
    @override
    def reached(self) -> bool:
        return bool(self._updates) and self._applied >= self._updates[-1][0]

    @override
    def target_names(self) -> list[str]:
        # those that may be pruned now, and those that were and are frozen, or wait until a batch shows how units couple
        held = (name for name in self._levels if name in self.masks)
        return list(dict.fromkeys([*(name for unit in self._units for name in unit.weights), *held]))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._epochs = trainer.max_epochs

    @override
    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._inputs is None:
            self._inputs = pl_module.example_input_array
        self._find_units(trainer, pl_module)
        self._observation.active = lambda: bool(trainer.training)
        duration = length(trainer, self.interval, self._epochs)
        self._window = self._window or self._horizon.window(duration)
        self._updates = self.plan(*self._window)
        self._catch_up(trainer.current_epoch if self.interval == "epoch" else self._steps)
        if not self._waits_for_a_batch:
            self._announce(pl_module, duration)

    @override
    def chosen_by(self) -> tuple[str, ...]:
        axes = ("sparsity", "threshold", "criterion", "granularity", "scope", "min_density", "of")
        return (*axes, "start", "end", "interval", "frequency")

    @override
    def resume_with(self, changed: Mapping[str, str]) -> None:
        found = listed(changed, texts(self, changed))
        drops = ", and what was observed is forgotten" if not changed.keys().isdisjoint(_OBSERVED_BY) else ""
        rank_zero_warn(
            f"{type(self).__name__} goes on with {found}: its updates are planned anew{drops}, and weights that are "
            f"pruned do not come back for that"
        )
        self._observed = None if drops else self._observed
        self._window = None if not changed.keys().isdisjoint(_WINDOW_BY) else self._window
        self._applied = -1 if "interval" in changed else self._applied
        self._replanned = not changed.keys() <= {*_OBSERVED_BY, "scope"}

    def _catch_up(self, clock: int) -> None:
        """Make the last update of a new plan due, if all updates of the old one have been made."""
        if self._replanned and self._updates:
            self._applied = min(self._applied, self._updates[-1][0] - 1)
        self._replanned = False

    @property
    def _waits_for_a_batch(self) -> bool:
        """Whether units are coupled, or FLOPs are to be counted, and an example input is still to come."""
        return (self.granularity.coupled is True or self.of == "flops") and self._inputs is None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._waits_for_a_batch:
            self._inputs = inputs_of_step(pl_module, batch)
            self._find_units(trainer, pl_module)
            self._refuse_overlap(trainer)
            self._announce(pl_module, length(trainer, self.interval, self._epochs))
            self.put_in_force(trainer, pl_module, self.masks)
            self.advance(trainer, pl_module)

    @override
    def before_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        if self._observing(trainer):
            check = getattr(trainer.precision_plugin, "scaler", None) is not None or may_repair(
                trainer.lightning_module
            )
            self._observation.gradients(parameter_ids(optimizer), gradient_scale(trainer, optimizer), check)

    @override
    def after_step(self) -> None:
        self._observation.step()

    @override
    def advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # looks at the state and not at events: Lightning skips some hooks when a run is resumed
        clock = trainer.current_epoch if self.interval == "epoch" else self._steps
        if self._observation.full and any(self._applied < position <= clock for position, _ in self._updates):
            # an update that had to wait may end up where the next one is due: one serves both
            per_epoch = steps_per_epoch(trainer) if self.interval == "epoch" else 0
            begins = max(clock, self._steps // per_epoch) if per_epoch else clock
            due = [update for update in self._updates if update[0] <= begins]
            self._update(trainer, pl_module, *due[-1])
        if self._observing(trainer):
            if not self._observation.steps:
                self._find_units(trainer, pl_module)
            self._observation.open()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if not self._units and not self.masks:
            rank_zero_warn(f"{type(self).__name__} pruned nothing: its targets were frozen in the whole run")
        elif self._updates and not self.reached:
            rank_zero_warn(
                f"{type(self).__name__} ended at a sparsity of {self.sparsity_now:.2%}: the run stopped before the "
                f"last update, due at {self.interval} {self._updates[-1][0]}"
            )

    @override
    def _let_go(self, pl_module: torch.nn.Module) -> None:
        self._observation.close()
        super()._let_go(pl_module)

    def _update(self, trainer: Trainer, pl_module: LightningModule, position: int, amount: float) -> None:
        """Choose new masks and put them in force."""
        if self._waits_for_a_batch:
            return
        reshard(pl_module)
        self._find_units(trainer, pl_module)
        if not self._units:  # all are frozen: what is due now is due once they are trained
            return
        if any(map(is_lazy, pl_module.parameters())):  # the first forward makes the rest of the targets
            return
        if not self._observation.full:  # parameters that have just joined are observed first
            return
        self._leave_out_unseen(trainer, pl_module)
        self._observation.finish()
        masks = self.choose(pl_module, position, amount)
        held = fitting(self.masks, named_parameters(pl_module))  # of frozen parameters too, which keep their zeros
        frozen, before = [name for name in self._levels if name in held and name not in masks], self.reached
        masks = Masks({**held, **masks})
        self._applied = position
        if frozen and self.reached and not before:
            rank_zero_warn(
                f"{type(self).__name__} made its last update while {frozen[:5]} was frozen, and kept the zeros that "
                f"are there: the goal is met by the other targets alone"
            )
        if self.reached or not self.criterion.accumulates:
            self._observation.reset()
        self.put_in_force(trainer, pl_module, masks)
        self.after_update(trainer, pl_module, amount)

    def _observing(self, trainer: Trainer) -> bool:
        """Whether the window of optimizer steps before the next update has begun, and goes on."""
        position = next((position for position, _ in self._updates if position > self._applied), None)
        if position is None or not self._observation.needed:
            return False
        if self.criterion.accumulates and self._observation.steps:
            return True
        return self._steps >= in_steps(trainer, self.interval, position) - self.criterion.steps

    @override
    def put_in_force(self, trainer: Trainer, pl_module: torch.nn.Module, masks: Masks) -> None:
        super().put_in_force(trainer, pl_module, masks)
        found = scarce(self._units, masks)
        if new := {name: left for name, left in found.items() if left < self._scarce.get(name, 2)}:
            self._scarce.update(new)
            rank_zero_warn(told(type(self).__name__, new))

    @override
    def rebuild(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._find_units(trainer, pl_module)
        super().rebuild(trainer, pl_module)

    def _find_units(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the targets up: lazy ones appear after the first forward, frozen ones once they are trained."""
        found = goal.find_targets(pl_module, self.sparsity, self.targets, self.ignore, later=True)
        if [id(target.parameter) for target in found] == self._found or self._waits_for_a_batch:
            return
        self._observation.close()
        several = trainer.world_size > 1
        looked_up = (found, pl_module, self._inputs, several)
        self._units, without = self.granularity.find_units(*looked_up) if found else ([], {})
        self._units, unscored = scorable(self._units, self.criterion, self._unseen)
        patterns = self.targets or tuple(self.sparsity if isinstance(self.sparsity, Mapping) else ())
        self._left_out = {**left_out(pl_module, patterns, self.ignore), **without, **unscored}
        self._found = [id(target.parameter) for target in found]
        self._count_what_it_is_of(pl_module, several)
        self._observation = Observation(self.criterion, self._units, self._observation.active, several)
        if self._observed is not None:
            self._observation.load_state_dict(self._observed)
            self._observed = None

    def _count_what_it_is_of(self, pl_module: LightningModule, several: bool) -> None:
        counted = (self.sparsity, self.of, self.granularity, self._units, pl_module, self._inputs, several)
        self._budget = goal.budget_of(*counted) if self._units else None

    def _leave_out_unseen(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do without the targets of which the criterion has seen nothing: those of layers that are not in use."""
        unseen = self._observation.leave_out_unseen()
        if unseen:
            self._unseen += unseen
            self._units, reasons = scorable(self._units, self.criterion, self._unseen)
            self._left_out.update(reasons)
            self._count_what_it_is_of(pl_module, trainer.world_size > 1)
            rank_zero_warn(
                f"{type(self).__name__} leaves out {unseen[:5]}, of which {type(self.criterion).__name__} has seen no "
                f"{self.criterion.what_it_sees} in {self._observation.steps} steps: ignore them, or use a criterion "
                f"that needs less"
            )

    def _announce(self, pl_module: LightningModule, length: float) -> None:
        """Say what is going to happen, and warn if the run is too short for it."""
        name = type(self).__name__
        tell(self.explain())
        lazy = any(map(is_lazy, pl_module.parameters()))
        if not self._units and not self.target_names() and not lazy:
            rank_zero_warn(f"{name} finds all its targets frozen: it prunes them once they are trained")
        last = self._updates[-1][0] if self._updates else 0
        reachable = length - 1 if self.interval == "epoch" else length
        if not self.reached and last > reachable:
            rank_zero_warn(
                f"{name} will not reach its target: the last update is due at {self.interval} {last}, and the run ends "
                f"after {length:g} {self.interval}s: train longer, or give a smaller end"
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "applied": self._applied,
            "window": list(self._window) if self._window else None,
            "unseen": list(self._unseen),
            "observed": self._observed or self._observation.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._expect(state_dict, "applied", "window", "observed")
        super().load_state_dict(state_dict)
        self._applied = state_dict["applied"]
        self._window = tuple(state_dict["window"]) if state_dict["window"] else None
        self._observed = state_dict["observed"]
        self._unseen = list(state_dict.get("unseen", ()))

    def __getstate__(self) -> dict[str, Any]:
        # a copy may be made on one rank alone, which cannot ask the others
        alone = not torch.distributed.is_initialized()
        observed = self._observed or (self._observation.state_dict() if alone else None)
        return {
            **super().__getstate__(),
            "_units": [],
            "_found": [],
            "_inputs": None,
            "_observation": Observation(self.criterion, []),
            "_observed": observed,
        }
