"""Gradient readers: who reads gradients before an optimizer steps, as clipping does. Pruned weights must not count.

To mask gradients takes a pass over all weights in every step, so it is done where somebody reads them only.
"""

from dataclasses import dataclass

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

_PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True)
class GradientReaders:
    """Whether anybody but the optimizer reads gradients in a run.

    Args:
        after_backward: Between a backward pass and ``on_before_optimizer_step``.
        before_step: In ``on_before_optimizer_step`` or later, before the step.
    """

    after_backward: bool = True
    before_step: bool = True

    @classmethod
    def of(cls, trainer: Trainer, pl_module: LightningModule) -> "GradientReaders":
        """Return the readers of a run: the model, the trainer's clipping, and callbacks of other packages."""
        # a step of the user's own may call the closure, clip, and step; and so may a manual training step
        own = overrides(pl_module, "optimizer_step") or not pl_module.automatic_optimization
        clips = bool(trainer.gradient_clip_val) or overrides(pl_module, "configure_gradient_clipping")
        return cls(
            own or _anybody(trainer, pl_module, "on_after_backward"),
            clips or _anybody(trainer, pl_module, "on_before_optimizer_step"),
        )


def may_repair(pl_module: LightningModule) -> bool:
    """Return whether the module may change gradients, such as zero those that are not finite, before a step."""
    return overrides(pl_module, "on_before_optimizer_step") or overrides(pl_module, "configure_gradient_clipping")


def overrides(owner: object, hook: str) -> bool:
    """Return whether an object has a hook of its own in place of the one that its root class defines.

    >>> overrides(LightningModule(), "on_after_backward")
    False
    """
    first = next(base for base in reversed(type(owner).__mro__) if hook in vars(base))
    found = getattr(owner, hook)
    return getattr(found, "__func__", found) is not vars(first)[hook]


def _anybody(trainer: Trainer, pl_module: LightningModule, hook: str) -> bool:
    """Return whether the module or a callback, other than those of this package, has this hook."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    others = [callback for callback in callbacks if type(callback).__module__.partition(".")[0] != _PACKAGE]
    return any(overrides(owner, hook) for owner in (pl_module, *others))


def gradient_scale(trainer: Trainer, optimizer: Optimizer) -> float:
    """Return what the gradients of an optimizer are multiplied by when it is about to step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)  # unscales inside its step
    return float(scaler.get_scale()) if scaler is not None and fused else 1.0
