"""History: the sparsity and the metrics of a run, by optimizer step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_prune.validation.values import scalar


@dataclass
class History:
    """The sparsity and the metrics of a run.

    Attributes:
        sparsity: (optimizer step, fraction of zeros among the targets) at every change.
        metrics: (optimizer step, value) at every log, by the name of the metric.

    >>> history = History()
    >>> history.add(10, {"val_acc": 0.9})
    >>> history.change(12, 0.5)
    >>> history
    History(sparsity=[(12, 0.5)], metrics={'val_acc': [(10, 0.9)]})
    """

    sparsity: list[tuple[int, float]] = field(default_factory=list)
    metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def change(self, step: int, sparsity: float) -> None:
        """Record the sparsity from this step on, if it has changed."""
        if not self.sparsity or self.sparsity[-1][1] != sparsity:
            _put(self.sparsity, step, sparsity)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of metrics at this step."""
        for name, value in values.items():
            _put(self.metrics.setdefault(name, []), step, value)

    def as_json(self) -> dict[str, Any]:
        """Return the history as JSON, with null for values that are not finite."""
        found: dict[str, Any] = as_json({"sparsity": self.sparsity, "metrics": self.metrics})
        return found


def as_json(value: Any) -> Any:
    """Return a value as JSON: null for numbers that are not finite, and text for types that JSON lacks.

    >>> import torch
    >>> as_json({"levels": (0.5, float("nan")), "device": torch.device("cpu"), "count": torch.tensor(3)})
    {'levels': [0.5, None], 'device': 'cpu', 'count': 3}
    """
    if isinstance(value, Mapping):
        return {str(name): as_json(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(entry) for entry in value]
    found = scalar(value)
    if isinstance(found, float):
        return float(found) if math.isfinite(found) else None
    return found if isinstance(found, str | int | None) else str(found)


def _put(entries: list[tuple[int, float]], step: int, value: float) -> None:
    if entries and entries[-1][0] == step:  # the last value logged at a step wins
        entries.pop()
    entries.append((step, value))
