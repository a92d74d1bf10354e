"""Recalibration: re-estimates the running statistics of batch norms after pruning."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lightning_prune.models.preserving import evaluating
from lightning_prune.posttraining.calibration import batch_norms, forward, take
from lightning_prune.validation.arguments import integer
from lightning_prune.validation.instances import batches as iterable
from lightning_prune.validation.instances import instance
from lightning_prune.validation.values import optional


@torch.no_grad()
def recalibrate(model: nn.Module, loader: Iterable[Any], batches: int | None = None) -> None:
    """Re-estimate the running statistics of all batch norms as the plain average over some batches.

    Pruning changes the inputs of batch norms, but their running statistics are still those of the dense model. No
    weight changes. Everything but the batch norms runs in eval mode.

    Args:
        model: Any module; one without batch norms is left as it is.
        loader: Batches: inputs, or a tuple or list that begins with them.
        batches: How many batches to take; None takes all.

    Raises:
        ValueError: If there is no batch, or an argument is out of range.

    Reference: Li et al., 2020, "EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning",
        arXiv:2007.02491.

    >>> model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    >>> _ = nn.init.ones_(model[0].weight), nn.init.zeros_(model[0].bias)
    >>> recalibrate(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[3.0], [5.0]])])
    >>> model[1].running_mean
    tensor([3.])
    """
    instance("model", model, nn.Module)
    iterable("loader", loader)
    batches = optional(integer, "batches", batches, 1)
    norms = with_statistics(model)
    if not norms:
        return
    seen = 0
    with averaging(model, norms):
        for batch in take(loader, batches, model):
            forward(model, batch)
            seen += 1
    if not seen:
        raise ValueError("loader must yield at least one batch, got none")


def with_statistics(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms of a model that have running statistics.

    >>> len(with_statistics(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))))
    1
    """
    return [norm for norm in batch_norms(model) if norm.running_mean is not None]


@contextmanager
def averaging(model: nn.Module, norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Reset the statistics of batch norms at the first forward pass, and take the plain average of all passes."""
    momenta = [norm.momentum for norm in norms]
    handles: list[RemovableHandle] = []

    def reset(*_: Any) -> None:
        while handles:
            handles.pop().remove()
        for norm in norms:
            norm.reset_running_stats()

    with evaluating(model, norms):
        try:
            for norm in norms:
                norm.momentum = None  # a plain average
            handles.append(model.register_forward_pre_hook(reset))
            yield
        finally:
            while handles:
                handles.pop().remove()
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
