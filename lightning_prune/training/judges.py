"""Judges: callbacks that keep or stop a run by a metric, and do not know how sparse the model is to become."""

from typing import Any

from lightning.pytorch import Trainer


def judges(trainer: Trainer) -> list[str]:
    """Return the names of the callbacks, of either namespace, that may take the dense model for the best.

    Those that wait for the target sparsity are none: their class says so by ``waits_for_target``.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [type(callback).__name__ for callback in callbacks if _judges(callback)]


def _judges(callback: Any) -> bool:
    names = {cls.__name__ for cls in type(callback).__mro__}
    if getattr(type(callback), "waits_for_target", False):
        return False
    keeps_best = "ModelCheckpoint" in names and callback.monitor is not None and callback.save_top_k > 0
    return keeps_best or "EarlyStopping" in names
