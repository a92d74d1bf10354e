"""Learned masks: which n of every m weights stay is learned from the loss, while the weights keep their values."""

from collections.abc import Sequence
from math import comb
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.criteria import Criterion, Magnitude
from lightning_prune.granularities import NM
from lightning_prune.masks import Masks
from lightning_prune.methods.joining import join
from lightning_prune.methods.learned_state import LearnedState
from lightning_prune.methods.mask_prior import check_prior, first_masks, two_numbers, warn_of_zeros
from lightning_prune.methods.pattern_logits import MOST_PATTERNS, Draw
from lightning_prune.models.parameters import find, left_out, named_parameters
from lightning_prune.models.small_parameters import of_kind_or_name
from lightning_prune.models.summary import counted_as
from lightning_prune.schedules import Horizon
from lightning_prune.training.checks import (
    reject_lazy,
    reject_lbfgs,
    reject_running,
    reject_shards,
    reject_sparse_gradient,
)
from lightning_prune.training.gradient_readers import gradient_scale
from lightning_prune.training.masked import MaskedTraining
from lightning_prune.training.plan_text import listing
from lightning_prune.training.protocols import mask_averages
from lightning_prune.training.run_length import length
from lightning_prune.training.sparsity_log import log_info
from lightning_prune.training.state import RunState
from lightning_prune.units.weights import WeightUnits
from lightning_prune.validation.arguments import integer, number, patterns


class LearnedMasks(MaskedTraining):
    """Learn which n of every m weights to keep by training, while the weights keep their values, as MaskLLM does.

    Each group of m weights has a logit for each way to keep n of them. In training the model has the weights times a
    soft mask: the patterns weighted by a Gumbel softmax of the logits, which is random at first and nearly one pattern
    in the end. An optimizer steps the logits in the place of the weights, with the options of their group. After each
    backward pass, in validation and in checkpoints the model has the weights under the most likely pattern of each
    group, bit for bit. Parameters that are neither targets nor in ``train`` keep their values, too.

    The callback holds the weights without zeros, and they and the logits (6 for each group of 4 at 2:4) are part of
    checkpoints. The logits want a larger learning rate than weights: 0.001 to 0.01 with Adam, more in short runs.

    Args:
        n: How many of a group are kept, at least 1.
        m: The size of a group, more than n; there are at most 256 ways to keep n of m.
        prior: The masks to start from: a criterion that scores by the weights alone, or the masks that ``prune`` has
            returned for a copy of the model. A last group that is shorter than m keeps the mask it starts with.
        strength: How much the logits prefer the patterns of the prior at first: alpha in the paper.
        temperature: Of the softmax, at first and at ``end``; linear in between.
        scale: What logits are multiplied by, at first and at ``end``: kappa in the paper; linear in between.
        regularization: How strongly large weights are kept: this times the sum of squares under the soft mask is taken
            from the loss, so that gradients do not vanish.
        end: When temperature and scale reach their last values: an int is a step, a float in [0, 1] a fraction of the
            run.
        train: What else is trained: "bias" is all biases, "norm" all parameters of norms, others are globs (or "re:"
            and a regular expression) on parameter names.
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out, in the same form.
        log_layers: Whether to log the sparsity of every target beside the total ``pruning/sparsity``.
        seed: Of the random numbers, which are the same on every rank.

    Raises:
        ValueError: If an argument is out of range; when training starts, if a pattern matches nothing, no parameter
            is prunable, one is sharded or uninitialised, the prior lacks a mask or does not keep n of m, or ``end`` is
            a fraction of a run without end; if an optimizer (LBFGS, SAM) runs the model inside its step, or
            a gradient is sparse.

    Reference: Fang et al., 2024, "MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models",
    arXiv:2409.17481.

    >>> LearnedMasks(2, 4, temperature=(2.0, 0.1)).granularity
    NM(n=2, m=4)
    """

    State: ClassVar[type[RunState]] = LearnedState
    state: LearnedState
    trains_pruned: ClassVar[bool] = True
    mask_arguments: ClassVar[tuple[str, ...]] = ("n", "m")

    def __init__(
        self,
        n: int = 2,
        m: int = 4,
        prior: Criterion | Masks = Magnitude(),
        strength: float = 3.0,
        temperature: Sequence[float] = (4.0, 0.05),
        scale: Sequence[float] = (100.0, 500.0),
        regularization: float = 1e-5,
        end: int | float = 1.0,
        train: Sequence[str] = (),
        targets: Sequence[str] = (),
        ignore: Sequence[str] = (),
        log_layers: bool = False,
        seed: int = 0,
    ) -> None:
        self.granularity = NM(n, m)
        self.n, self.m = self.granularity.n, self.granularity.m
        if comb(self.m, self.n) > MOST_PATTERNS:
            ways = f"{comb(self.m, self.n):,} for n={self.n} and m={self.m}"
            raise ValueError(f"n and m must have at most {MOST_PATTERNS} ways to keep n of m, got {ways}")
        self.prior = check_prior(prior)
        self.strength = number("strength", strength, "(0, inf)")
        self.temperature = two_numbers("temperature", temperature)
        self.scale = two_numbers("scale", scale)
        self.regularization = number("regularization", regularization, "[0, inf)")
        self.end = Horizon(0, end).end
        self.train = patterns("train", train)
        self.seed = integer("seed", seed, 0)
        super().__init__(targets, ignore, log_layers)

    @override
    def explain(self) -> str:
        goal = f"{self.n} of {self.m} weights kept, sparsity {self.granularity.least:g}"
        count = sum(logits.numel() for logits in self.state.logits.values())
        others = f", and {self.state.others:,} by train={self.train}" if self.train else ""
        until = f"temperature and scale reach their last values at step {self.state.last}"
        last = f"trained: {counted_as(count, 'logit')}{others}; {until}"
        return listing(f"{type(self).__name__} to {goal}", self.state.dense, last, self.state.left_out)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # before the state of optimizers is restored, which has the logits in it
        if not self.state.concerns(pl_module):
            self.reset()
        reject_lbfgs("LearnedMasks", trainer.optimizers)
        self.state.resumed = self.state.restored
        units = self._find(pl_module)
        if not self.masks:
            self.state.masks = first_masks(self.prior, units, self.granularity)
        self.state.learn(units, self.n, self.m, self.strength)
        for optimizer in trainer.optimizers:
            join(optimizer, {each.weight: {"logits": each.logits} for each in self.state.learned.values()})

    def _find(self, pl_module: LightningModule) -> list[WeightUnits]:
        reject_lazy("LearnedMasks", pl_module)
        found = find(pl_module, self.targets, self.ignore)
        reject_shards("LearnedMasks", found)
        others = set(of_kind_or_name(pl_module, "train", self.train))
        for target in found:
            if target.name in others:
                raise ValueError(f"train must have no targets in it, got {self.train}, which has {target.name!r}")
        return [WeightUnits(target, self.m) for target in found]

    @override
    def on_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = self.state
        state.begin()
        state.masks = Masks({name: each.choose(self.masks[name]) for name, each in state.learned.items()})
        state.manual = not pl_module.automatic_optimization
        if not state.resumed:
            state.last = max(1, Horizon(0, self.end).window(length(trainer, "step", self.max_epochs))[1])
        state.left_out = left_out(pl_module, self.targets, self.ignore)
        state.hold(pl_module, self.train)
        warn_of_zeros(state.dense, state.masks)
        log_info(self.explain())

    @override
    def rebuild(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters = named_parameters(pl_module)
        gone = [name for name, each in self.state.learned.items() if parameters.get(name) is not each.weight]
        if gone:
            self.state.drop(gone)
            rank_zero_warn(f"LearnedMasks drops the logits of {gone[:5]}: these layers have been replaced")
        self.state.hold(pl_module, self.train)
        super().rebuild(trainer, pl_module)

    def _draw(self) -> Draw:
        progress = min(1.0, self.state.steps / max(1, self.state.last - 1))
        now = [first + progress * (last - first) for first, last in (self.temperature, self.scale)]
        return Draw(self.seed, self.state.steps, *now)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.state.draw = self._draw()
        self.enforcement.replace(self.state.soften(list(self.state.learned)))

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_after_backward(trainer, pl_module)
        if not self.state.manual:  # of several backward passes, the others are to see soft weights, too
            self.enforcement.replace(self.state.harden(list(self.state.soft)))

    @override
    def before_optimizer_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        state = self.state
        state.begin_step("LearnedMasks", trainer, optimizer)
        regularization = self.regularization * gradient_scale(trainer, optimizer)
        for name in state.held_by(optimizer):
            gradient = state.held[name].grad
            if name in state.learned and gradient is not None:
                reject_sparse_gradient("LearnedMasks", name, gradient)
            state.take_gradient(name, regularization)

    @override
    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        self.state.stepping.discard(id(optimizer))
        learned = self.state.learned
        names = [name for name in self.state.held_by(optimizer) if name in learned]
        if any(learned[name].weight.grad is not None for name in names):
            reject_running("LearnedMasks", type(optimizer).__name__)
        self.state.masks = Masks({**self.masks, **{name: learned[name].choose(self.masks[name]) for name in names}})
        self.enforcement.replace(self.state.harden(names))
        if self.state.manual:  # the batch may go on
            self.enforcement.replace(self.state.soften(names))

    def _close(self) -> None:
        """Put all weights under hard masks: a batch is over, or its run."""
        self.enforcement.replace(self.state.harden(list(self.state.soft)))
        self.state.draw = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._close()
        mask_averages(trainer.callbacks, self.masks)  # type: ignore[attr-defined]
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()  # of a batch that the module has skipped, with the rest of its epoch

    @override
    def release(self, pl_module: nn.Module) -> None:
        self._close()
        super().release(pl_module)

    @override
    def hidden_weights(self) -> dict[str, Tensor]:
        return dict(self.state.dense)
