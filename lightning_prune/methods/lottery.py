"""Lottery tickets: train, prune, rewind, and again, in one fit."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_prune import scopes
from lightning_prune.criteria import Criterion, Magnitude
from lightning_prune.granularities import Granularity, Weight
from lightning_prune.masks import Masks
from lightning_prune.methods import rewinding
from lightning_prune.methods.lottery_state import LotteryState
from lightning_prune.schedules import Horizon
from lightning_prune.training.resumed_arguments import reject_changes
from lightning_prune.training.run_length import in_steps, length, steps_per_epoch
from lightning_prune.training.scheduled import decide
from lightning_prune.training.state import RunState
from lightning_prune.updates.target_sparsity import MOST_ROUNDS, SparsityTarget
from lightning_prune.validation.arguments import choice, fractions, integer, position


class LotteryTicket(rewinding.Rewinding):
    """Find a lottery ticket by iterative pruning: train, prune, rewind; after the last round the ticket is trained.

    The run is ``rounds + 1`` trainings, all of which end at the same step T of a training. Between two of them the same
    fraction of what is left is pruned, such that the last round ends exactly at ``sparsity``, and training goes on from
    step ``rewind_to``: optimizers and learning-rate schedulers are as they were there, and so are all weights and
    buffers, unless ``rewind`` says otherwise. Nothing is rewound once the ticket is trained, and the run stops then (a
    run that is longer than ``rounds + 1`` times ``frequency`` trains the ticket on). A learning-rate schedule should
    span one training, T steps, since it is lived through ``rounds + 1`` times.

    With ``rewind_to=k`` every training but the first takes T - k steps. Where trainings are counted in epochs, they
    end with an epoch: the full epochs of k are left out, and what is trained in the first batches of an epoch, up to
    the batch of step k, is undone once more.

    What is rewound to is part of every checkpoint: a copy of parameters, buffers and optimizer state, which with Adam
    is three numbers for each parameter (one if ``rewind_to`` is 0, since an optimizer has no state there).

    Args:
        sparsity: Fraction of zeros among the targets at the end, in [0, 1), or ``{pattern: fraction}`` per layer.
        rounds: How often is pruned and rewound, at least 1.
        rewind: "weights" rewinds everything; "learning_rate" keeps the trained weights; "random" is the control
            experiment: the rounds are those of "weights", but the ticket's weights are then initialised again, by the
            ``reset_parameters`` of the modules.
        rewind_to: The moment to go back to: an int counts optimizer steps, a float in [0, 1] is a fraction of the run.
        frequency: T, the length of the first training, in intervals; None is the run divided by ``rounds + 1``.
        interval: What ``frequency`` counts: optimizer "step"s or "epoch"s.
        criterion: Scores the units; the lowest go first.
        granularity: Which weights form a unit.
        scope: How the sparsity is shared out over the targets: "global", "local", "erk", "lamp" or a callable. None is
            "global" for single weights and blocks, and "local" for channels and heads, which keeps every layer alive.
        seed: Of the weights for ``rewind="random"``; the same on every rank.
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out, in the same form.
        log_layers: Whether to log the sparsity of every target beside the total ``pruning/sparsity``.

    Raises:
        ValueError: If an argument is out of range; when training starts, if the rounds do not fit into the run,
            ``rewind_to`` lies behind the first of them, parameters are sharded, or stochastic weight averaging
            replaces the schedulers.

    Reference: Frankle and Carbin, 2019, arXiv:1803.03635; late rewinding: Frankle et al., 2020, arXiv:1912.05671;
    learning-rate rewinding: Renda et al., 2020, arXiv:2003.02389.

    >>> LotteryTicket(0.75, rounds=2).plan(10, 20)
    [(10, 0.5), (20, 1.0)]
    """

    State: ClassVar[type[RunState]] = LotteryState
    state: LotteryState
    mask_arguments: ClassVar[tuple[str, ...]] = (*rewinding.Rewinding.mask_arguments, "rounds", "rewind", "rewind_to")

    def __init__(
        self,
        sparsity: float | dict[str, float],
        rounds: int = 5,
        rewind: Literal["weights", "learning_rate", "random"] = "weights",
        rewind_to: int | float = 0,
        frequency: int | None = None,
        interval: Literal["step", "epoch"] = "epoch",
        criterion: Criterion = Magnitude(),
        granularity: Granularity = Weight(),
        scope: scopes.ScopeName | scopes.Scope | None = None,
        seed: int = 0,
        targets: Sequence[str] = (),
        ignore: Sequence[str] = (),
        log_layers: bool = False,
    ) -> None:
        target = SparsityTarget(fractions("sparsity", sparsity)).for_granularity(granularity)
        self.rounds = integer("rounds", rounds, 1, most=MOST_ROUNDS)
        self.rewind = choice("rewind", rewind, ("weights", "learning_rate", "random"))
        self.rewind_to = position("rewind_to", rewind_to)
        self.seed = integer("seed", seed)
        first = 1 / (self.rounds + 1) if frequency is None else integer("frequency", frequency, 1, unit=interval)
        horizon = Horizon(first, first * self.rounds, interval, frequency)
        super().__init__(target, criterion, granularity, scope, horizon, targets, ignore, log_layers)

    @override
    def resume_with(self, changed: Mapping[str, str]) -> None:
        reject_changes(self, changed, "sparsity", "rounds", "rewind", "rewind_to", "frequency", "interval")
        super().resume_with(changed)

    @override
    def plan(self, first: int, last: int) -> list[tuple[int, float]]:
        apart = (last - first) / max(1, self.rounds - 1)
        back = self.state.back or 0
        return [(round(first + i * apart) - i * back, (i + 1) / self.rounds) for i in range(self.rounds)]

    @override
    def describe(self) -> tuple[str, str, list[tuple[int, float]]]:
        what, label, _ = super().describe()
        found, without = self.state.targets, self.state.left_out
        rounds = [(at, *self.sparsity_target.round(done)) for at, done in self.state.updates]
        updates = [(at, due * target.of_all(found, without)) for at, target, due in rounds]
        return f"{what} in {self.rounds} rounds", label, updates

    @override
    def on_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.rewind == "random":
            rewinding.check_resettable(pl_module)
        if self.frequency is None and math.isinf(length(trainer, self.interval, self.max_epochs)):
            raise ValueError("frequency must be given where the length of the run is unknown, got None")
        state = self.state
        if state.moment is None:
            state.moment = self._resolve(trainer)
            state.back = self._shorter(trainer, state.moment)
        super().on_start(trainer, pl_module)
        if state.memory is not None and not self.reached:
            rewinding.check_memory(type(self).__name__, trainer, pl_module, state.memory)
        self._check_rounds(trainer)
        if state.memory is None and state.moment <= state.steps and any(map(is_lazy, pl_module.parameters())):
            raise ValueError(
                "the model must have no uninitialised parameters to be rewound to its start: run a batch through it "
                "before fit, or let rewind_to be at least 1"
            )
        state.stop = self._end(trainer)
        self._stop_if_trained(trainer, self.clock(trainer))

    def _end(self, trainer: Trainer) -> float:
        """Return when the ticket is trained, in intervals; infinite where the run ends by itself."""
        another_fit = self.reached and self.clock(trainer) < self.state.updates[-1][0]  # it goes on with a ticket
        if another_fit or not self.state.back:
            return math.inf
        duration = length(trainer, self.interval, self.max_epochs)
        full = duration if self.frequency is None else self.frequency * (self.rounds + 1)
        return math.inf if duration > full else full - self.rounds * self.state.back

    def _check_rounds(self, trainer: Trainer) -> None:
        moment, positions = self.state.moment, [0, *(position for position, _ in self.state.updates)]
        first = in_steps(trainer, self.interval, positions[1])
        if self.state.memory is None and moment is not None and moment >= first > 0:
            raise ValueError(f"rewind_to must lie before the first round ends, got step {moment} of {first:g}")
        if any(later <= earlier for earlier, later in pairwise(positions)):
            raise ValueError(
                f"rounds must fit into the run, with at least one {self.interval} for each of the {self.rounds + 1} "
                f"trainings, got rounds={self.rounds} that end at the {self.interval}s {positions[1:]}"
            )

    def _stop_if_trained(self, trainer: Trainer, clock: int) -> None:
        if clock >= self.state.stop:
            trainer.should_stop = True

    def _shorter(self, trainer: Trainer, moment: int) -> int:
        """Return by how many intervals trainings are shorter than the first."""
        per_epoch = steps_per_epoch(trainer)
        if self.interval == "step" or not moment:
            return moment
        if not per_epoch:
            raise ValueError(
                f"rewind_to must be 0 where the length of an epoch is unknown, got {self.rewind_to}: count in steps, "
                f'with interval="step" and frequency'
            )
        return int(moment // per_epoch)

    def _resolve(self, trainer: Trainer) -> int:
        if isinstance(self.rewind_to, int):
            return self.rewind_to
        steps = length(trainer, "step", self.max_epochs)
        if math.isinf(steps):
            raise ValueError(f"rewind_to must be an int where the length of the run is unknown, got {self.rewind_to}")
        return round(self.rewind_to * steps)

    @override
    def maybe_update(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = self.state
        assert state.moment is not None
        # more than once, since schedulers may step between the end of a batch and the start of an epoch
        if state.steps == state.moment or (state.memory is None and state.steps > state.moment):
            if state.steps > state.moment:
                name = type(self).__name__
                rank_zero_warn(f"{name} was not there at step {state.moment}: it will rewind to step {state.steps}")
                state.moment = state.steps
            state.memory = rewinding.remember(trainer, pl_module, weights=self.rewind != "learning_rate")
        if state.again is not None and state.steps >= state.again[0]:
            rewinding.go_back(trainer, pl_module, state.again[1])
            self.observation.reset()
            state.again = None
        if self.interval == "step":
            self._stop_if_trained(trainer, state.steps)
        super().maybe_update(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.interval == "epoch":
            self._stop_if_trained(trainer, trainer.current_epoch + 1)

    @override
    def choose_masks(self, model: nn.Module, position: int, amount: float) -> Masks:
        return decide(self, *self.sparsity_target.round(amount))

    @override
    def after_update(self, trainer: Trainer, pl_module: LightningModule, amount: float) -> None:
        memory, random = self.state.memory, self.rewind == "random" and amount == 1.0
        assert memory is not None
        if random:  # what optimizers know of the weights that were rewound to is nothing to the new ones
            memory = {**memory, "optimizers": [{**saved, "state": {}} for saved in memory["optimizers"]]}
        rewinding.go_back(trainer, pl_module, memory)
        self.observation.reset()  # of a training that is undone
        if random:
            rewinding.reset(pl_module, self.seed)
            rewinding.mask_all(trainer)
        self._wait(trainer, pl_module)

    def _wait(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go back once more in the batch of an epoch that was remembered: only then epochs end where they ended."""
        assert self.state.moment is not None
        per_epoch = int(steps_per_epoch(trainer)) if self.interval == "epoch" else 0
        ahead = (self.state.moment - self.state.steps) % per_epoch if per_epoch else 0
        self.state.again = (self.state.steps + ahead, rewinding.remember(trainer, pl_module)) if ahead else None
