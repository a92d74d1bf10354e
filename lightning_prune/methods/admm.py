"""ADMM: dense weights are pulled towards a sparse copy of themselves until they can be pruned at hardly any cost."""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune import schedules, scopes
from lightning_prune.criteria import Criterion, Magnitude
from lightning_prune.granularities import Granularity, Weight
from lightning_prune.masks import Masks
from lightning_prune.methods.splitting_state import SplittingState
from lightning_prune.models.parameters import named_parameters
from lightning_prune.schedules import Horizon, positions
from lightning_prune.tensors.distributed import local
from lightning_prune.training.checks import reject_lbfgs, reject_sparse_gradient
from lightning_prune.training.enforcement import parameter_ids
from lightning_prune.training.gradient_readers import gradient_scale
from lightning_prune.training.scheduled import ScheduledTraining
from lightning_prune.training.state import RunState
from lightning_prune.updates.decision import decide
from lightning_prune.updates.target_sparsity import SparsityTarget
from lightning_prune.validation.arguments import fractions, number


class ADMM(ScheduledTraining):
    """Train under a sparsity constraint with the alternating direction method of multipliers, as ELSA does.

    Until ``end`` no weight is zero. Every ``frequency`` intervals the weights w are projected: ``z`` is w + u with the
    lowest units at zero, and the dual variable ``u`` becomes w + u - z, the sum of what the projections took so far.
    In every step ``penalty * (w - z + u)`` is added to the gradient. At ``end`` w is close to a sparse z; its lowest
    units are pruned for good, and the rest of the run fine-tunes what is left. The callback needs one number for each
    weight, which is part of its state in checkpoints.

    Args:
        sparsity: Fraction of zeros among the targets from ``end`` on, in [0, 1), or ``{pattern: fraction}`` per layer.
        penalty: How strongly weights are pulled, above 0, in units of the gradient of the loss for a distance of 1.
        criterion: Scores the units; the lowest go.
        granularity: Which weights form a unit.
        scope: How the sparsity is shared out over the targets: "global", "local", "erk", "lamp" or a callable. None is
            "global" for single weights and blocks, and "local" for channels and heads, which keeps every layer alive.
        schedule: From progress through the window to the fraction of the sparsity to project to, both 0 to 1:
            "one_shot" projects to the whole sparsity from the start, as in the paper; "cubic" did better with Adam.
        start: First projection: an int counts intervals, a float in [0, 1] is a fraction of the run.
        end: When the masks are set; likewise.
        interval: What an int counts: optimizer "step"s or "epoch"s.
        frequency: Intervals from projection to projection; None divides the window into 30. It takes many optimizer
            steps to follow a projection: with too few between them the dual variable grows without bound.
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out, in the same form.
        log_layers: Whether to log the sparsity of every target beside the total ``pruning/sparsity``.

    Raises:
        ValueError: If an argument is out of range; when training starts, if a pattern matches nothing, no parameter
            is prunable, or the length of a run that fractions need is unknown; when an optimizer is LBFGS, whose line
            search compares losses without the penalty, or a gradient is sparse.

    Reference: Lee et al., 2025, "The Unseen Frontier: Pushing the Limits of LLM Sparsity with Surrogate-Free ADMM",
    arXiv:2510.01650; Zhang et al., 2018, "A Systematic DNN Weight Pruning Framework using Alternating Direction Method
    of Multipliers", arXiv:1804.03294.

    >>> ADMM(0.9, schedule="linear", frequency=10).plan(0, 40)
    [(0, 0.0), (10, 0.25), (20, 0.5), (30, 0.75), (40, 1.0)]
    """

    State: ClassVar[type[RunState]] = SplittingState
    state: SplittingState
    mask_arguments: ClassVar[tuple[str, ...]] = (*ScheduledTraining.mask_arguments, "schedule")

    def __init__(
        self,
        sparsity: float | dict[str, float],
        penalty: float = 0.01,
        criterion: Criterion = Magnitude(),
        granularity: Granularity = Weight(),
        scope: scopes.ScopeName | scopes.Scope | None = None,
        schedule: schedules.ScheduleName | schedules.Schedule = "one_shot",
        start: int | float = 0.0,
        end: int | float = 0.75,
        interval: Literal["step", "epoch"] = "step",
        frequency: int | None = None,
        targets: Sequence[str] = (),
        ignore: Sequence[str] = (),
        log_layers: bool = False,
    ) -> None:
        self.penalty = number("penalty", penalty, "(0, inf)")
        self.schedule = schedule
        self._schedule = schedules.resolve(schedule)
        target = SparsityTarget(fractions("sparsity", sparsity)).for_granularity(granularity)
        horizon = Horizon(start, end, interval, frequency)
        super().__init__(target, criterion, granularity, scope, horizon, targets, ignore, log_layers)

    @override
    def plan(self, first: int, last: int) -> list[tuple[int, float]]:
        every = self.frequency or max(1, round((last - first) / 30))
        projections = [(at, (at - first) / max(1, last - first)) for at in positions(first, last, every) if at < last]
        due = [(at, schedules.value_at("schedule", self._schedule, progress)) for at, progress in projections]
        return [*due, (last, 1.0)]

    @override
    def describe(self) -> tuple[str, str, list[tuple[int, float]]]:
        what, _, updates = super().describe()
        return what, "projected to", updates

    @override
    def on_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reject_lbfgs("ADMM", trainer.optimizers, "step by the gradients alone")
        self.state.place(named_parameters(pl_module))
        super().on_start(trainer, pl_module)

    @override
    def choose_masks(self, model: nn.Module, position: int, amount: float) -> Masks:
        if position < self.state.updates[-1][0]:
            return self._project(model, amount)
        self.state.centers, self.state.chosen, self.state.pulled = {}, Masks(), {}
        return super().choose_masks(model, position, amount)

    @torch.no_grad()
    def _project(self, model: nn.Module, amount: float) -> Masks:
        """Split off z and u, and return masks that prune nothing."""
        state, parameters = self.state, named_parameters(model)
        weights = {name: local(parameter) for name, parameter in state.pulled.items()}
        held = {name: weight.clone() for name, weight in weights.items()}
        for name, weight in weights.items():
            weight.add_(state.dual(name))
        # nothing is pruned for good yet, so that there is nothing to warn of
        allocate = partial(
            self.sparsity_target.allocate,
            found=state.targets,
            criterion=self.criterion,
            scope=self.share_out,
            due=amount,
            budget=state.budget,
        )
        chosen = decide(state.units, self.criterion, allocate, state.masks).masks
        state.pulled = {name: parameters[name] for name in chosen}
        state.chosen = chosen
        # what is kept is z, and what is not, u
        state.centers = {
            name: torch.where(kept, local(parameters[name]), -local(parameters[name])) for name, kept in chosen.items()
        }
        for name, weight in weights.items():
            weight.copy_(held[name])
        return Masks({name: torch.ones_like(kept) for name, kept in chosen.items()})

    @override
    def before_optimizer_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        super().before_optimizer_step(trainer, optimizer)
        strength, mine = self.penalty * gradient_scale(trainer, optimizer), parameter_ids(optimizer)
        for name, parameter in self.state.pulled.items():
            gradient = parameter.grad
            if gradient is None or id(parameter) not in mine:
                continue
            reject_sparse_gradient("ADMM", name, gradient)
            local(gradient).add_(local(parameter) - self.state.centers[name], alpha=strength)
