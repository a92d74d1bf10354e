"""Readers: who reads gradients before an optimizer steps, as clipping does. Those of pruned weights must not count.

To mask gradients takes a pass over all weights in every step, which nothing needs where nobody reads them.
"""

from lightning.pytorch import LightningModule, Trainer

_PACKAGE = __name__.partition(".")[0]


def reads_after_backward(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Return whether gradients may be read between a backward pass and ``on_before_optimizer_step``."""
    # a step of the user's own may call the closure, clip, and step; and so may a manual training step
    own = overrides(pl_module, "optimizer_step") or not pl_module.automatic_optimization
    return own or _anybody(trainer, pl_module, "on_after_backward")


def reads_before_step(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Return whether gradients may be read in ``on_before_optimizer_step`` or later, before the step."""
    clips = bool(trainer.gradient_clip_val) or overrides(pl_module, "configure_gradient_clipping")
    return clips or _anybody(trainer, pl_module, "on_before_optimizer_step")


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
