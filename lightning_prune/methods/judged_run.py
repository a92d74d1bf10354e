"""Judged run: the metric that a run is judged by, the verdicts, and the run as it was when one was good."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_prune.masks import Masks
from lightning_prune.methods import rewinding
from lightning_prune.methods.sparsity_search import Search
from lightning_prune.models.parameters import named_parameters
from lightning_prune.tensors.packing import pack_all, unpack_all
from lightning_prune.training.consistency import fitting
from lightning_prune.training.hooks import TrainingMethod, training_methods


def monitored(trainer: Trainer, monitor: str) -> float:
    """Return a metric that validation logs, the same on all ranks.

    Raises:
        ValueError: If it logs no metric of that name.
    """
    logged = trainer.callback_metrics
    if monitor not in logged:
        raise ValueError(f"monitor must be a metric that validation logs, got {monitor!r}: {sorted(logged)}")
    return float(trainer.strategy.reduce(logged[monitor].detach().clone(), reduce_op="mean"))


def verdict_text(monitor: str, before: Search, after: Search, value: float, verdict: str) -> str:
    """Return what was judged, against which bound, what was decided, and what comes next.

    Args:
        monitor: The name of the metric.
        before: The search before the verdict, at the sparsity that was judged.
        after: The search after it.
        value: The value of the metric.
        verdict: "keep", "wait" or "back".

    >>> from dataclasses import replace
    >>> search = Search("max", 0.01, 0.9, 0.2, 0.01, patience=3)
    >>> before = replace(search)
    >>> verdict_text("val_acc", before, search, 0.85, search.judge(0.85))
    'sparsity 0.0%, val_acc 0.85 is the reference (bound: at least 0.84): kept, 20.0% is next'
    """
    assert after.reference is not None
    bound = after.reference + (after.max_drop if after.mode == "min" else -after.max_drop)
    is_reference = before.reference is None and value == after.reference
    rule = (
        f"{'is the reference ' * is_reference}(bound: {'at most' if after.mode == 'min' else 'at least'} {bound:.6g})"
    )
    return f"sparsity {before.level:.1%}, {monitor} {value:.6g} {rule}: {_decision(before, after, verdict)}"


def _decision(before: Search, after: Search, verdict: str) -> str:
    if verdict == "wait":
        until = "" if after.good is None else f", {after.waited} of {after.patience} validations"
        return f"outside, it is trained further{until}"
    ends = "the search is over"
    if verdict == "keep":
        return f"kept, {ends if after.done else f'{after.level:.1%} is next'}"
    back = f"outside, back to {after.good or 0.0:.1%}"
    if after.last:
        return f"{back}, {ends if after.done else 'which is validated once more'}"
    return f"{back}, {after.level:.1%} is next"


def remember_run(trainer: Trainer, model: LightningModule, owner: TrainingMethod) -> dict[str, Any]:
    """Return what ``rewinding.remember`` does, with the masks of the owner and of all other pruning callbacks."""
    with torch.inference_mode(False):
        memory = rewinding.remember(trainer, model)
    masks = {callback.state_key: pack_all(callback.masks) for callback in training_methods(trainer)}
    return {**memory, "masks": masks.pop(owner.state_key), "others": masks}


def go_back_in_run(trainer: Trainer, model: LightningModule, owner: TrainingMethod, memory: dict[str, Any]) -> None:
    """Put everything back that ``remember_run`` returned."""
    parameters = named_parameters(model)
    packed = {owner.state_key: memory["masks"], **memory.get("others", {})}
    for callback in training_methods(trainer):
        if callback.state_key in packed:
            masks = fitting(unpack_all(packed[callback.state_key]), parameters).items()
            callback.set_masks(trainer, model, Masks({name: m.to(parameters[name].device) for name, m in masks}))
    # afterwards, since the optimizers' state of elements that come back is reset
    rewinding.go_back(trainer, model, memory)
