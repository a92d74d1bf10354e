"""Masked adapters: fine-tune a pruned model by low-rank corrections that keep its zeros, with its biases and norms."""

from collections.abc import Sequence
from typing import ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.methods.adapters_state import AdaptersState
from lightning_prune.methods.joining import join
from lightning_prune.models.parameters import Target, find, named_parameters
from lightning_prune.models.small_parameters import of_kind_or_name
from lightning_prune.models.summary import counted_as
from lightning_prune.training.checks import (
    reject_lazy,
    reject_lbfgs,
    reject_running,
    reject_shards,
    reject_sparse_gradient,
)
from lightning_prune.training.constant import ConstantSparsity
from lightning_prune.training.plan_text import listing
from lightning_prune.training.state import RunState
from lightning_prune.validation.arguments import integer, number, patterns


class MaskedAdapters(ConstantSparsity):
    """Fine-tune a pruned model by low-rank adapters under its zeros, and by its biases and norms, as PERP does.

    Each target w becomes ``w + alpha / rank * (up @ down)`` where it is not zero, and only the two small factors are
    trained: an optimizer steps them in the place of w, with its options. They are merged into w after each step, so
    that the model is at every moment the plain one: there is nothing to merge in the end, and no zero is lost. All
    other parameters but those in ``train`` keep their values. A run that goes on from a checkpoint goes on with the
    factors in it; every other run starts new ones.

    A copy of the targets is held, and their gradients exist until a step, but the state of optimizers is that of the
    small parameters only. Freeze what needs no gradient by ``requires_grad_(False)``, such as embeddings: this saves
    their gradients, and frozen weights get no adapter.

    Args:
        rank: Of the adapters, or the smaller side of a weight if that is less; 0 is without adapters.
        alpha: Strength of the adapters, whose product is multiplied by ``alpha / rank``; None is twice the rank.
        train: What else is trained: "bias" is all biases, "norm" all parameters of norms, others are globs (or "re:"
            and a regular expression) on parameter names, such as a new head. Their zeros are kept, too.
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out, in the same form.
        log_layers: Whether to log the sparsity of every target beside the total ``pruning/sparsity``.
        seed: Of the random factors.

    Raises:
        ValueError: If an argument is out of range; when training starts, if a pattern matches nothing, no parameter
            can be adapted, or one is sharded or uninitialised; if an optimizer (LBFGS, SAM) runs the model inside its
            step, or a gradient is sparse.

    Reference: Zimmer et al., 2023, "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", arXiv:2312.15230;
    Munoz et al., 2024, "SQFT: Low-cost Model Adaptation in Low-precision Sparse Foundation Models", arXiv:2410.03750.

    >>> MaskedAdapters(8, train=("bias", "norm", "head.*")).rank
    8
    """

    State: ClassVar[type[RunState]] = AdaptersState
    state: AdaptersState
    mask_arguments: ClassVar[tuple[str, ...]] = ("rank", "alpha", "train")

    def __init__(
        self,
        rank: int = 16,
        alpha: float | None = None,
        train: Sequence[str] = ("bias", "norm"),
        targets: Sequence[str] = (),
        ignore: Sequence[str] = (),
        log_layers: bool = False,
        seed: int = 0,
    ) -> None:
        self.rank = integer("rank", rank, 0)
        self.alpha = None if alpha is None else number("alpha", alpha, "(0, inf)")
        self.train = patterns("train", train)
        self.seed = integer("seed", seed, 0)
        super().__init__(targets, ignore, log_layers)

    @property
    def _scale(self) -> float:
        return 2.0 if self.alpha is None else self.alpha / max(1, self.rank)

    @override
    def explain(self) -> str:
        factors = sum(adapter.down.numel() + adapter.up.numel() for adapter in self.state.adapters.values())
        what = f"to keep all zeros, with adapters of rank {self.rank}"
        others = f", and {self.state.others:,} by train={self.train}" if self.train else ""
        last = f"trained: {counted_as(factors, 'weight')} of adapters{others}"
        return listing(f"{type(self).__name__} {what}", self.masks, last, self.state.left_out)

    # ------------------------------------------------------------------------------------------------ start

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # before the state of optimizers is restored, which has the factors in it
        if not self.state.concerns(pl_module):
            self.reset()
        reject_lbfgs("MaskedAdapters", trainer.optimizers)
        self.state.adapt(self._find(pl_module), self.rank, self.seed)
        for optimizer in trainer.optimizers:
            join(optimizer, {adapter.weight: adapter.factors for adapter in self.state.adapters.values()})

    def _find(self, pl_module: LightningModule) -> list[Target]:
        """Return the weights to adapt."""
        reject_lazy("MaskedAdapters", pl_module)
        others = set(of_kind_or_name(pl_module, "train", self.train))
        found = find(pl_module, self.targets, self.ignore) if self.rank else []
        found = [target for target in found if target.name not in others]
        reject_shards("MaskedAdapters", found)
        return found

    @override
    def on_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.state.hold(pl_module, self.train)
        super().on_start(trainer, pl_module)
        self.state.begin()

    @override
    def rebuild(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters = named_parameters(pl_module)
        gone = [name for name, adapter in self.state.adapters.items() if parameters.get(name) is not adapter.weight]
        if gone:
            self.state.drop(gone)
            rank_zero_warn(f"MaskedAdapters drops the adapters of {gone[:5]}: these layers have been replaced")
        self.state.hold(pl_module, self.train)
        super().rebuild(trainer, pl_module)

    # ------------------------------------------------------------------------------------------------ a step

    @override
    def before_optimizer_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        state = self.state
        state.begin_step("MaskedAdapters", trainer, optimizer)
        for name in state.held_by(optimizer):
            gradient = state.held[name].grad
            if name not in state.adapters:
                state.held[name].grad = None
                continue
            if gradient is not None:
                reject_sparse_gradient("MaskedAdapters", name, gradient)
            state.adapters[name].take_gradient(self.masks[name], self._scale)

    @override
    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        state = self.state
        state.stepping.discard(id(optimizer))
        for name in state.held_by(optimizer):
            if name in state.adapters:
                if state.held[name].grad is not None:
                    reject_running("MaskedAdapters", type(optimizer).__name__)
                state.adapters[name].merge(self._scale)
