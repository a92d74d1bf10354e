"""Pruning at initialisation: masks are chosen before the first optimizer step, and stay."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_prune import scopes
from lightning_prune.criteria import SNIP, Criterion, Loss
from lightning_prune.granularities import Granularity, Weight
from lightning_prune.masks import Masks
from lightning_prune.models.parameters import Target, left_out
from lightning_prune.models.preserving import eager
from lightning_prune.posttraining.prune import prune
from lightning_prune.tensors.distributed import is_sharded
from lightning_prune.training.checks import check_targets
from lightning_prune.training.masked import MaskedTraining
from lightning_prune.training.plan_text import plan, sharing
from lightning_prune.training.resumed_arguments import earlier_defaults
from lightning_prune.training.sparsity_log import log_info
from lightning_prune.training.state import TRANSIENT, RunState
from lightning_prune.training.step_inputs import inputs_of_step, silent_copy
from lightning_prune.updates.statistics import scorable
from lightning_prune.updates.target_sparsity import MOST_ROUNDS, SparsityTarget
from lightning_prune.validation.arguments import integer
from lightning_prune.validation.instances import function, instance


@dataclass(eq=False)
class AtInitState(RunState):
    """What ``PruningAtInit`` knows of its run.

    Attributes:
        found: The targets, by name.
    """

    found: dict[str, Target] = field(default_factory=dict, metadata=TRANSIENT)


class PruningAtInit(MaskedTraining):
    """Prune once, before the first optimizer step, from passes of its own over the first batch; then keep the zeros.

    It is ``prune`` inside of ``fit``, for any criterion, also those that differentiate something else than the loss
    (``GraSP``, ``SynFlow``): from the first step on, the network is sparse. The passes are training steps of a copy of
    the model on a copy of the batch: they change no statistics of norms, no random numbers, no metrics and nothing that
    ``self.log`` logs. In a distributed run each rank scores a batch of its own, and all get the same masks, from all
    batches. A resumed run takes the masks of its checkpoint. Layers that are frozen at the first step are left alone.

    Args:
        sparsity: Fraction of zeros among the targets, in [0, 1), or ``{pattern: fraction}`` per layer.
        criterion: Scores the units; the lowest go. Of what it observes it is given one batch, whatever its ``window``.
        granularity: Which weights form a unit.
        scope: How the sparsity is shared out over the targets: "global", "local", "erk", "lamp" or a callable. None is
            "global" for single weights and blocks, and "local" for channels and heads, which keeps every layer alive.
        rounds: Times to score and prune the same part of what is left.
        loss: ``loss(model, batch)``, for criteria that need gradients or forward passes; None is what ``training_step``
            returns.
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out, in the same form.
        threshold: Instead of a sparsity: prune every unit that scores below it.
        log_layers: Whether to log the sparsity of every target beside the total ``pruning/sparsity``.
        min_density: Fraction of every target, rounded down, and one unit, that a scope keeps at least: no layer goes.
            None is 0 for single weights and blocks; for channels and heads it is 0.1, but at most half of what the
            sparsity leaves, and gives way where there is no room for it.

    Raises:
        ValueError: If an argument is out of range; when training starts, if a pattern matches nothing, or parameters
            are uninitialised or sharded; before the first step, if the model cannot be copied, a score is not finite,
            or the loss is to come from a ``training_step`` that returns none or optimizes by hand.

    Reference: Lee et al., 2019, arXiv:1810.02340; Wang et al., 2020, arXiv:2002.07376; Tanaka et al., 2020,
    arXiv:2006.05467.

    >>> PruningAtInit(0.9).criterion
    SNIP(window=1)
    """

    State: ClassVar[type[RunState]] = AtInitState
    state: AtInitState
    mask_arguments: ClassVar[tuple[str, ...]] = (
        "sparsity",
        "threshold",
        "criterion",
        "granularity",
        "scope",
        "rounds",
        "min_density",
    )

    def __init__(
        self,
        sparsity: float | dict[str, float] | None = None,
        criterion: Criterion = SNIP(),
        granularity: Granularity = Weight(),
        scope: scopes.ScopeName | scopes.Scope | None = None,
        rounds: int = 1,
        loss: Loss | None = None,
        targets: Sequence[str] = (),
        ignore: Sequence[str] = (),
        threshold: float | None = None,
        log_layers: bool = False,
        min_density: float | None = None,
    ) -> None:
        self.sparsity_target = SparsityTarget(sparsity, threshold, min_density).for_granularity(granularity)
        self.sparsity = self.sparsity_target.sparsity
        self.criterion = instance("criterion", criterion, Criterion)
        self.granularity = granularity
        self.normalized = granularity.normalized
        self.scope = granularity.default_scope if scope is None else scope
        scopes.without_search(type(self).__name__, self.scope)
        scopes.resolve(self.scope)
        self.not_given = tuple(n for n, value in (("scope", scope), ("min_density", min_density)) if value is None)
        self.rounds = integer("rounds", rounds, 1, most=MOST_ROUNDS)
        self.loss = None if loss is None else function("loss", loss, "model", "batch")
        self.threshold = self.sparsity_target.threshold
        self.min_density = self.sparsity_target.floor
        super().__init__(targets, ignore, log_layers)

    @override
    def resume_with(self, changed: Mapping[str, str]) -> None:
        earlier = earlier_defaults(changed, self.not_given)
        if self.masks and changed.keys() - earlier:  # else nothing is pruned yet
            super().resume_with({name: changed[name] for name in changed if name not in earlier})

    @property
    @override
    def reached(self) -> bool:
        return bool(self.masks)

    @override
    def target_names(self) -> list[str]:
        # those of the checkpoint or of an earlier fit too, which may be frozen now; of coupled channels, not those
        # without units
        names = list(dict.fromkeys([*self.state.found, *self.state.levels]))
        return [name for name in names if name in self.masks] if self.masks else names

    @override
    def explain(self) -> str:
        target, found = self.sparsity_target, [*self.state.found.values()]
        without, levels = self.state.left_out, target.by_target(found)
        updates = [(0, target.of_all(found, without))]
        share = sharing(self.scope, target)
        parameters = {each.name: each.parameter for each in found if each.name not in without}
        return plan(type(self).__name__, str(target), parameters, updates, "step", target.label, without, levels, share)

    @override
    def on_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters = list(pl_module.parameters())
        if any(map(is_lazy, parameters)):
            raise ValueError("the model must have no uninitialised parameters: run a batch through it before fit")
        if any(map(is_sharded, parameters)):
            raise ValueError(
                "the model must have whole parameters, got sharded ones: call prune(...) before fit, and add "
                "ConstantSparsity()"
            )
        self._find(pl_module)
        log_info(self.explain())

    def _find(self, pl_module: LightningModule) -> None:
        chosen = bool(self.masks)  # then all targets may be frozen
        found = self.sparsity_target.find(pl_module, self.targets, self.ignore, later=chosen)
        patterns = self.targets or tuple(self.sparsity if isinstance(self.sparsity, Mapping) else ())
        self.state.left_out = left_out(pl_module, patterns, self.ignore)
        if found and not self.granularity.coupled:  # coupled units are found, and their reasons told, in the first step
            units, without = self.granularity.find_units(found, pl_module)
            self.state.left_out.update({**without, **scorable(units, self.criterion)[1]})
        self.state.found = {target.name: target for target in found}

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.masks:
            self._find(pl_module)  # layers may have been unfrozen since the start
            check_targets(self, trainer)
            self.set_masks(trainer, pl_module, self._choose(trainer, pl_module, batch))

    def _choose(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Masks:
        model, example = _silent_copy(pl_module), pl_module.example_input_array
        if example is None and self.granularity.coupled:
            example = inputs_of_step(pl_module, batch)
        modes = [module.training for module in model.modules()]

        def loss(model: nn.Module, batch: Any) -> Tensor:
            for module, mode in zip(model.modules(), modes, strict=True):
                module.training = mode
            return (self.loss or _loss_of_a_step)(model, copy.deepcopy(batch))  # which may change it

        with trainer.precision_plugin.forward_context(), isolate_rng(), eager():
            return prune(
                model,
                self.sparsity,
                criterion=self.criterion,
                granularity=self.granularity,
                scope=self.scope,
                targets=self.targets,
                ignore=self.ignore,
                threshold=self.threshold,
                min_density=self.sparsity_target.min_density,
                data=[batch],
                loss=loss,
                rounds=self.rounds,
                example_inputs=inputs_of_step(pl_module, batch)
                if example is None and self.granularity.coupled
                else example,
                distributed=trainer.world_size > 1,
            )


def _silent_copy(pl_module: LightningModule) -> LightningModule:
    """Return a copy that logs nothing."""
    try:
        return silent_copy(pl_module)
    except Exception as error:  # of any type: whatever a user's attributes raise
        raise ValueError(
            f"the model must be one that copy.deepcopy can copy for PruningAtInit, got {type(pl_module).__name__} "
            f"({error}): call prune(...) before fit, and add ConstantSparsity()"
        ) from error


def _loss_of_a_step(model: Any, batch: Any) -> Tensor:
    """Return the loss that ``training_step`` returns for the first batch."""
    if not model.automatic_optimization:
        raise ValueError("loss must be given where training_step optimizes by hand, got None")
    if is_param_in_hook_signature(model.training_step, "dataloader_iter", explicit=True):
        raise ValueError("loss must be given where training_step takes a dataloader_iter, got None")
    index = (0,) if is_param_in_hook_signature(model.training_step, "batch_idx", min_args=2) else ()
    found = model.training_step(batch, *index)
    loss = found.get("loss") if isinstance(found, Mapping) else found
    if not isinstance(loss, Tensor):
        raise ValueError(f"loss must be given where training_step returns none, which returned {type(found).__name__}")
    return loss
