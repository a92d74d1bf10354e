"""Masked adapters: fine-tune a pruned model by low-rank corrections that keep its zeros, with its biases and norms."""

from collections.abc import Sequence
from typing import ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.methods.adapters_state import AdaptersState
from lightning_prune.methods.joining import join
from lightning_prune.models.parameters import Target, find, named_parameters
from lightning_prune.models.small_parameters import of_kind_or_name
from lightning_prune.models.summary import counted_as
from lightning_prune.tensors.distributed import is_sharded
from lightning_prune.training.checks import reject_lbfgs, reject_sparse_gradient
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
        reject_lbfgs("MaskedAdapters", trainer.optimizers, "not run the model inside its step")
        self.state.adapt(self._find(pl_module), self.rank, self.seed)
        for optimizer in trainer.optimizers:
            join(optimizer, {adapter.weight: adapter.factors for adapter in self.state.adapters.values()})

    def _find(self, pl_module: LightningModule) -> list[Target]:
        """Return the weights to adapt."""
        if any(map(is_lazy, pl_module.parameters())):
            raise ValueError(
                "parameters must be whole for MaskedAdapters, got uninitialised ones: run a batch through the model"
            )
        others = set(of_kind_or_name(pl_module, "train", self.train))
        found = find(pl_module, self.targets, self.ignore) if self.rank else []
        found = [target for target in found if target.name not in others]
        for target in found:
            if is_sharded(target.parameter):
                raise ValueError(
                    f"parameters must be whole on every rank for MaskedAdapters, got shards of {target.name!r}: use DDP"
                )
        return found

    @override
    def on_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hold(pl_module)
        super().on_start(trainer, pl_module)
        self.state.begin()

    def _hold(self, pl_module: LightningModule) -> None:
        others = set(of_kind_or_name(pl_module, "train", self.train))
        parameters = named_parameters(pl_module)
        self.state.held = {parameter: name for name, parameter in parameters.items() if name not in others}
        self.state.others = sum(parameters[name].numel() for name in others if parameters[name].requires_grad)

    @override
    def rebuild(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters = named_parameters(pl_module)
        gone = [name for name, adapter in self.state.adapters.items() if parameters.get(name) is not adapter.weight]
        if gone:
            self.state.drop(gone)
            rank_zero_warn(f"MaskedAdapters drops the adapters of {gone[:5]}: these layers have been replaced")
        self._hold(pl_module)
        super().rebuild(trainer, pl_module)

    # ------------------------------------------------------------------------------------------------ a step

    @override
    def before_optimizer_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        state = self.state
        # a gradient scaler may have skipped the last step
        if id(optimizer) in state.open and getattr(trainer.precision_plugin, "scaler", None) is None:
            self._refuse(optimizer)
        state.open.add(id(optimizer))
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = state.held.get(parameter)
                if name in state.adapters:
                    if parameter.grad is not None:
                        reject_sparse_gradient("MaskedAdapters", name, parameter.grad)
                    state.adapters[name].take_gradient(self.masks[name], self._scale)
                elif name is not None:
                    parameter.grad = None

    @override
    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        self.state.open.discard(id(optimizer))
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = self.state.held.get(parameter)
                if name in self.state.adapters:
                    if parameter.grad is not None:
                        self._refuse(optimizer)
                    self.state.adapters[name].merge(self._scale)

    def _refuse(self, optimizer: Optimizer) -> None:
        raise ValueError(
            f"optimizer must not run the model inside its step for MaskedAdapters, got {type(optimizer).__name__}"
        )
