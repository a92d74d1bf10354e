"""Pruning: the training callback. It says when masks change, and to what."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_prune import schedules, scopes
from lightning_prune.criteria import Criterion, Magnitude
from lightning_prune.granularities import Granularity, Weight, shrinkable
from lightning_prune.masks import Masks
from lightning_prune.models import summary as report
from lightning_prune.models.sizes import Size
from lightning_prune.structure.cut_record import CutRecord, cut_record_of
from lightning_prune.structure.dependencies import require_torch_pruning
from lightning_prune.structure.shrinking import cut_all, what_to_keep
from lightning_prune.training.protocols import averaged_models
from lightning_prune.training.run_length import warn_if_few_updates
from lightning_prune.training.scheduled import ScheduledTraining
from lightning_prune.training.sparsity_log import log_info
from lightning_prune.updates.budget import Measure
from lightning_prune.updates.latency import LatencyTable
from lightning_prune.updates.target_sparsity import SparsityTarget
from lightning_prune.validation.arguments import number, position
from lightning_prune.validation.instances import flag


class Pruning(ScheduledTraining):
    """Prune a fraction of the targets by a criterion, in units of a granularity, shared over a scope, along a schedule.

    Masks change between two optimizer steps only, and are applied in place after every optimizer step. The model's
    parameters are never renamed, wrapped or replaced: its ``state_dict`` is that of the plain model at every moment.

    Args:
        sparsity: Fraction of zeros among the targets at the end, in [0, 1), or ``{pattern: fraction}`` per layer.
        criterion: Scores the units; the lowest go first.
        granularity: Which weights form a unit.
        scope: How the sparsity is shared out over the targets: "global" ranks all units together, "local" prunes every
            target alike, "erk" keeps more of small ones, "lamp" more of those whose low scores add up to much; or a
            callable from scores and sparsity to units to keep, such as ``OWL()``. None is "global" for single weights
            and blocks, and "local" for channels and heads, which keeps every layer alive; the plan shows it.
        schedule: From progress through the window to the fraction of the sparsity that is due, both 0 to 1:
            "one_shot", "linear", "cubic", "cosine", "exponential" or a callable.
        start: First update: an int counts intervals, a float in [0, 1] is a fraction of the run.
        end: Last update, which reaches the target; likewise. Not looked at by "one_shot".
        interval: What an int counts: optimizer "step"s or "epoch"s. At epochs the masks change before the first batch.
        frequency: Intervals from one update to the next; None spreads about 100 updates over the window.
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight: trainable,
            floating-point, two or more dimensions, of a known kind of layer, no embedding and no low-rank adapter;
            neurons that are outputs of the model are pruned only if they are named.
        ignore: Names to leave out, in the same form.
        threshold: Instead of a sparsity: prune every unit that scores below it.
        log_layers: Whether to log the sparsity of every target beside the total ``pruning/sparsity``.
        min_density: Fraction of every target, rounded down, and one unit, that a scope keeps at least: no layer goes.
            None is 0 for single weights and blocks; for channels and heads it is 0.1, but at most half of what the
            sparsity leaves, and gives way where there is no room for it.
        of: What the sparsity is a fraction of: the "units" of the targets, or all "parameters", "flops" or "latency" of
            the model, where those count as gone that go with the pruned units. At least so many go. FLOPs and latency
            are those of a forward pass on ``example_input_array`` or, without it, the first training batch. The latency
            is measured when training starts, on a model on the CPU, and kept in checkpoints; a ``LatencyTable`` that
            ``measure_latency`` has made says it for any device.
        shrink_at_end: Whether to take dead channels and heads out of the model when the training ends, as ``shrink``
            does in place, and log what is cut; channels are then coupled. Earlier checkpoints have the full model with
            zeros. ``sparsity_now`` stays what was reached, of the targets as they were, until another fit counts again.
        initial: Sparsity that is due at ``start`` already, in [0, sparsity); the schedule goes on from there.

    Attributes:
        masks: Bool masks by qualified parameter name, True = kept; of a sharded parameter, this rank's shard.

    Raises:
        ValueError: If an argument is out of range; when training starts, if a pattern matches nothing, no parameter
            is prunable, or the length of a run that fractions need is unknown.

    >>> callback = Pruning(0.9, schedule="linear", start=100, end=500)
    >>> callback.sparsity_now
    0.0
    """

    mask_arguments: ClassVar[tuple[str, ...]] = (*ScheduledTraining.mask_arguments, "schedule", "initial")

    def __init__(
        self,
        sparsity: float | dict[str, float] | None = None,
        criterion: Criterion = Magnitude(),
        granularity: Granularity = Weight(),
        scope: scopes.ScopeName | scopes.Scope | None = None,
        schedule: schedules.ScheduleName | schedules.Schedule = "cubic",
        start: int | float = 0.1,
        end: int | float = 0.7,
        interval: Literal["step", "epoch"] = "step",
        frequency: int | None = None,
        targets: Sequence[str] = (),
        ignore: Sequence[str] = (),
        threshold: float | None = None,
        log_layers: bool = False,
        min_density: float | None = None,
        of: Measure | LatencyTable = "units",
        shrink_at_end: bool = False,
        initial: float = 0.0,
    ) -> None:
        target = SparsityTarget(sparsity, threshold, min_density, of).for_granularity(granularity)
        self.shrink_at_end = flag("shrink_at_end", shrink_at_end)
        granularity = shrinkable(granularity) if shrink_at_end else granularity
        self._schedule = schedules.begin_at(initial, sparsity, schedules.resolve(schedule))
        self.schedule = schedule
        self.initial = number("initial", initial, "[0, 1)")
        last = start if schedule == "one_shot" else end
        horizon = schedules.Horizon(start, last, interval, frequency)
        super().__init__(target, criterion, granularity, scope, horizon, targets, ignore, log_layers)
        self.end = position("end", end)

    @override
    def explain(self) -> str:
        if self.state.outcome and not self.state.units:  # what it had has been cut
            return self.state.outcome
        return super().explain()

    @override
    def plan(self, first: int, last: int) -> list[tuple[int, float]]:
        return schedules.updates(self._schedule, first, last, self.frequency)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.shrink_at_end and stage == "fit":
            require_torch_pruning()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        if self.shrink_at_end and "size mismatch for" in str(exception) and cut_record_of(pl_module) is not None:
            exception.args = (
                f"ckpt_path must be a checkpoint of the model as it is since shrink_at_end has cut it, got one of the "
                f"whole model: leave ckpt_path away to go on with the model in memory, or load the checkpoint into a "
                f"model that has not been cut. {exception}",
            )

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.shrink_at_end and not all(mask.all() for mask in self.masks.values()):
            self._shrink(trainer, pl_module)

    @override
    def on_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_start(trainer, pl_module)
        self._warn_of_zeros()
        if self.schedule != "one_shot" and self.state.window is not None and self.state.applied < 0:
            warn_if_few_updates(self, self.horizon, self.state.window)

    def _shrink(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = self.state
        others = averaged_models(trainer.callbacks)  # type: ignore[attr-defined]
        mine = what_to_keep(pl_module, state.inputs, state.masks, averages=others)
        kept: CutRecord = trainer.strategy.broadcast(mine)  # ranks may have seen other examples
        plan, before = self.explain(), Size.of(pl_module, state.inputs)
        cut_all(pl_module, kept, trainer.optimizers, others)
        what = before.then(Size.of(pl_module, state.inputs))
        log_info(f"{type(self).__name__} has cut the model: {what}")
        state.outcome = f"{plan}\ncut when training ended: {what}"
        state.masks = Masks(kept.of_masks(state.masks))
        # the sparsity stays that of the targets as they were
        state.units, state.targets, state.parameters = [], [], []

    def _warn_of_zeros(self) -> None:
        if self.masks:
            return
        zeros = {unit: report.zeros(unit.parameter) for unit in self.state.units}
        partly = sum(count for unit, count in zeros.items() if count < unit.parameter.numel())  # else an initialisation
        share = partly / max(1, sum(unit.parameter.numel() for unit in self.state.units))
        if share > 0.01:
            name = type(self).__name__
            rank_zero_warn(
                f"{name} holds no masks, but {share:.1%} of its targets are zeros, which will be trained like any "
                f"other weight: to keep them, resume from a checkpoint with its state, or use ConstantSparsity"
            )
