"""Pruning without a ``Trainer``."""

from lightning_prune.posttraining.prune import prune

__all__ = ["prune"]
