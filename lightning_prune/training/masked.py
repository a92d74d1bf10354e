"""Masked training: what every callback that trains under masks shares. It holds them, saves them and shows them."""

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.masks import Masks
from lightning_prune.models.parameters import named_parameters
from lightning_prune.tensors.boolean import count
from lightning_prune.tensors.distributed import (
    counts_here,
    full_tensor,
    is_sharded,
    local,
    local_shard,
    over_ranks,
    reshard,
)
from lightning_prune.tensors.masking import zero_pruned
from lightning_prune.tensors.packing import pack_all, unpack_all
from lightning_prune.training.compat import Callback
from lightning_prune.training.consistency import fitting, restore
from lightning_prune.training.enforcement import Holding, entrywise, forget_entries
from lightning_prune.training.gradient_readers import reads_after_backward, reads_before_step
from lightning_prune.training.judges import judges
from lightning_prune.training.representation import call_text
from lightning_prune.training.resumed_arguments import changes, listed, texts
from lightning_prune.validation import states
from lightning_prune.validation.arguments import flag, patterns

# below Lightning's logger, whose handlers and level it shares, and with a name of its own to be silenced by
_log = logging.getLogger("lightning.pytorch.lightning_prune")
_FLATTENING = ("FSDPStrategy", "DeepSpeedStrategy", "XLAStrategy")


class MaskedTraining(Callback):
    """The abstract base of the callbacks: a subclass decides on masks, this holds them.

    A subclass overrides ``begin`` (pick targets), ``before_step`` and ``advance`` (decide), and calls
    ``put_in_force`` with new masks.

    Args:
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out, in the same form.
        log_layers: Whether to log the sparsity of every target beside the total.

    Attributes:
        masks: Bool masks by qualified parameter name, True = kept; of a sharded parameter, of this rank's piece.
    """

    def __init__(self, targets: Sequence[str] = (), ignore: Sequence[str] = (), log_layers: bool = False) -> None:
        super().__init__()
        self.targets = patterns("targets", targets)
        self.ignore = patterns("ignore", ignore)
        self.log_layers = flag("log_layers", log_layers)
        self._holding = Holding()
        self._running: weakref.ref[nn.Module] | None = None  # the model of the run that a trainer is in, of any kind
        self.forget()

    @override
    def __repr__(self) -> str:
        return call_text(self)

    def forget(self) -> None:
        """Forget masks and everything else about a run, and let go of its model."""
        self._holding.release()
        self.masks = Masks()
        self._model: weakref.ref[nn.Module] | None = None
        self._restored = False
        self._steps = 0
        self._levels: dict[str, float] = {}
        self._sparsity_now = 0.0
        self._shown: tuple[int, dict[str, float]] | None = None  # the epoch, and what was logged in it
        self._reads = True, True  # whether others read gradients after a backward pass, and before a step
        self._before: Callable[[Optimizer], None] | None = None
        self._arguments: dict[str, str] | None = None  # those of a checkpoint, until training starts

    @property
    def sparsity_now(self) -> float:
        """The fraction of zeros, 0 to 1, among the weights of the targets at this moment, counted from the masks."""
        return self._sparsity_now

    @property
    def reached(self) -> bool:
        """Whether the masks are those that the callback aims at, so that what is judged now is what will be kept."""
        return True

    @property
    def settled(self) -> bool:
        """Whether what the masks prune is zero at this moment, as it is outside of straight-through steps."""
        return True

    @property
    @override
    def state_key(self) -> str:
        # the names tell several callbacks of one class apart; other arguments may change from run to run
        return self._generate_state_key(targets=self.targets, ignore=self.ignore)

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pick the targets and prepare; called once a fit, with model, optimizer and counters restored."""
        raise NotImplementedError

    def before_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Look at the gradients of an optimizer that is about to step: accumulated and reduced.

        Those of pruned weights may be masked by then, but where ``looks_at_pruned`` says so.
        """

    def looks_at_pruned(self, trainer: Trainer) -> bool:
        """Return whether ``before_step`` has to see the gradients of pruned weights in the coming step."""
        return False

    def stepped(self, optimizer: Optimizer) -> None:
        """Look at the weights of an optimizer that has just stepped, not yet masked; it may be called twice a step."""

    def after_step(self) -> None:
        """Count one training batch in which an optimizer has stepped."""

    def advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the masks up to date; called between optimizer steps, as often as Lightning gives occasion."""

    def chosen_by(self) -> tuple[str, ...]:
        """Return the names of the arguments by which masks are chosen: a checkpoint remembers them."""
        return ()

    def resume_with(self, changed: Mapping[str, str]) -> None:
        """Take up arguments of ``chosen_by`` that are others than in the checkpoint, or refuse them.

        Args:
            changed: Their names, and what they were, as text.

        Raises:
            ValueError: If the run cannot go on with them.
        """
        self._refuse_changes(changed, *changed)

    def _refuse_changes(self, changed: Mapping[str, str], *fixed: str) -> None:
        """Refuse changes of arguments that have to stay as they were."""
        if found := {name: text for name, text in changed.items() if name in fixed}:
            raise ValueError(
                f"arguments of {type(self).__name__} must be those of the checkpoint, whose masks follow from them, "
                f"got {listed(found, texts(self, found))}: give those, or begin a new run with the weights alone"
            )

    def explain(self) -> str:
        """Return what the callback does in this run, as text."""
        return f"{type(self).__name__}: {len(self.target_names())} parameters"

    def target_names(self) -> list[str]:
        """Return the names of the parameters whose zeros count as sparsity."""
        return list(self.masks)

    # ------------------------------------------------------------------------------------------------ masks

    def hidden(self) -> dict[str, Tensor]:
        """Return the weights, by parameter name, that are trained behind the masks: what the model has, without zeros.

        >>> MaskedTraining().hidden()
        {}
        """
        return {}

    def put_back(self) -> None:
        """Mask weights that another callback has put into the model, between two optimizer steps."""
        self._holding.apply()

    def put_in_force(self, trainer: Trainer, pl_module: nn.Module, masks: Masks) -> None:
        """Hold these masks from now on, on the model and on averaged copies of it."""
        if not self._sparsity_now and not all(mask.all() for mask in masks.values()):
            _announce_pruning(trainer, pl_module)
        parameters = named_parameters(pl_module)
        self._holding.hold(parameters, masks)
        for name, mask in masks.items() if masks is not self.masks else ():
            changed = mask ^ self.masks[name] if name in self.masks else ~mask
            for optimizer in trainer.optimizers if changed.any() else ():
                forget_entries(optimizer, parameters[name], changed)
        self.masks = masks
        mask_averages(trainer, masks)
        self._count(parameters)

    def _count(self, parameters: Mapping[str, nn.Parameter]) -> None:
        names = [name for name in self.target_names() if name in self.masks]
        several = any(is_sharded(parameters[name]) for name in names)
        found = [count(self.masks[n]) if not several or counts_here(parameters[n]) else 0 for n in names]
        counted = torch.tensor(found)
        kept: list[int] = (over_ranks(counted) if several else counted).tolist()
        total = sum(parameters[name].numel() for name in self.target_names())
        self._levels = {n: 1.0 - k / parameters[n].numel() for n, k in zip(names, kept, strict=True)}
        zeros = sum(parameters[n].numel() - k for n, k in zip(names, kept, strict=True))
        self._sparsity_now = zeros / total if total else 0.0

    def _place(self, pl_module: nn.Module) -> Masks:
        """Return the masks on the devices of their parameters, and restored ones in their pieces."""
        parameters = named_parameters(pl_module)
        if not self._restored:
            held = self._fitting(parameters)
            return Masks({name: mask.to(parameters[name].device) for name, mask in held.items()})
        for name, mask in self.masks.items():
            if name not in parameters or parameters[name].shape != mask.shape:
                found = tuple(parameters[name].shape) if name in parameters else "no parameter of that name"
                raise ValueError(
                    f"the model must have a parameter {name!r} of shape {tuple(mask.shape)}, as the checkpoint of "
                    f"{type(self).__name__} has a mask for it, got {found}"
                )
        return Masks(
            {
                n: local_shard(mask, parameters[n]).contiguous().to(parameters[n].device)
                for n, mask in self.masks.items()
            }
        )

    def _fitting(self, parameters: Mapping[str, nn.Parameter]) -> Masks:
        """Return the masks of parameters that the model still has, and warn of the others."""
        held = fitting(self.masks, parameters)
        if len(held) < len(self.masks):
            gone = [name for name in self.masks if name not in held]
            rank_zero_warn(
                f"{type(self).__name__} drops the masks of {gone[:5]}: the model has no parameter of that name and "
                f"shape any more"
            )
        return held

    def rebuild(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold the parameters that the model has now, since some are not those that were held."""
        self.masks = self._fitting(named_parameters(pl_module))
        self.put_in_force(trainer, pl_module, self.masks)

    # ------------------------------------------------------------------------------------------------ hooks

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        names = {cls.__name__ for cls in type(trainer.strategy).__mro__}
        if stage == "fit" and (found := names.intersection(_FLATTENING)):
            raise ValueError(
                f"strategy must leave parameters in their shape, got {found.pop()}, which flattens them: "
                f"use ModelParallelStrategy with fully_shard (FSDP2), or DDP"
            )
        if stage == "fit" and _trains_elsewhere(trainer):
            rank_zero_warn(
                f"{type(self).__name__} holds its masks in the processes that the strategy starts, and what comes back "
                f"is the weights and the logged metrics: count the zeros with sparsity(model), find the masks in a "
                f"checkpoint, and train on with ConstantSparsity()"
            )
        self._running = weakref.ref(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reshard(pl_module)
        if self._model is not None and self._model() is not pl_module:
            self.forget()  # the callback of an earlier run, now with another model
        self._model = weakref.ref(pl_module)
        self._shown = None
        steps = trainer.global_step if pl_module.automatic_optimization else self._steps
        # a step that was taken, and not yet counted when the checkpoint was saved
        missed = self._restored and self._steps < steps
        self._steps = steps
        self.masks = self._place(pl_module)
        if self._restored:
            restore(self, pl_module, self.masks, "in the checkpoint")
            if changed := changes(self._arguments, texts(self, self.chosen_by())):
                self.resume_with(changed)
        self._restored, self._arguments = False, None
        self.begin(trainer, pl_module)
        if missed:
            self.after_step()
        self._refuse_overlap(trainer)
        self._warn_of_judges(trainer)
        self._reads = reads_after_backward(trainer, pl_module), reads_before_step(trainer, pl_module)
        self._before = None if pl_module.automatic_optimization else partial(self._look, trainer)
        for optimizer in trainer.optimizers:
            self._holding.attach(optimizer, self._before, self.stepped)
        self.put_in_force(trainer, pl_module, self.masks)
        self.advance(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reshard(pl_module)
        parameters = named_parameters(pl_module)
        if not self._holding.holds([parameters.get(name) for name in self.masks]):  # layers have been replaced
            self.rebuild(trainer, pl_module)
        self.advance(trainer, pl_module)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._reads[0] and not self.looks_at_pruned(trainer):
            self._holding.mask_gradients()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._holding.attach(optimizer, self._before, self.stepped)
        if pl_module.automatic_optimization:
            self._look(trainer, optimizer)

    def _look(self, trainer: Trainer, optimizer: Optimizer) -> None:
        self.before_step(trainer, optimizer)
        # weights are masked after the step; gradients only where those of pruned entries would touch others
        if self._reads[1] or not entrywise(optimizer):
            self._holding.mask_gradients(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # with several optimizers global_step counts each of them, with raw ones none
        steps = trainer.global_step if pl_module.automatic_optimization else self._steps + self._holding.stepped
        self._holding.stepped = False
        if steps != self._steps:
            self._steps = steps
            self.after_step()
            self.advance(trainer, pl_module)
        self._show(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        restore(self, pl_module, self.masks, "when training ended")
        self._let_go(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go(pl_module)
        self._running = None

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go(pl_module)
        if stage == "fit" and self._model is not None:  # what other callbacks did when training ended
            restore(self, pl_module, self.masks, "after training")
        self._running = None

    def _let_go(self, pl_module: nn.Module) -> None:
        reshard(pl_module)
        self._holding.release()

    def _warn_of_judges(self, trainer: Trainer) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        waiting = next((c for c in callbacks if isinstance(c, MaskedTraining) and not c.reached), None)
        if waiting is self and (found := judges(trainer)):
            rank_zero_warn(
                f"{', '.join(dict.fromkeys(found))} may take the model for the best before {type(self).__name__} has "
                f"reached its target: use SparseModelCheckpoint and SparseEarlyStopping, which wait for it"
            )

    def _refuse_overlap(self, trainer: Trainer) -> None:
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, MaskedTraining) and other is not self:
                both = set(self.target_names()).intersection(other.target_names())
                if both:
                    names = f"{type(self).__name__} and in {type(other).__name__}"
                    raise ValueError(f"pruning callbacks must have disjoint targets, got {sorted(both)[:5]} in {names}")

    def _show(self, trainer: Trainer, pl_module: LightningModule) -> None:
        news = trainer.current_epoch, self._levels  # what was logged is shown, and logged, until the end of the epoch
        if news == self._shown:
            return
        self._shown = news
        pl_module.log(
            _metric(self, trainer), self.sparsity_now, prog_bar=True, on_step=True, on_epoch=False, batch_size=1
        )
        if self.log_layers:
            layers = {f"pruning/sparsity/{layer}": level for layer, level in self._levels.items()}
            pl_module.log_dict(layers, on_step=True, on_epoch=False, batch_size=1)

    # ------------------------------------------------------------------------------------------------ state

    @override
    def state_dict(self) -> dict[str, Any]:
        model = self._held_model()
        held = self.masks if model is None else fitting(self.masks, named_parameters(model))
        if model is not None and self.settled:
            restore(self, model, held, "when a checkpoint was saved")
        masks = {name: self._whole(name, mask) for name, mask in held.items()}
        levels = {name: level for name, level in self._levels.items() if name in held}
        arguments = self._arguments if self._restored else texts(self, self.chosen_by())
        found = {"version": 1, "steps": self._steps, "levels": levels, "masks": pack_all(masks)}
        return found if arguments is None else {**found, "arguments": arguments}

    def _held_model(self) -> nn.Module | None:
        """Return the model that the masks are placed on, with its parameters in pieces if they are sharded."""
        model = self._model() if self._model is not None and not self._restored else None
        if model is not None:
            reshard(model)
        return model

    def _whole(self, name: str, mask: Tensor) -> Tensor:
        model = self._held_model()
        return mask if model is None else full_tensor(mask, named_parameters(model)[name])

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._expect(state_dict, "steps", "levels", "masks")
        masks = unpack_all(state_dict["masks"])
        self.forget()
        self._model = self._running  # whose state it is; that of any model where the user loads it
        self.masks, self._restored, self._steps = Masks(masks), True, state_dict["steps"]
        self._arguments = state_dict.get("arguments")
        # counted again, so that they are those of the masks whatever the state says
        kept = {name: count(masks[name]) for name in state_dict["levels"]}
        self._levels = {name: 1.0 - kept[name] / max(1, masks[name].numel()) for name in kept}
        total = sum(masks[name].numel() for name in kept)
        self._sparsity_now = (total - sum(kept.values())) / max(1, total)

    def _expect(self, state_dict: dict[str, Any], *keys: str) -> None:
        """Refuse a damaged state; to be called before any of it is taken up."""
        states.check(type(self).__name__, state_dict, *keys)

    def __getstate__(self) -> dict[str, Any]:
        # a copy keeps what was decided, and nothing that is tied to this process or to the model
        state = {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}
        return {**state, "_holding": Holding(), "_model": None, "_running": None, "_before": None}


def _metric(callback: MaskedTraining, trainer: Trainer) -> str:
    """Return the name by which the sparsity of a callback is logged, another one for each."""
    others = [c for c in trainer.callbacks if isinstance(c, MaskedTraining) and c is not callback]  # type: ignore[attr-defined]
    if not others:
        return "pruning/sparsity"
    name, *taken = (",".join(c.targets) or type(c).__name__ for c in (callback, *others))
    return f"pruning/sparsity/{name}" + (f" but {','.join(callback.ignore)}" if name in taken else "")


def _trains_elsewhere(trainer: Trainer) -> bool:
    """Return whether the processes of the run end with it, so that callbacks do not come back (spawn, fork)."""
    launcher = getattr(trainer.strategy, "launcher", None)
    return any(cls.__name__ == "_MultiProcessingLauncher" for cls in type(launcher).__mro__)


def _announce_pruning(trainer: Trainer, pl_module: nn.Module) -> None:
    """Let callbacks with a hook ``on_before_pruning`` look at the model while it is dense."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hook := getattr(callback, "on_before_pruning", None):
            hook(trainer, pl_module)


@rank_zero_only
def tell(message: str) -> None:
    """Say what is going to happen, once for all ranks."""
    _log.info(message)


def gradient_scale(trainer: Trainer, optimizer: Optimizer) -> float:
    """Return what the gradients of an optimizer are multiplied by when it is about to step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)  # unscales inside its step
    return float(scaler.get_scale()) if scaler is not None and fused else 1.0


def mask_averages(trainer: Trainer, masks: Mapping[str, Tensor]) -> None:
    """Apply masks to the copies of the model that averaging callbacks keep."""
    for average in averages(trainer):
        copies = named_parameters(average)
        held = fitting(masks, copies)
        zero_pruned((local(copies[name]), mask.to(copies[name].device)) for name, mask in held.items())


def averages(trainer: Trainer) -> list[nn.Module]:
    """Return the copies of the model that averaging callbacks keep."""
    found = (getattr(callback, "_average_model", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return [getattr(model, "module", model) for model in found if isinstance(model, nn.Module)]
