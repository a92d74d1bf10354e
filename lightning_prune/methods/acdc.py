"""AC/DC: phases in which all weights train alternate with phases in which the smallest are pruned."""

from collections.abc import Sequence
from typing import Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from typing_extensions import override

from lightning_prune import scopes
from lightning_prune.criteria import Criterion, Magnitude
from lightning_prune.granularities import Granularity, Weight
from lightning_prune.masks import Masks
from lightning_prune.schedules import Horizon, positions
from lightning_prune.training.enforcement import reset_momentum
from lightning_prune.training.scheduled import ScheduledTraining
from lightning_prune.updates.target_sparsity import SparsityTarget
from lightning_prune.validation.arguments import fractions


class ACDC(ScheduledTraining):
    """Alternate compressed and decompressed phases (AC/DC), so that one run gives a sparse and nearly a dense model.

    The run begins dense. Each compressed phase chooses its masks from all weights; in a decompressed phase nothing is
    pruned, weights come back from zero, and momentum is reset where it begins. The phase before the last is
    decompressed and may be a longer one, the last is compressed and lasts from ``end`` to the end of the run.

    Args:
        sparsity: Fraction of zeros among the targets in compressed phases and at the end, in [0, 1), or
            ``{pattern: fraction}`` per layer.
        criterion: Scores the units; the lowest go.
        granularity: Which weights form a unit.
        scope: How the sparsity is shared out over the targets: "global", "local", "erk", "lamp" or a callable. None is
            "global" for single weights and blocks, and "local" for channels and heads, which keeps every layer alive.
        start: First compressed phase: an int counts intervals, a float in [0, 1] is a fraction of the run.
        end: Last compressed phase, which lasts; likewise.
        interval: What an int counts: optimizer "step"s or "epoch"s. At epochs the masks change before the first batch.
        frequency: Length of a phase, in intervals; None divides the window into 15 as in the paper.
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out, in the same form.
        log_layers: Whether to log the sparsity of every target beside the total ``pruning/sparsity``.

    Raises:
        ValueError: If an argument is out of range; when training starts, if a pattern matches nothing, no parameter
            is prunable, or the length of a run that fractions need is unknown.

    Reference: Peste et al., 2021, "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks",
    arXiv:2106.12379.

    >>> ACDC(0.9, frequency=5).plan(10, 30)
    [(10, 1.0), (15, 0.0), (20, 1.0), (25, 0.0), (30, 1.0)]
    """

    def __init__(
        self,
        sparsity: float | dict[str, float],
        criterion: Criterion = Magnitude(),
        granularity: Granularity = Weight(),
        scope: scopes.ScopeName | scopes.Scope | None = None,
        start: int | float = 0.1,
        end: int | float = 0.85,
        interval: Literal["step", "epoch"] = "step",
        frequency: int | None = None,
        targets: Sequence[str] = (),
        ignore: Sequence[str] = (),
        log_layers: bool = False,
    ) -> None:
        target = SparsityTarget(fractions("sparsity", sparsity)).for_granularity(granularity)
        horizon = Horizon(start, end, interval, frequency)
        super().__init__(target, criterion, granularity, scope, horizon, targets, ignore, log_layers)

    @override
    def plan(self, first: int, last: int) -> list[tuple[int, float]]:
        every = self.frequency or max(1, round((last - first) / 15))
        phases = [(position, float(i % 2 == 0)) for i, position in enumerate(positions(first, last, every))]
        # the last decompressed phase takes in the compressed one that would stand before the end
        return [*phases[: len(phases) // 2 * 2], (last, 1.0)]

    @override
    def choose_masks(self, model: nn.Module, position: int, amount: float) -> Masks:
        if amount:
            return super().choose_masks(model, position, amount)
        return Masks({name: torch.ones_like(mask) for name, mask in self.masks.items()})

    @override
    def after_update(self, trainer: Trainer, pl_module: LightningModule, amount: float) -> None:
        if not amount:
            for optimizer in trainer.optimizers:
                reset_momentum(optimizer)
