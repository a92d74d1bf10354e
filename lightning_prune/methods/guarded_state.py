"""Guarded state: what ``GuardedPruning`` knows of its run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import override

from lightning_prune.methods.rewinding import MEMORY
from lightning_prune.training.scheduled_state import ScheduledState
from lightning_prune.training.state import saved
from lightning_prune.validation.states import (
    FLAG,
    FRACTION,
    MASKS,
    NUMBER,
    every,
    is_number,
    items,
    one,
    optional,
    record,
    row,
    whole,
)

_SEARCH = record(
    reference=optional(NUMBER),
    step=one("a number in (0, 1)", lambda value: is_number(value) and 0 < value < 1),
    level=FRACTION,
    good=optional(FRACTION),
    bad=FRACTION,
    waited=whole(),
    last=FLAG,
    done=FLAG,
    settled=FLAG,
)


def _lists(name: str) -> Callable[["GuardedState"], list[list[Any]]]:
    return lambda state: [list(entry) for entry in getattr(state, name)]


def _tuples(entries: list[list[Any]]) -> list[Any]:
    return [tuple(entry) for entry in entries]


@dataclass(eq=False)
class GuardedState(ScheduledState):
    """What ``GuardedPruning`` knows of its run.

    Attributes:
        search: What the search has found; None before the first validation that counts.
        planned: All updates so far, and one that is due.
        best: The best model within the bound, with the masks of all callbacks.
        back_at: The optimizer step at which to go back to it.
        validations: Number of validations that count.
        settling: The metric in the validations that were waited for it to settle.
        trials: What was judged.
        outgrown: Whether the metric has become much better than the reference.
    """

    search: dict[str, Any] | None = field(default=None, metadata=saved(optional(_SEARCH)))
    planned: list[tuple[int, float]] = field(
        default_factory=list, metadata=saved(items(row(whole(), FRACTION)), save=_lists("planned"), load=_tuples)
    )
    best: dict[str, Any] | None = field(
        default=None, metadata=saved(optional(every(MEMORY, record(masks=MASKS, steps=whole()))))
    )
    back_at: int | None = field(default=None, metadata=saved(optional(whole())))
    validations: int = field(default=0, metadata=saved(whole()))
    settling: list[float] = field(
        default_factory=list,
        metadata=saved(items(NUMBER), save=lambda state: list(state.settling), load=list, absent=()),
    )
    trials: list[tuple[int, float, float, bool]] = field(
        default_factory=list,
        metadata=saved(items(row(whole(), FRACTION, NUMBER, FLAG)), save=_lists("trials"), load=_tuples),
    )
    outgrown: bool = False

    @classmethod
    @override
    def last_position(cls, values: Mapping[str, Any]) -> int:
        return max([super().last_position(values), *(int(position) for position, _ in values["planned"])])
