"""Divergence: how far the outputs of a model are from those that it gave when it was dense."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from lightning_prune.models.forward import tensors
from lightning_prune.posttraining.calibration import Stage

_CHUNK = 1 << 20  # numbers at a time, so that what is between stays in the cache


class Divergence:
    """The mean divergence of a model's outputs from the dense ones, for some batches of the data.

    Args:
        stage: The whole model, with its runs and its dense outputs.
        metric: Whether it is the Kullback-Leibler divergence of the softmax over the last dimension ("kl"), a mean over
            all other dimensions, or the mean squared error ("mse").

    Raises:
        ValueError: If an output is not one of logits, or the model was run but not called.
    """

    def __init__(self, stage: Stage, metric: Literal["kl", "mse"]) -> None:
        self._runs = stage.runs
        self._metric = metric
        self._dense = [[self._held(tensor) for tensor in _floating(outputs)] for outputs in stage.dense]
        if not all(self._dense):
            raise ValueError(
                "metric must be a function where the model does not return floating-point tensors, or loss does not "
                f"call the model as a whole, got {metric!r}"
            )

    def _held(self, dense: Tensor) -> Tensor:
        if self._metric == "kl" and (dense.ndim == 0 or dense.shape[-1] < 2):
            raise ValueError(
                f'metric must be "mse" or a function for outputs that are not logits, got "kl" for an output of shape '
                f"{tuple(dense.shape)}"
            )
        return (functional.log_softmax(_wide(dense), -1) if self._metric == "kl" else dense).contiguous().cpu()

    @torch.no_grad()
    def __call__(self, batches: Iterable[int]) -> float:
        """Return it for the batches of these numbers."""
        total, count = 0.0, 0
        for number in batches:
            for output, dense in zip(_floating(self._runs[number]()), self._dense[number], strict=True):
                rows, before = output.reshape(-1, output.shape[-1] if output.ndim else 1), dense.to(output.device)
                few = max(1, _CHUNK // max(1, rows.shape[-1]))
                pairs = zip(rows.split(few), before.view_as(rows).split(few), strict=True)
                total += sum(self._between(now, then) for now, then in pairs)
                count += len(rows) if self._metric == "kl" else rows.numel()
        return total / max(1, count)

    def _between(self, now: Tensor, before: Tensor) -> float:
        """Return the sum over some rows."""
        if self._metric == "kl":
            now = functional.log_softmax(_wide(now), -1)
            return float(functional.kl_div(now, before, reduction="sum", log_target=True))
        return float((_wide(now) - _wide(before)).square().sum())


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _floating(calls: Sequence[Any]) -> Iterator[Tensor]:
    """Yield the floating-point tensors of what each call of a model has returned; of one with ``logits``, these."""
    for output in calls:
        yield from (tensor for tensor in tensors(getattr(output, "logits", output)) if tensor.is_floating_point())
