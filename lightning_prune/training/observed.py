"""Observed training: the targets of a run, as units of a granularity, and what a criterion sees of them."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.criteria import Criterion
from lightning_prune.granularities import Granularity
from lightning_prune.models.parameters import left_out
from lightning_prune.training.enforcement import parameter_ids
from lightning_prune.training.gradient_readers import gradient_scale, may_repair
from lightning_prune.training.masked import MaskedTraining
from lightning_prune.training.scheduled_state import ScheduledState
from lightning_prune.training.state import RunState
from lightning_prune.updates.latency_measuring import latency_table
from lightning_prune.updates.statistics import Observation, scorable
from lightning_prune.updates.target_sparsity import SparsityTarget
from lightning_prune.validation.instances import instance


class ObservedTraining(MaskedTraining):
    """The abstract base of the callbacks with a criterion that observes the training: a subclass says when.

    Args:
        sparsity_target: What is to be reached.
        criterion: Scores the units; the lowest go first.
        granularity: Which weights form a unit.
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out, in the same form.
        log_layers: Whether to log the sparsity of every target beside the total.
    """

    State: ClassVar[type[RunState]] = ScheduledState
    state: ScheduledState

    def __init__(
        self,
        sparsity_target: SparsityTarget,
        criterion: Criterion,
        granularity: Granularity,
        targets: Sequence[str] = (),
        ignore: Sequence[str] = (),
        log_layers: bool = False,
    ) -> None:
        own = type(instance("criterion", criterion, Criterion))
        if own.backward is not Criterion.backward or own.passes is not Criterion.passes:
            raise ValueError(
                f"criterion must observe the training that is under way, got {criterion}, which needs passes of its "
                f"own: use PruningAtInit(..., criterion={type(criterion).__name__}()), or prune(model, ...) before fit"
            )
        self.sparsity_target = sparsity_target
        self.sparsity = sparsity_target.sparsity
        self.threshold = sparsity_target.threshold
        self.min_density = sparsity_target.floor
        self.of = sparsity_target.of
        self.criterion = criterion
        self.granularity = instance("granularity", granularity, Granularity)
        self.normalized = granularity.normalized
        super().__init__(targets, ignore, log_layers)

    def observing(self, trainer: Trainer) -> bool:
        """Return whether the criterion observes the coming optimizer step."""
        raise NotImplementedError

    @override
    def target_names(self) -> list[str]:
        # those that may be pruned now, and those that were and are frozen, or wait until a batch shows how units couple
        names: dict[str, None] = {}
        for unit in self.state.units:
            names.update(dict.fromkeys(unit.weights))
        for name in self.state.levels:
            if name in self.state.masks:
                names[name] = None
        return list(names)

    @property
    def observation(self) -> Observation:
        """What the criterion has seen of the targets since the last update."""
        if self.state.observation is None:
            self.state.observation = Observation(self.criterion, [])
        return self.state.observation

    @property
    def observes(self) -> bool:
        """Whether the criterion observes the training at all; otherwise it scores weights alone."""
        return self.criterion.needs != "weights"

    @property
    def has_observed(self) -> bool:
        """Whether the criterion has observed enough to score."""
        return not self.observes or self.observation.full

    def find_units(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the targets up: lazy ones appear after the first forward, frozen ones once they are trained."""
        state = self.state
        parameters = [(id(p), p.requires_grad, is_lazy(p)) for p in pl_module.parameters()]
        if parameters == state.parameters:  # so the targets are those of the last time
            return
        found = self.sparsity_target.find(pl_module, self.targets, self.ignore, later=True)
        needed = self.granularity.coupled is True or self.of not in ("units", "parameters")
        state.waits = needed and state.inputs is None
        if state.waits:
            return
        if [id(target.parameter) for target in found] != [id(target.parameter) for target in state.targets]:
            patterns = self.targets or tuple(self.sparsity if isinstance(self.sparsity, Mapping) else ())
            distributed, named = trainer.world_size > 1, bool(patterns)
            reasons = state.take_up(found, pl_module, self.criterion, self.granularity, distributed, named)
            state.left_out = {**left_out(pl_module, patterns, self.ignore), **reasons}
            _count_budget(self, trainer, pl_module)
        state.parameters = parameters

    @override
    def before_optimizer_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        if self.observing(trainer):
            scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
            check = scaled or may_repair(trainer.lightning_module)
            self.observation.gradients(parameter_ids(optimizer), gradient_scale(trainer, optimizer), check)

    @override
    def after_batch(self) -> None:
        if self.observes:
            self.observation.step()

    @override
    def rebuild(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.find_units(trainer, pl_module)
        super().rebuild(trainer, pl_module)


def _count_budget(callback: ObservedTraining, trainer: Trainer, pl_module: LightningModule) -> None:
    """Count what the sparsity is a fraction of; the time of layers is measured once, and kept with the run."""
    state, count = callback.state, callback.sparsity_target.budget
    distributed = trainer.world_size > 1
    if callback.of == "latency" and state.latency is None and state.units:
        state.latency = latency_table(state.units, callback.granularity, pl_module, state.inputs, distributed)
    given = (callback.granularity, state.units, pl_module, state.inputs, distributed)
    state.budget = count(*given, table=state.latency) if state.units else None


def leave_out_unseen(callback: ObservedTraining, trainer: Trainer, pl_module: LightningModule) -> None:
    """Leave out the targets of which the criterion has seen nothing: those of layers that are not in use."""
    state, criterion = callback.state, callback.criterion
    unseen = callback.observation.leave_out_unseen()
    if unseen:
        state.unseen += unseen
        state.units, reasons = scorable(state.units, criterion, state.unseen)
        state.left_out.update(reasons)
        _count_budget(callback, trainer, pl_module)
        rank_zero_warn(
            f"{type(callback).__name__} leaves out {unseen[:5]}, of which {type(criterion).__name__} has seen no "
            f"{criterion.what_it_sees} in {callback.observation.steps} steps: ignore them, or use a criterion that "
            f"needs less"
        )
