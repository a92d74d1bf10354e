"""Scheduled training: masks change at planned positions of the run, from what was observed just before."""

import logging
import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune import goal, report, scopes
from lightning_prune.criteria import Criterion
from lightning_prune.granularities import Granularity
from lightning_prune.masked_training import MaskedTraining, gradient_scale
from lightning_prune.masks import Masks, make_masks
from lightning_prune.observation import Observation
from lightning_prune.schedules import Horizon
from lightning_prune.shards import reshard
from lightning_prune.units import Units, make_units

# below Lightning's logger, whose handlers and level it shares, and with a name of its own to be silenced by
_log = logging.getLogger("lightning.pytorch.lightning_prune")


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
    """

    def __init__(
        self,
        sparsity: goal.Sparsity | None,
        criterion: Criterion,
        granularity: Granularity,
        scope: str | scopes.Scope,
        horizon: Horizon,
        targets: tuple[str, ...] = (),
        ignore: tuple[str, ...] = (),
        threshold: float | None = None,
        log_layers: bool = False,
        min_density: float = 0.0,
    ) -> None:
        if type(criterion).backward is not Criterion.backward:
            raise ValueError(
                f"criterion must observe the training that is under way, got {criterion}, which needs passes of its "
                f"own: call prune(model, ..., criterion={type(criterion).__name__}(), data=...) before fit, and add "
                f"ConstantSparsity() to keep the zeros"
            )
        self._scope = scopes.resolve(scope)
        self._horizon = horizon
        self.sparsity = sparsity
        self.criterion = criterion
        self.granularity = granularity
        self.scope = scope
        self.start = horizon.start
        self.end = horizon.end
        self.interval = horizon.interval
        self.frequency = horizon.frequency
        self.threshold = threshold
        self.min_density = min_density
        super().__init__(targets, ignore, log_layers)

    def plan(self, first: int, last: int) -> list[tuple[int, float]]:
        """Return the updates as (position in intervals, amount), in order, for a window from first to last position."""
        raise NotImplementedError

    def choose(self, model: torch.nn.Module, position: int, amount: float) -> Masks:
        """Return the masks of one update: here, of this fraction of the goal, by the criterion."""
        return self.choose_for(model, self.sparsity, amount)

    def choose_for(self, model: torch.nn.Module, sparsity: goal.Sparsity | None, due: float = 1.0) -> Masks:
        """Return masks, by the criterion, for a goal of which this fraction is due."""
        found = goal.find_targets(model, sparsity, self.targets, self.ignore)
        axes = (sparsity, self.threshold, self.criterion, self._scope)
        allocate = goal.allocation(found, *axes, due, self.min_density)
        return make_masks(self._units, self.criterion, allocate, self.masks)

    def after_update(self, trainer: Trainer, pl_module: LightningModule, amount: float) -> None:
        """Do what has to follow an update of this amount, when its masks are in force."""

    def describe(self) -> tuple[str, str, list[tuple[int, float]]]:
        """Return the goal in words, what is told of each update, and that for each position."""
        what = f"sparsity {self.sparsity}" if self.threshold is None else f"threshold {self.threshold}"
        final = self.sparsity if isinstance(self.sparsity, float) else 1.0
        return what, "level", [(position, amount * final) for position, amount in self._updates]

    @override
    def explain(self) -> str:
        parameters = {unit.name: unit.parameter for unit in self._units}
        what, told, updates = self.describe()
        return report.plan(type(self).__name__, what, parameters, updates, self.interval, told)

    @override
    def forget(self) -> None:
        super().forget()
        self._units: list[Units] = []
        self._observation = Observation(self.criterion, [])
        self._observed: dict[str, Any] | None = None  # restored statistics, until there are units for them
        self._window: tuple[int, int] | None = None  # resolved once: a longer resumed run must not move it
        self._updates: list[tuple[int, float]] = []
        self._applied = -1  # position of the last update
        self._epochs: int | None = None  # as the user has set them

    @property
    @override
    def reached(self) -> bool:
        return bool(self._updates) and self._applied >= self._updates[-1][0]

    @override
    def target_names(self) -> list[str]:
        return [unit.name for unit in self._units]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._epochs = trainer.max_epochs

    @override
    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._find_units(trainer, pl_module)
        self._observation.active = lambda: bool(trainer.training)
        length = self._length(trainer, self.interval)
        self._window = self._window or self._horizon.window(length)
        self._updates = self.plan(*self._window)
        self._announce(length)

    @override
    def before_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        if self._observing(trainer):
            scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
            stepping = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            self._observation.gradients(stepping, gradient_scale(trainer, optimizer), check=scaled)

    @override
    def after_step(self) -> None:
        self._observation.step()

    @override
    def advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # looks at the state and not at events: Lightning skips some hooks when a run is resumed
        clock = trainer.current_epoch if self.interval == "epoch" else self._steps
        if self._observation.full and any(self._applied < position <= clock for position, _ in self._updates):
            # an update that had to wait may end up where the next one is due: one serves both
            per_epoch = _steps_per_epoch(trainer) if self.interval == "epoch" else 0
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
        if self._updates and not self.reached:
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
        reshard(pl_module)
        self._find_units(trainer, pl_module)
        if any(map(is_lazy, pl_module.parameters())):  # the first forward makes the rest of the targets
            return
        if not self._observation.full:  # parameters that have just joined are observed first
            return
        self._observation.finish()
        masks = self.choose(pl_module, position, amount)
        self._applied = position
        self._observation.reset()
        self.put_in_force(trainer, pl_module, masks)
        self.after_update(trainer, pl_module, amount)

    def _observing(self, trainer: Trainer) -> bool:
        """Whether the window of optimizer steps before the next update has begun."""
        position = next((position for position, _ in self._updates if position > self._applied), None)
        if position is None or not self._observation.needed:
            return False
        return self._steps >= self._in_steps(trainer, position) - self.criterion.window

    def _in_steps(self, trainer: Trainer, position: int) -> float:
        """Return the optimizer step of a position; 0 where it is an epoch and their length is unknown."""
        return position if self.interval == "step" else position * _steps_per_epoch(trainer)

    def _find_units(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the targets up: lazy ones appear after the first forward, frozen ones once they are trained."""
        found = goal.find_targets(pl_module, self.sparsity, self.targets, self.ignore)
        if [id(target.parameter) for target in found] == [id(unit.parameter) for unit in self._units]:
            return
        self._observation.close()
        self._units = make_units(found, pl_module, self.granularity)
        several = trainer.world_size > 1
        self._observation = Observation(self.criterion, self._units, self._observation.active, several)
        if self._observed is not None:
            self._observation.load_state_dict(self._observed)
            self._observed = None

    def _length(self, trainer: Trainer, interval: str) -> float:
        """Return the length of the run in steps or epochs; infinite where it is unknown."""
        epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
        # stochastic weight averaging adds an epoch, in which no optimizer steps
        added = max(0.0, epochs - self._epochs) if self._epochs not in (None, -1) and epochs < math.inf else 0.0
        if interval == "epoch":
            return epochs - added
        steps = float(trainer.estimated_stepping_batches)
        if added:
            steps = min(steps, (epochs - added) * _steps_per_epoch(trainer))
        return math.inf if steps < 0 else steps

    def _announce(self, length: float) -> None:
        """Say what is going to happen, and warn if the run is too short for it."""
        name = type(self).__name__
        _tell(self.explain())
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
            "observed": self._observed or self._observation.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._expect(state_dict, "applied", "window", "observed")
        super().load_state_dict(state_dict)
        self._applied = state_dict["applied"]
        self._window = tuple(state_dict["window"]) if state_dict["window"] else None
        self._observed = state_dict["observed"]

    def __getstate__(self) -> dict[str, Any]:
        # a copy may be made on one rank alone, which cannot ask the others
        alone = not torch.distributed.is_initialized()
        observed = self._observed or (self._observation.state_dict() if alone else None)
        return {
            **super().__getstate__(),
            "_units": [],
            "_observation": Observation(self.criterion, []),
            "_observed": observed,
        }


@rank_zero_only
def _tell(message: str) -> None:
    _log.info(message)


def _steps_per_epoch(trainer: Trainer) -> float:
    """Return the optimizer steps of an epoch; 0, so that observation begins at once, where they are unknown."""
    batches = trainer.num_training_batches
    return 0.0 if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)
