"""Group lasso: a penalty on the norms of whole channels, so that those that are pruned later are small by then."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune import schedules
from lightning_prune.granularities import Channel, Granularity
from lightning_prune.methods.gating import target_reached
from lightning_prune.methods.group_norms import GroupPenalty, check_optimizers, find_groups
from lightning_prune.models.forward import Inputs
from lightning_prune.models.parameters import find
from lightning_prune.tensors.distributed import reshard
from lightning_prune.training.checks import reject_flattening
from lightning_prune.training.compat import Callback
from lightning_prune.training.enforcement import MaskEnforcement
from lightning_prune.training.gradient_readers import gradient_scale
from lightning_prune.training.hooks import training_methods
from lightning_prune.training.representation import call_text
from lightning_prune.training.run_length import length
from lightning_prune.training.step_inputs import inputs_of_step
from lightning_prune.validation import states
from lightning_prune.validation.arguments import number, patterns
from lightning_prune.validation.instances import flag, instance

_RULES = {
    "steps": states.whole(),
    "window": states.optional(states.every(states.row(states.whole(), states.whole()), states.IN_ORDER)),
}


class GroupLasso(Callback):
    """Add ``strength * sum of |unit|`` to the loss, over all units of the targets, until they are pruned.

    |unit| is the Euclidean norm of all that is pruned with a unit: of coupled channels, rows, biases, entries of norms
    and the columns that read them. It prunes nothing: add it to the callbacks of a run beside a pruning callback with
    the same granularity. It ends at ``end``, or as soon as every pruning callback of the run has reached its target,
    which those that are sparse from the first step always have. Units that are pruned already get nothing.

    The penalty is added to gradients, right before an optimizer steps: the loss that ``training_step`` returns stays
    as it is, and gradient clipping sees the sum. So does a criterion that observes gradients, if this callback comes
    before the pruning callback. ``group_lasso/penalty`` logs it.

    Args:
        strength: How much of the norms is added to the loss, above 0.
        granularity: Which weights form a unit.
        growth: In every layer the unit of the smallest norm is pressed ``2**growth`` times as hard as that of the
            largest, and those between by how small they are; 0 presses all alike. In [0, 64].
        squared: Whether half the squares of the norms are added instead, as a weight decay of each unit.
        proximal: Whether, instead of gradients, the weights are changed right after each step: norms shrink by the
            learning rate times the strength, and end at exactly zero.
        schedule: From progress through the window to the fraction of the strength that is due: "one_shot" is all of
            it from the start, "linear" and others let it grow.
        start: First step with the penalty: an int counts intervals, a float in [0, 1] is a fraction of the run.
        end: First step without it; likewise.
        interval: What an int counts: optimizer "step"s or "epoch"s.
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out, in the same form.

    Raises:
        ValueError: If an argument is out of range; when training starts, if a pattern matches nothing, units are single
            weights or whole layers, an optimizer is LBFGS, whose line search compares losses without the penalty, or
            the strategy flattens parameters; in the first step, if a gradient is sparse.

    Reference: Yuan and Lin, 2006, "Model selection and estimation in regression with grouped variables"; Wen et al.,
    2016, "Learning Structured Sparsity in Deep Neural Networks", arXiv:1608.03665; for ``growth`` and ``squared``, Fang
    et al., 2023, "DepGraph: Towards Any Structural Pruning", arXiv:2301.12900.

    >>> GroupLasso(1e-3, granularity=Channel(coupled=True), growth=4.0)
    GroupLasso(strength=0.001, granularity=Channel(coupled=True), growth=4.0)
    """

    def __init__(
        self,
        strength: float = 1e-4,
        granularity: Granularity = Channel(),
        growth: float = 0.0,
        squared: bool = False,
        proximal: bool = False,
        schedule: schedules.ScheduleName | schedules.Schedule = "one_shot",
        start: int | float = 0.0,
        end: int | float = 1.0,
        interval: Literal["step", "epoch"] = "step",
        targets: Sequence[str] = (),
        ignore: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.strength = number("strength", strength, "(0, inf)")
        self.granularity = instance("granularity", granularity, Granularity)
        self.growth = number("growth", growth, "[0, 64]")
        self.squared, self.proximal = flag("squared", squared), flag("proximal", proximal)
        self.schedule, self._schedule = schedule, schedules.resolve(schedule)
        self.horizon = schedules.Horizon(start, end, interval)
        self.start, self.end, self.interval = self.horizon.start, self.horizon.end, self.horizon.interval
        self.targets, self.ignore = patterns("targets", targets), patterns("ignore", ignore)
        self._window: tuple[int, int] | None = None
        self._steps, self._restored, self._acted = 0, False, False
        self._max_epochs: int | None = None  # as the user has set it; other callbacks may raise it later
        self._hooks = MaskEnforcement()  # without masks: it knows how to hook into optimizers
        self._penalty = GroupPenalty(self.growth, self.squared)
        self._parameters: list[tuple[int, bool, bool]] = []  # what decided over the groups
        self._inputs: Inputs = None
        self._waits = False  # whether units have to be coupled, and it takes the first batch to know how
        self._ready: dict[int, float] = {}  # strengths, by the id of the optimizer that is about to step

    @override
    def __repr__(self) -> str:
        return call_text(self)

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(targets=self.targets, ignore=self.ignore)

    # ------------------------------------------------------------------------------------------------ groups

    def _find(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the units up: lazy ones appear after the first forward, frozen ones once they are trained."""
        reshard(pl_module)
        parameters = [(id(p), p.requires_grad, is_lazy(p)) for p in pl_module.parameters()]
        if parameters == self._parameters:
            return
        found = find(pl_module, self.targets, self.ignore, later=True)
        self._waits = self.granularity.coupled is True and self._inputs is None
        if not self._waits:
            given = (self.granularity, self._inputs, trainer.world_size > 1, not self.targets)
            groups, names = find_groups(found, pl_module, *given)
            self._penalty, self._parameters = GroupPenalty(self.growth, self.squared, groups, names), parameters

    # ------------------------------------------------------------------------------------------------ penalty

    def _due(self, trainer: Trainer) -> float:
        """Return the strength of the coming step."""
        clock = trainer.current_epoch if self.interval == "epoch" else self._steps
        first, last = self._window or (0, 0)
        if not first <= clock < last or (training_methods(trainer) and target_reached(trainer)):
            return 0.0
        progress = (clock - first) / (last - first)
        return self.strength * schedules.value_at("schedule", self._schedule, progress)

    def _before_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        strength = self._due(trainer) if self._penalty.groups else 0.0
        self._acted = self._acted or strength > 0
        if strength and self.proximal:
            self._ready[id(optimizer)] = strength
        elif strength:
            self._penalty.add_to_gradients(optimizer, strength, gradient_scale(trainer, optimizer))

    def _after_step(self, optimizer: Optimizer) -> None:
        strength = self._ready.pop(id(optimizer), 0.0)  # it may be called twice
        if strength:
            self._penalty.shrink(optimizer, strength)

    # ------------------------------------------------------------------------------------------------ hooks

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            reject_flattening(trainer)
            self._max_epochs = trainer.max_epochs

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_optimizers(trainer.optimizers, self.proximal)
        self._release()
        if not self._restored:
            self._steps, self._window = 0, None
        if pl_module.automatic_optimization:
            self._steps = trainer.global_step
        self._window = self._window or self.horizon.window(length(trainer, self.interval, self._max_epochs))
        self._inputs = pl_module.example_input_array
        self._acted, self._restored = self._restored, False  # what a resumed run did before is unknown
        self._find(trainer, pl_module)
        for optimizer in trainer.optimizers:
            self._attach(trainer, optimizer)

    def _attach(self, trainer: Trainer, optimizer: Optimizer) -> None:
        # in manual optimization nothing but the step itself tells when gradients are complete
        before = None if trainer.lightning_module.automatic_optimization else partial(self._before_step, trainer)
        self._hooks.attach(optimizer, before, self._after_step)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._find(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._waits:
            self._inputs = inputs_of_step(pl_module, batch)
            self._find(trainer, pl_module)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._attach(trainer, optimizer)
        if pl_module.automatic_optimization:
            self._before_step(trainer, optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped, self._hooks.stepped = self._hooks.stepped, False
        self._steps = trainer.global_step if pl_module.automatic_optimization else self._steps + stepped
        value, self._penalty.value = self._penalty.value, None
        if value is not None:
            pl_module.log("group_lasso/penalty", value, on_step=True, on_epoch=False, batch_size=1)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._acted:
            rank_zero_warn(
                f"GroupLasso did nothing in this run: the window {self._window} of {self.interval}s was empty, the "
                f"pruning callbacks had reached their targets before, or the targets were frozen"
            )
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        self._hooks.release()
        self._parameters, self._inputs, self._ready = [], None, {}
        self._penalty = GroupPenalty(self.growth, self.squared)

    # ------------------------------------------------------------------------------------------------ state

    @override
    def state_dict(self) -> dict[str, Any]:
        window = None if self._window is None else list(self._window)
        return {"version": states.VERSION, "steps": self._steps, "window": window}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states.check("GroupLasso", state_dict, _RULES, list(_RULES))
        window = state_dict["window"]
        self._steps, self._window, self._restored = state_dict["steps"], window and tuple(window), True

    def __getstate__(self) -> dict[str, Any]:
        # a copy knows where its run was, and nothing that is tied to this process or to the model
        state = {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}
        free: dict[str, Any] = {"_parameters": [], "_inputs": None, "_ready": {}}
        return {**state, **free, "_penalty": GroupPenalty(self.growth, self.squared)}
