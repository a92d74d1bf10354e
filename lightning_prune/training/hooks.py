"""Hooks: what a training method may override. ``MaskedTraining`` calls them; a method needs to know no more.

A run goes: ``on_start``; then, for every optimizer step, ``before_optimizer_step``, ``after_optimizer_step``, and, at
the end of its batch, ``after_batch`` and ``maybe_update``. ``set_masks`` sets new masks. What a method knows of a run
is declared once, as the dataclass in ``State``: it is reset, copied, saved and loaded from there.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.masks import Masks
from lightning_prune.training.compat import Callback
from lightning_prune.training.enforcement import MaskEnforcement
from lightning_prune.training.representation import call_text
from lightning_prune.training.resumed_arguments import reject_changes
from lightning_prune.training.state import RunState
from lightning_prune.validation.arguments import patterns
from lightning_prune.validation.instances import flag


class TrainingMethod(Callback):
    """The interface of the callbacks that train under masks: a subclass of ``MaskedTraining`` overrides what it needs.

    Args:
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out, in the same form.
        log_layers: Whether to log the sparsity of every target beside the total.

    Attributes:
        State: The dataclass of what a method knows of a run.
        state: What this callback knows of its run.
        enforcement: Keeps the parameters at the masks.
        max_epochs: That of the Trainer as the user has set it; other callbacks may raise it later.
        mask_arguments: The names of the arguments that masks follow from: they are part of checkpoints.
        not_given: The arguments of which the granularity has the default, and that were not given.
        normalized: Whether norms take their statistics over what the masks keep.
        trains_pruned: Whether pruned weights are trained behind the masks, so that their gradients are never masked.
    """

    State: ClassVar[type[RunState]] = RunState
    mask_arguments: ClassVar[tuple[str, ...]] = ()
    trains_pruned: ClassVar[bool] = False
    state: RunState
    max_epochs: int | None = None
    not_given: tuple[str, ...] = ()
    normalized: bool = False

    def __init__(self, targets: Sequence[str] = (), ignore: Sequence[str] = (), log_layers: bool = False) -> None:
        super().__init__()
        self.targets = patterns("targets", targets)
        self.ignore = patterns("ignore", ignore)
        self.log_layers = flag("log_layers", log_layers)
        self.enforcement = MaskEnforcement()
        self.state = self.State()

    # ------------------------------------------------------------------------------------------------ what is shown

    @override
    def __repr__(self) -> str:
        return call_text(self)

    @property
    def masks(self) -> Masks:
        """Bool masks by qualified parameter name, True = kept; of a sharded parameter, this rank's shard."""
        return self.state.masks

    @property
    def sparsity_now(self) -> float:
        """The fraction of zeros, 0 to 1, among the weights of the targets at this moment, counted from the masks."""
        return self.state.sparsity

    @property
    def reached(self) -> bool:
        """Whether the masks are those that the callback aims at, so that what is judged now is what will be kept."""
        return True

    @property
    @override
    def state_key(self) -> str:
        # the names tell several callbacks of one class apart; other arguments may change from run to run
        return self._generate_state_key(targets=self.targets, ignore=self.ignore)

    def explain(self) -> str:
        """Return what the callback does in this run, as text."""
        return f"{type(self).__name__}: {len(self.target_names())} parameters"

    def target_names(self) -> list[str]:
        """Return the names of the parameters whose zeros count as sparsity."""
        return list(self.masks)

    # ------------------------------------------------------------------------------------------------ a run

    def on_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pick the targets and prepare; called once a fit, with model, optimizer and counters restored."""
        raise NotImplementedError

    def before_optimizer_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Look at the gradients of an optimizer that is about to step: accumulated and reduced.

        Those of pruned weights may be masked by then, but where ``needs_dense_gradients`` says so.
        """

    def needs_dense_gradients(self, trainer: Trainer) -> bool:
        """Return whether ``before_optimizer_step`` has to see the gradients of pruned weights in the coming step."""
        return self.trains_pruned

    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        """Look at the weights of an optimizer that has just stepped, not yet masked; it may be called twice a step."""

    def after_batch(self) -> None:
        """Count one training batch in which an optimizer has stepped."""

    def maybe_update(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the masks up to date; called between optimizer steps, as often as Lightning gives occasion."""

    # ------------------------------------------------------------------------------------------------ resumed runs

    def resume_with(self, changed: Mapping[str, str]) -> None:
        """Accept ``mask_arguments`` that differ from those in the checkpoint, or reject them.

        Args:
            changed: Their names, and what they were, as text.

        Raises:
            ValueError: If the run cannot be resumed with them.
        """
        reject_changes(self, changed, *changed)

    # ------------------------------------------------------------------------------------------------ its weights

    def hidden_weights(self) -> dict[str, Tensor]:
        """Return the weights, by parameter name, that are trained behind the masks: what the model has, without zeros.

        >>> TrainingMethod().hidden_weights()
        {}
        """
        return {}

    def reapply_masks(self) -> None:
        """Mask weights that another callback has put into the model, between two optimizer steps."""
        self.enforcement.apply()

    def release(self, pl_module: nn.Module) -> None:
        """Remove every hook from the model and its optimizers, and apply the masks once more; idempotent."""
        self.state.release()
        self.enforcement.release()

    def reset(self) -> None:
        """Forget masks and everything else about a run, and let go of its model."""
        self.enforcement.release()
        self.state = self.State()

    def set_masks(self, trainer: Trainer, pl_module: LightningModule, masks: Masks) -> None:
        """Enforce these masks from now on, on the model and on averaged copies of it."""
        raise NotImplementedError


def training_methods(trainer: Trainer) -> list[TrainingMethod]:
    """Return the callbacks of a run that train under masks."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, TrainingMethod)]
