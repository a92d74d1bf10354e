"""History: the sparsity and the metrics of a run, by optimizer step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class History:
    """What a run has gone through.

    Attributes:
        sparsity: (optimizer step, fraction of zeros among the targets), each time that it changed.
        metrics: (optimizer step, value) by the name of the metric, each time that it was logged.

    >>> history = History()
    >>> history.add(10, {"val_acc": 0.9})
    >>> history.change(12, 0.5)
    >>> history
    History(sparsity=[(12, 0.5)], metrics={'val_acc': [(10, 0.9)]})
    """

    sparsity: list[tuple[int, float]] = field(default_factory=list)
    metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def change(self, step: int, level: float) -> None:
        """Note the sparsity from this step on, if it is another one."""
        if not self.sparsity or self.sparsity[-1][1] != level:
            _put(self.sparsity, step, level)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Note the values of metrics at this step."""
        for name, value in values.items():
            _put(self.metrics.setdefault(name, []), step, value)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON has it, with null for what is not finite."""
        metrics = {name: [[at, finite(value)] for at, value in values] for name, values in self.metrics.items()}
        return {"sparsity": [list(entry) for entry in self.sparsity], "metrics": metrics}


def finite(value: float) -> float | None:
    """Return a number as JSON has it: None where it is not finite.

    >>> finite(0.5), finite(float("nan"))
    (0.5, None)
    """
    return value if math.isfinite(value) else None


def _put(entries: list[tuple[int, float]], step: int, value: float) -> None:
    if entries and entries[-1][0] == step:  # what is logged later at a step is the newer
        entries.pop()
    entries.append((step, value))
