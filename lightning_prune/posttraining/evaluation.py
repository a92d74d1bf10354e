"""Evaluation: scores a model by the user's metric, and restores it afterwards."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_prune.models.preserving import keeping_gradients, keeping_modes
from lightning_prune.validation.arguments import real
from lightning_prune.validation.instances import batches, function
from lightning_prune.validation.values import shown

Metric = str | Callable[[nn.Module, Any], float]


def loader_of(data: Any) -> Iterable[Any] | None:
    """Return the loader, or None if a Trainer was given."""
    return None if hasattr(data, "validate") and not isinstance(data, type) else batches("data", data)


def evaluation(model: nn.Module, data: Any, metric: Metric, dataloaders: Any) -> Callable[[], float]:
    """Return a function that scores the current model.

    Raises:
        ValueError: If the metric does not fit the data: a name for a Trainer, a function for a loader.
    """
    if loader_of(data) is None:
        if not isinstance(metric, str):
            raise ValueError(
                f"metric must be the name of a metric that the Trainer's validation logs, got {shown(metric)}"
            )
        return lambda: _validate(model, data, metric, dataloaders)
    if isinstance(metric, str):
        raise ValueError(f"metric must be a function of model and loader if no Trainer is given, got {metric!r}")
    score = function("metric", metric, "model", "loader")

    def evaluate() -> float:
        model.eval()
        with torch.no_grad():
            found: Any = score(model, data)
            return real("the result of metric", found.squeeze() if isinstance(found, Tensor) else found)

    return evaluate


def _validate(model: nn.Module, trainer: Any, metric: str, dataloaders: Any) -> float:
    logged = {
        name: value for result in trainer.validate(model, dataloaders, verbose=False) for name, value in result.items()
    }
    if metric not in logged:
        raise ValueError(f"metric must be one that validation logs, got {metric!r}; validation logs {sorted(logged)}")
    return float(logged[metric])


@contextmanager
def restoring(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Yield a function that restores parameters and buffers; on exit restore them, modes and gradients."""
    saved = {name: tensor.detach().clone() for name, tensor in tensors_of(model)}

    @torch.no_grad()
    def restore() -> None:
        for name, tensor in tensors_of(model):
            tensor.copy_(saved[name])

    with keeping_modes(model), keeping_gradients(model):
        try:
            yield restore
        finally:
            restore()


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the initialised parameters and buffers by name."""
    yield from (entry for entry in model.named_parameters() if not is_lazy(entry[1]))
    yield from (entry for entry in model.named_buffers() if not is_lazy(entry[1]))
