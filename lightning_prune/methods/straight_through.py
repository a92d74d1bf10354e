"""Straight-through training: the forward pass sees N:M weights, and what they hide is trained on all the same."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.criteria import Magnitude
from lightning_prune.granularities import NM
from lightning_prune.masks import Masks
from lightning_prune.methods.straight_through_state import StraightThroughState
from lightning_prune.models.parameters import find, left_out
from lightning_prune.tensors.boolean import chunks
from lightning_prune.tensors.distributed import local, local_shard
from lightning_prune.training.checks import reject_lbfgs, reject_running, reject_sparse_gradient
from lightning_prune.training.enforcement import parameter_ids
from lightning_prune.training.gradient_readers import gradient_scale
from lightning_prune.training.masked import MaskedTraining
from lightning_prune.training.plan_text import listing
from lightning_prune.training.protocols import mask_averages
from lightning_prune.training.resumed_arguments import listed, texts
from lightning_prune.training.sparsity_log import log_info
from lightning_prune.training.state import RunState
from lightning_prune.units.finding import make_units
from lightning_prune.units.units import Units
from lightning_prune.updates.decision import score
from lightning_prune.validation.arguments import number


class SRSTE(MaskedTraining):
    """Train N:M sparse weights from the first step, straight through the mask (SR-STE).

    Of every m weights that follow each other along the inputs the n largest are used, and which these are is decided
    again after every step. The callback keeps the weights without zeros: their gradient is that of the masked ones,
    and those that are pruned decay a little, so that the choice settles. Between two steps the model has the masked
    weights only, as validation and checkpoints see them. The others are part of the callback's state, at one number for
    each weight, and are what training goes on with when it is resumed.

    Args:
        n: How many of a group are kept, at least 1.
        m: The size of a group, more than n.
        decay: How strongly pruned weights decay: this times the weight is added to its gradient; 0 is the plain
            straight-through estimator.
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out, in the same form.
        log_layers: Whether to log the sparsity of every target beside the total ``pruning/sparsity``.

    Raises:
        ValueError: If an argument is out of range; when training starts, if a pattern matches nothing, no parameter
            is prunable; when an optimizer (LBFGS, SAM) runs the model inside its step, or a gradient is sparse.

    Reference: Zhou et al., 2021, "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
    arXiv:2102.04010.

    >>> SRSTE(2, 4).granularity
    NM(n=2, m=4)
    """

    State: ClassVar[type[RunState]] = StraightThroughState
    state: StraightThroughState
    trains_pruned: ClassVar[bool] = True
    mask_arguments: ClassVar[tuple[str, ...]] = ("n", "m")

    def __init__(
        self,
        n: int = 2,
        m: int = 4,
        decay: float = 2e-4,
        targets: Sequence[str] = (),
        ignore: Sequence[str] = (),
        log_layers: bool = False,
    ) -> None:
        self.granularity = NM(n, m)
        self.n = self.granularity.n
        self.m = self.granularity.m
        self.decay = number("decay", decay, "[0, inf)")
        super().__init__(targets, ignore, log_layers)

    @override
    def resume_with(self, changed: Mapping[str, str]) -> None:
        rank_zero_warn(f"{type(self).__name__} resumes with {listed(changed, texts(self, changed))}: new masks follow")
        self.state.masks = Masks()

    @override
    def explain(self) -> str:
        goal = f"{self.n} of {self.m} weights kept, sparsity {self.granularity.least:g}"
        parameters = {unit.name: unit.parameter for unit in self.state.units}
        last = "masks are chosen after every step"
        return listing(f"{type(self).__name__} to {goal}", parameters, last, self.state.left_out)

    @override
    def rebuild(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_start(trainer, pl_module)
        super().rebuild(trainer, pl_module)

    @override
    def on_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reject_lbfgs("SRSTE", trainer.optimizers)
        self.state.units = []
        self.state.masks = Masks({**self.masks, **self._join(pl_module)})
        self.state.left_out = left_out(pl_module, self.targets, self.ignore)
        log_info(self.explain())

    def _join(self, pl_module: nn.Module) -> Masks:
        """Take in the targets that are new, lazy or frozen until now, and return masks for those that have none."""
        found = find(pl_module, self.targets, self.ignore, later=True)
        known = {id(unit.parameter) for unit in self.state.units}
        joined = make_units([t for t in found if id(t.parameter) not in known], pl_module, self.granularity)
        for unit in joined:
            weight = local(unit.parameter)
            if unit.name in self.state.full:
                self.state.full.remove(unit.name)
                full = self.state.dense[unit.name]
                self.state.dense[unit.name] = local_shard(full, unit.parameter).to(weight, copy=True)
            dense = self.state.dense.get(unit.name)
            if dense is None or dense.shape != weight.shape or not ((weight == dense) | (weight == 0)).all():
                self.state.dense[unit.name] = weight.clone()  # there are none, or they are not those of this model
        self.state.units += joined
        return self._choose([unit for unit in joined if unit.name not in self.masks])

    def _take_in(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if masks := self._join(pl_module):
            self.set_masks(trainer, pl_module, Masks({**self.masks, **masks}))

    def _choose(self, units: list[Units]) -> Masks:
        if not units:
            return Masks()
        places = score(units, Magnitude(), dict.fromkeys(unit.name for unit in units))
        return Masks({name: places.at_least(name, self.granularity.least) for name in places})

    @override
    def before_optimizer_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        scale = gradient_scale(trainer, optimizer)
        if self.state.guard is None:
            self.state.guard = register_module_forward_pre_hook(
                partial(self._refuse, trainer, type(optimizer).__name__)
            )
        for unit in _of(optimizer, self.state.units):
            if unit.name not in self.state.open and unit.parameter.grad is not None:
                reject_sparse_gradient("SRSTE", unit.name, unit.parameter.grad)
                self.state.open.add(unit.name)
                dense = self.state.dense[unit.name]
                local(unit.parameter).copy_(dense)
                _add_hidden(local(unit.parameter.grad), dense, self.masks[unit.name], self.decay * scale)

    @override
    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        units = [unit for unit in _of(optimizer, self.state.units) if unit.name in self.state.open]
        self.state.open.difference_update(unit.name for unit in units)  # the hook of an optimizer may be called twice
        self._take(units)
        if not self.state.open:
            self._shut()

    def _take(self, units: list[Units]) -> None:
        """Choose the masks of weights that are without zeros in the model, and keep a copy of them."""
        for unit in units:
            self.state.dense[unit.name].copy_(local(unit.parameter))
        chosen = self._choose(units)
        self.enforcement.replace({unit.parameter: chosen[unit.name] for unit in units})
        self.state.masks = Masks({**self.masks, **chosen})

    def _refuse(self, trainer: Trainer, optimizer: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Let no forward pass of the model see the weights without zeros."""
        if any(module is ours for ours in trainer.lightning_module.modules()):
            if getattr(trainer.precision_plugin, "scaler", None) is None:
                reject_running("SRSTE", optimizer)
            self._shut()  # a gradient scaler has skipped the step

    def _shut(self) -> None:
        """End a step: that it is open is no longer so, whether it was taken or not."""
        if self.state.guard is not None:
            self.state.guard.remove()
            self.state.guard = None
        if self.state.open:  # it was not taken
            self.state.open.clear()
            self.enforcement.apply()

    @override
    def release(self, pl_module: nn.Module) -> None:
        self._shut()
        super().release(pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:  # what an epoch begins with may have been unfrozen
            self._take_in(trainer, pl_module)

    @override
    def hidden_weights(self) -> dict[str, Tensor]:
        return {name: weight for name, weight in self.state.dense.items() if name not in self.state.full}

    @override
    def reapply_masks(self) -> None:
        self._take(self.state.units)
        super().reapply_masks()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._shut()
        if batch_idx == 0:  # lazy layers exist after their first forward pass
            self._take_in(trainer, pl_module)
        mask_averages(trainer.callbacks, self.masks)  # type: ignore[attr-defined]
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def _of(optimizer: Optimizer, units: list[Units]) -> list[Units]:
    """Return the units of the parameters of an optimizer."""
    stepping = parameter_ids(optimizer)
    return [unit for unit in units if id(unit.parameter) in stepping]


def _add_hidden(gradient: Tensor, weight: Tensor, mask: Tensor, times: float) -> None:
    """Add to a gradient, in place, so many times the weights that the mask prunes."""
    parts = [(gradient, weight, mask)]
    if all(tensor.is_contiguous() for tensor in parts[0]):  # in chunks, which stay in the cache
        parts = list(zip(*map(chunks, parts[0]), strict=True))
    for grad, hidden, kept in parts:
        grad.add_(hidden.masked_fill(kept, 0.0), alpha=times)
