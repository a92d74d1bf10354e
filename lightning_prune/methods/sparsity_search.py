"""Search: for the highest sparsity that a metric bears, one validation at a time."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_prune.validation.arguments import choice

FOUND = ("reference", "step", "level", "good", "bad", "waited", "last", "done", "settled")

Mode = Literal["max", "min"]
_LESS = {
    "loss",
    "losses",
    "error",
    "errors",
    "err",
    "perplexity",
    "ppl",
    "mse",
    "rmse",
    "mae",
    "mape",
    "nll",
    "wer",
    "cer",
}
_MORE = {"acc", "accuracy", "precision", "recall", "auc", "auroc", "iou", "miou", "bleu", "dice"}
_TURNED = {"neg", "negative", "minus", "inverse"}


def mode_of(monitor: str) -> Mode | None:
    """Return whether more ("max") or less ("min") of a metric is better, by the words of its name; None if unknown.

    >>> (
    ...     mode_of("valloss"),
    ...     mode_of("valid/MeanSquaredError"),
    ...     mode_of("val_acc"),
    ...     mode_of("neg_loss"),
    ...     mode_of("score"),
    ... )
    ('min', 'min', 'max', None, None)
    """
    words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", monitor)}
    less, more = bool(words & _LESS) or any(word.endswith("loss") for word in words), bool(words & _MORE)
    if less == more or words & _TURNED or monitor.startswith("-"):
        return None
    return "min" if less else "max"


def checked_mode(mode: Literal["max", "min"] | None, monitor: str) -> Mode:
    """Return whether more or less is better, as is said or as the name says.

    Raises:
        ValueError: If the two contradict each other.
    """
    named = mode_of(monitor)
    chosen: Mode = (named or "max") if mode is None else choice("mode", mode, ("max", "min"))
    if named is not None and named != chosen:
        raise ValueError(
            f'mode must be "{named}" for {monitor!r}, by its name, got {mode!r}: log it under another name'
        )
    return chosen


def settled(values: Sequence[float], mode: Mode, patience: int, margin: float) -> bool:
    """Return whether the last values are no better than the best before them, by more than a margin.

    Args:
        values: Those of a metric, in order.
        mode: Whether more ("max") or less ("min") of it is better.
        patience: How many values are the last ones.
        margin: What does not count as better.

    >>> settled([0.1, 0.5, 0.9], "max", 1, 0.01), settled([0.1, 0.5, 0.9, 0.905], "max", 1, 0.01)
    (False, True)
    """
    if len(values) <= patience:
        return False
    losses = [math.inf if math.isnan(v) else v if mode == "min" else -v for v in values]
    return min(losses[:-patience]) - min(losses[-patience:]) <= margin


def next_level(good: float, bad: float, ceiling: float, step: float, precision: float) -> tuple[float | None, float]:
    """Return the sparsity to try next, and the step that led there; None when none is left to try.

    A step that would lead to what was too much already is halved.

    Args:
        good: The highest sparsity that was borne.
        bad: The lowest that was not.
        ceiling: The highest to try.
        step: By how much to raise it.
        precision: The least step.

    >>> next_level(0.4, 1.0, 0.9, 0.2, 0.05)
    (0.6, 0.2)
    >>> next_level(0.8, 1.0, 0.9, 0.2, 0.05)
    (0.9, 0.2)
    >>> next_level(0.6, 0.8, 0.9, 0.2, 0.05)
    (0.7, 0.1)
    >>> next_level(0.7, 0.75, 0.9, 0.05, 0.05)
    (None, 0.025)
    """
    if good >= ceiling:
        return None, step
    while (level := min(round(good + step, 9), ceiling)) >= bad:  # rounded: 0.1 + 0.2 is 0.3
        step /= 2
        if step < precision:
            return None, step
    return level, step


@dataclass
class Search:
    """What is known so far, and what to do after each validation.

    Args:
        mode: Whether more ("max") or less ("min") of the metric is better.
        max_drop: By how much the metric may be worse than the reference.
        ceiling: The highest sparsity to try.
        step: By how much to raise it.
        precision: The least step.
        patience: How many validations a sparsity gets to come within the bound.
        reference: The value to hold; None is the first that is judged.

    Attributes:
        level: The sparsity that is judged next.
        good: The highest sparsity within the bound; None before the first.
        bad: The lowest that was given up.
        waited: How many validations it has been outside.
        last: Whether the best is on trial again, since nothing is left to try.
        done: Whether the search is over.
        settled: Whether it ended with a model within the bound.

    >>> search = Search("max", 0.01, 0.9, 0.5, 0.25, patience=1)
    >>> [(search.judge(value), search.level) for value in (0.90, 0.91, 0.80, 0.89)]
    [('keep', 0.5), ('keep', 0.9), ('back', 0.75), ('keep', 0.75)]
    >>> search.settled
    True
    """

    mode: Mode
    max_drop: float
    ceiling: float
    step: float
    precision: float
    patience: int
    reference: float | None = None
    level: float = 0.0
    good: float | None = None
    bad: float = 1.0
    waited: int = 0
    last: bool = False
    done: bool = False
    settled: bool = False

    def found(self) -> dict[str, Any]:
        """Return what the search has found so far; the rest are arguments, which a resumed run may change.

        >>> Search("max", 0.01, 0.9, 0.5, 0.25, patience=1).found()["level"]
        0.0
        """
        return {name: getattr(self, name) for name in FOUND}

    def judge(self, value: float) -> Literal["keep", "wait", "back"]:
        """Take the metric of the model at ``level``; afterwards ``level`` is what to try next.

        Returns:
            Whether the model is to be kept as the best so far, to be given more time, or to be given up for the best.

        Raises:
            ValueError: If the reference is not finite.
        """
        if self.reference is None:
            if not math.isfinite(value):
                raise ValueError(f"the metric that is to be held must be finite, got {value}")
            self.reference = value
        if self.holds(value):
            return self._keep()
        self.waited += 1
        if self.good is None or self.waited < self.patience:  # the dense model gets all the time it needs
            return "wait"
        return self._give_up(self.good)

    def holds(self, value: float) -> bool:
        """Return whether a value is within the bound; what is not finite never is."""
        return math.isfinite(value) and self._worse(value) <= self.max_drop + 1e-9  # 0.9 - 0.89 is more than 0.01

    def outgrows(self, value: float) -> bool:
        """Return whether a value is so much better that the reference must be that of a model in training."""
        assert self.reference is not None
        return math.isfinite(value) and -self._worse(value) > max(self.max_drop, 0.1 * abs(self.reference))

    def _worse(self, value: float) -> float:
        assert self.reference is not None
        return self.reference - value if self.mode == "max" else value - self.reference

    def _keep(self) -> Literal["keep"]:
        self.good, self.waited = self.level, 0
        level, self.step = next_level(self.good, self.bad, self.ceiling, self.step, self.precision)
        if level is None or self.last:
            self.done = self.settled = True
        else:
            self.level = level
        return "keep"

    def _give_up(self, good: float) -> Literal["back"]:
        self.waited = 0
        if self.last:
            self.done = True
            return "back"
        self.bad = self.level
        level, self.step = next_level(good, self.bad, self.ceiling, self.step, self.precision)
        self.last = level is None
        self.level = good if level is None else level
        return "back"
