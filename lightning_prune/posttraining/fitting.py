"""Fitting: the weights that pruning leaves in a part of a model are fitted to what the dense part outputs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.models.forward import tensors
from lightning_prune.posttraining.batch_norms import averaging
from lightning_prune.posttraining.calibration import Stage
from lightning_prune.validation.arguments import integer, number
from lightning_prune.validation.instances import instance, settle

_RATES = (1.0, 0.1, 0.01)  # of the learning rate, one after another until one lowers the error


@dataclass(frozen=True)
class Reconstruction:
    """How the weights that are left are fitted to the outputs of the dense model, for ``prune(reconstruct=)``.

    Adam minimises the mean squared error of a block's outputs. A step takes one batch of the data, in an order that is
    the same for every run, and the learning rate falls linearly to zero. If the error on all of the data has not
    fallen at the end, the block starts again with a tenth of the learning rate, and once more with a hundredth; if it
    still has not, the block stays as it was.

    Args:
        steps: Optimizer steps for each block.
        lr: The first learning rate.

    Raises:
        ValueError: If an argument is out of range.

    Reference: Wagner et al., 2025, "A Free Lunch in LLM Compression: Revisiting Retraining after Pruning",
        arXiv:2510.14444.

    >>> Reconstruction(steps=200)
    Reconstruction(steps=200, lr=0.003)
    """

    steps: int = 40
    lr: float = 3e-3

    def __post_init__(self) -> None:
        """Check the arguments."""
        settle(self, steps=integer("steps", self.steps, 1), lr=number("lr", self.lr, "(0, inf)"))


def reconstruction_of(reconstruct: Any) -> Reconstruction | None:
    """Return how to reconstruct, if at all, from True, False or the settings themselves.

    Raises:
        TypeError: If it is neither.

    >>> reconstruction_of(False) is None, reconstruction_of(True) == Reconstruction()
    (True, True)
    """
    if isinstance(reconstruct, bool):
        return Reconstruction() if reconstruct else None
    return instance("reconstruct", reconstruct, Reconstruction)


def fit(
    stage: Stage,
    fitted: Mapping[nn.Parameter, Tensor | None],
    norms: Sequence[_BatchNorm],
    settings: Reconstruction,
) -> None:
    """Fit parameters of a part to its dense outputs, unless that does not lower its error.

    The statistics of batch norms are measured again first, if that lowers the error.

    Args:
        stage: The part, with its runs and dense outputs.
        fitted: The parameters, with masks of their dtype, 0 or 1: elements with 0 do not change. None lets all change.
        norms: Batch norms with running statistics.
        settings: Steps and learning rate.
    """
    state = [*fitted, *(buffer for norm in norms for buffer in norm.buffers())]
    best, kept = _error(stage), _copies(state)
    if norms:
        with suppress(ValueError), averaging(stage.part, norms):  # one value a channel has no variance
            for run in stage.runs:
                torch.no_grad()(run)()
        error = _error(stage)
        best, kept = (error, _copies(state)) if error < best else (best, kept)
    for part in _RATES:
        _set(state, kept)
        _train(stage, fitted, part * settings.lr, settings.steps)
        if _error(stage) < best:
            return
    _set(state, kept)


def _train(stage: Stage, fitted: Mapping[nn.Parameter, Tensor | None], lr: float, steps: int) -> None:
    order, parameters = _order(len(stage.runs)), list(fitted)
    held = {parameter: torch.empty_like(parameter.detach()) for parameter in parameters}
    optimizer = torch.optim.Adam(parameters, lr, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1.0 - step / steps)
        number = next(order)
        with torch.enable_grad():
            total, count = _squares(stage.runs[number](), stage.dense[number])
            if not total.requires_grad:  # no output depends on what is fitted
                break
            gradients = torch.autograd.grad(total / count, parameters, allow_unused=True)
        for (parameter, mask), gradient in zip(fitted.items(), gradients, strict=True):
            if gradient is None or mask is None:
                parameter.grad = gradient
            else:  # into memory of its own, which is much faster than new memory at every step
                parameter.grad = torch.mul(gradient, mask, out=held[parameter])
        optimizer.step()
    for parameter in parameters:
        parameter.grad = None


def _order(count: int) -> Iterator[int]:
    """Yield all numbers below a count again and again, each time in another order."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


@torch.no_grad()
def _error(stage: Stage) -> float:
    """Return the mean squared error of a part on all of the data."""
    found = [_squares(run(), dense) for run, dense in zip(stage.runs, stage.dense, strict=True)]
    return float(sum(total for total, _ in found)) / sum(count for _, count in found)


def _squares(output: Any, dense: Any) -> tuple[Tensor, int]:
    """Return the sum of the squared differences of two outputs, and of how many numbers it is."""
    both = zip(tensors(output), tensors(dense), strict=True)
    pairs = [(one, other) for one, other in both if other.is_floating_point()]
    total = sum(((one - other).square().sum() for one, other in pairs), torch.zeros(()))
    return total, max(1, sum(other.numel() for _, other in pairs))


def _copies(state: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in state]


@torch.no_grad()
def _set(state: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(state, values, strict=True):
        tensor.copy_(value)
