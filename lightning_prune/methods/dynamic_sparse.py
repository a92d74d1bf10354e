"""SET: networks that are sparse from the first step, and exchange weak weights for random new ones on the way."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune import schedules, scopes
from lightning_prune.criteria import Criterion, Random
from lightning_prune.granularities import Granularity, Weight
from lightning_prune.masks import Masks
from lightning_prune.methods.exchange import exchange, steps, uniform
from lightning_prune.tensors.distributed import local
from lightning_prune.training.resumed_arguments import reject_changes
from lightning_prune.training.scheduled import ScheduledTraining, decide
from lightning_prune.training.scheduled_state import ScheduledState
from lightning_prune.training.state import TRANSIENT, RunState
from lightning_prune.updates.target_sparsity import SparsityTarget
from lightning_prune.validation.arguments import choice, integer, number
from lightning_prune.validation.instances import flag, instance, named

_DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 1.0 - schedules.cosine(progress),
}
_SETTLED = 50  # steps: less and new weights are dropped before they have grown (measured with RigL on LeNet-300-100)
DecayName = Literal["constant", "linear", "cosine"]


@dataclass(eq=False)
class ExchangeState(ScheduledState):
    """What ``SET`` knows of its run.

    Attributes:
        grown: In an update, which weights have grown, and what they start with, by name of the target.
    """

    grown: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, metadata=TRANSIENT)


class SET(ScheduledTraining):
    """Train sparse from the first step: now and then drop the smallest weights, and grow as many at random.

    The masks of every target keep their number of zeros at every moment. New weights start at zero, with fresh
    optimizer state: one that gets no gradient from then on stays zero, and ``sparsity(model)`` counts it beside what is
    pruned. Layers that are lazy or frozen when training starts are drawn when they join.

    Args:
        sparsity: Fraction of zeros among the targets, in [0, 1), drawn at random when training starts, or
            ``{pattern: fraction}`` per layer; None keeps as many zeros as each target has.
        drop_fraction: Fraction of the weights of every target that the first update exchanges, in (0, 1].
        decay: What becomes of the drop fraction between ``start`` and ``end``: "constant", or it falls to nothing along
            a "linear" or "cosine" curve; or a callable from progress to what is left of it, 0 to 1.
        scope: How the sparsity is shared out over the targets: "erk" keeps more of small ones, "local" (uniform)
            prunes every target alike, "global" and "lamp" draw from all targets together; or a callable from scores
            and sparsity to units to keep.
        seed: Another seed draws and grows other weights; the same on every rank.
        start: No update before it: an int counts intervals, a float in [0, 1] is a fraction of the run.
        end: No update from here on; likewise.
        interval: What an int counts: optimizer "step"s or "epoch"s. At epochs the masks change before the first batch.
        frequency: Intervals from one update to the next; None spreads at most about 100 updates over the window, 50
            steps or more apart (in windows of less than 500 steps, 10 updates), so that new weights can grow.
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out, in the same form.
        log_layers: Whether to log the sparsity of every target beside the total ``pruning/sparsity``.
        grow_init: What new weights start with: "zeros"; "random", uniformly up to the mean size of the layer's weights,
            either way; for ``RigL``, "gradient", one step of plain gradient descent at the learning rate.
        regrow: Whether a weight that has just been dropped may come back in the same update, as it was.
        granularity: Which weights are exchanged together: ``Weight()``, ``SharedFanIn()`` or ``Block()``.

    Raises:
        ValueError: If an argument is out of range; when training starts, if a pattern matches nothing, no parameter
            is prunable, or the length of a run that fractions need is unknown.

    Reference: Mocanu et al., 2018, "Scalable training of artificial neural networks with adaptive sparse
    connectivity", arXiv:1707.04780.

    >>> SET(0.9, frequency=100).reached
    True
    """

    State: ClassVar[type[RunState]] = ExchangeState
    state: ExchangeState
    grow_inits: ClassVar[tuple[str, ...]] = ("zeros", "random")
    mask_arguments: ClassVar[tuple[str, ...]] = (
        *ScheduledTraining.mask_arguments,
        "drop_fraction",
        "decay",
        "grow_init",
        "regrow",
    )

    def __init__(
        self,
        sparsity: float | dict[str, float] | None = None,
        drop_fraction: float = 0.3,
        decay: DecayName | Callable[[float], float] = "constant",
        scope: scopes.ScopeName | scopes.Scope = "erk",
        seed: int = 0,
        start: int | float = 0,
        end: int | float = 0.75,
        interval: Literal["step", "epoch"] = "step",
        frequency: int | None = None,
        targets: Sequence[str] = (),
        ignore: Sequence[str] = (),
        log_layers: bool = False,
        *,
        grow_init: Literal["zeros", "random", "gradient"] = "zeros",
        regrow: bool = False,
        granularity: Granularity = Weight(),
    ) -> None:
        target = SparsityTarget(0.0 if sparsity is None else sparsity)
        schedules.value_at("decay", named("decay", decay, _DECAYS, "progress"), 0.0)
        self.drop_fraction = number("drop_fraction", drop_fraction, "(0, 1]")
        self.decay = decay
        self.seed = integer("seed", seed)
        self.grow_init = choice("grow_init", grow_init, self.grow_inits)
        _check(instance("granularity", granularity, Granularity), self.grow_init)
        self.regrow = flag("regrow", regrow)
        horizon = schedules.Horizon(start, end, interval, frequency)
        super().__init__(target, Random(self.seed), granularity, scope, horizon, targets, ignore, log_layers)
        self.sparsity = None if sparsity is None else target.sparsity

    def growth(self, position: int) -> Criterion:
        """Return what scores the weights that may grow in the update at a position: the highest do."""
        return Random(self.seed + 1_000_003 * position)

    @property
    @override
    def reached(self) -> bool:
        return True  # sparse from the first step

    @override
    def describe(self) -> tuple[str, str, list[tuple[int, float]]]:
        what = "the zeros that it has" if self.sparsity is None else f"sparsity {self.sparsity}"
        return what, "exchanged", self.state.updates

    @override
    def plan(self, first: int, last: int) -> list[tuple[int, float]]:
        length = last - first
        least = min(_SETTLED, length // 10) if self.interval == "step" else 1
        every = self.frequency or max(1, least, round(length / 100))
        left = _DECAYS[self.decay] if isinstance(self.decay, str) else self.decay
        plan = []
        for position in schedules.positions(first or every, last, every):
            remaining = schedules.value_at("decay", left, (position - first) / length)
            if not 0.0 <= remaining <= 1.0:
                raise ValueError(f"decay must stay in [0, 1], got {remaining} at {position}")
            plan.append((position, self.drop_fraction * remaining))
        return plan

    @override
    def resume_with(self, changed: Mapping[str, str]) -> None:
        reject_changes(self, changed, "sparsity", "scope")  # the numbers of zeros stay those of the start
        super().resume_with(changed)

    @override
    def catch_up(self, trainer: Trainer) -> None:
        if self.state.replanned and self.state.applied < 0:  # exchanges of the past are not made up for
            self.state.applied = self.clock(trainer)
        self.state.replanned = False

    @override
    def on_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_start(trainer, pl_module)
        self.state.masks = Masks({**self.masks, **self._draw()})

    def _draw(self) -> Masks:
        """Return masks for targets that have none: all when training starts, later lazy ones and those unfrozen."""
        new = [unit for unit in self.state.units if unit.name not in self.masks]
        if self.sparsity is None or not new:
            masks = Masks()
            for unit in new:
                kept = unit.kept({unit.name: local(unit.parameter) != 0})
                masks.update({} if kept is None else unit.masks(kept))
            return masks
        return decide(self, self.sparsity_target, units=new, criterion=Random(self.seed))

    def _take_in(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.find_units(trainer, pl_module)
        if masks := self._draw():
            self.set_masks(trainer, pl_module, Masks({**self.masks, **masks}))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if batch_idx == 0:  # what an epoch begins with may have been unfrozen
            self._take_in(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:  # lazy layers exist after their first forward pass
            self._take_in(trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def needs_dense_gradients(self, trainer: Trainer) -> bool:
        return self.observing(trainer)

    @override
    def choose_masks(self, model: nn.Module, position: int, amount: float) -> Masks:
        held = {**self.masks, **self._draw()}
        units = self.state.units
        masks = exchange(units, held, amount, self.growth(position), self.regrow)
        if self.grow_init != "zeros":
            grown = {unit.name: masks[unit.name] & ~held[unit.name] for unit in units}
            noise = Random(self.seed + 1_000_003 * position + 1)
            start = steps if self.grow_init == "gradient" else partial(uniform, noise=noise, held=held)
            self.state.grown = {unit.name: (grown[unit.name], start(unit, grown[unit.name])) for unit in units}
        return masks

    @override
    def after_update(self, trainer: Trainer, pl_module: LightningModule, amount: float) -> None:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        rates = {id(parameter): float(group["lr"]) for group in groups for parameter in group["params"]}
        for unit in self.state.units if self.state.grown else ():
            grown, values = self.state.grown[unit.name]
            rate = rates.get(id(unit.parameter), 0.0) if self.grow_init == "gradient" else 1.0
            weight = local(unit.parameter)
            weight[grown] = (values * rate).to(weight.dtype)
        self.state.grown = {}


def _check(granularity: Granularity, grow_init: str) -> None:
    if granularity.coupled is not False or granularity.follows or granularity.group is not None:
        raise ValueError(
            f"granularity must be Weight(), SharedFanIn() or Block() to exchange single units, got {granularity}"
        )
    if grow_init != "zeros" and not granularity.single:
        raise ValueError(f'grow_init must be "zeros" for {granularity}, got {grow_init!r}')
