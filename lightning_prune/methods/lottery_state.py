"""Lottery state: what ``LotteryTicket`` knows of its run."""

import math
from dataclasses import dataclass, field
from typing import Any

from lightning_prune.methods.rewinding import MEMORY
from lightning_prune.training.scheduled_state import ScheduledState
from lightning_prune.training.state import saved
from lightning_prune.validation.states import optional, row, whole


@dataclass(eq=False)
class LotteryState(ScheduledState):
    """What ``LotteryTicket`` knows of its run.

    Attributes:
        memory: What is rewound to.
        moment: The optimizer step to go back to, resolved once.
        back: By how many intervals trainings are shorter than the first; 0 in states of earlier releases.
        again: At which step to go back once more, and to what.
        stop: When the ticket is trained, in intervals.
    """

    memory: dict[str, Any] | None = field(default=None, metadata=saved(optional(MEMORY)))
    moment: int | None = field(default=None, metadata=saved(optional(whole())))
    back: int | None = field(default=None, metadata=saved(optional(whole()), absent=0))
    again: tuple[int, dict[str, Any]] | None = field(
        default=None, metadata=saved(optional(row(whole(), MEMORY)), absent=None)
    )
    stop: float = math.inf
