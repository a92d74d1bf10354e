"""Replanning: a run that is resumed with other arguments follows a new plan from where it is."""

from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_warn

from lightning_prune.training.resumed_arguments import listed, texts
from lightning_prune.training.scheduled_state import ScheduledState

ARGUMENTS = (
    *("sparsity", "threshold", "criterion", "granularity", "scope", "min_density", "of"),
    *("start", "end", "interval", "frequency"),
)
_OBSERVED_BY = ("criterion", "granularity")
_TIMED_BY = ("granularity", "of")
_WINDOW_BY = ("start", "end", "interval")


def replan(owner: object, state: ScheduledState, changed: Mapping[str, str]) -> None:
    """Prepare the state of a resumed run for a new plan, and warn of it.

    Args:
        owner: The callback, with the arguments of now.
        state: Its restored state.
        changed: Names of the arguments that have changed, and what they were, as text.
    """
    drops = not changed.keys().isdisjoint(_OBSERVED_BY)
    rank_zero_warn(
        f"{type(owner).__name__} resumes with {listed(changed, texts(owner, changed))}: its updates are planned again"
        f"{', and the statistics of the checkpoint are dropped' if drops else ''}; pruned weights do not come back"
    )
    state.observed = None if drops else state.observed
    state.window = None if not changed.keys().isdisjoint(_WINDOW_BY) else state.window
    state.applied = -1 if "interval" in changed else state.applied
    state.latency = None if not changed.keys().isdisjoint(_TIMED_BY) else state.latency
    state.replanned = not changed.keys() <= {*_OBSERVED_BY, "scope"}


def catch_up(state: ScheduledState) -> None:
    """Make the last update of a new plan due, if all updates of the former plan have been made."""
    if state.replanned and state.updates:
        state.applied = min(state.applied, state.updates[-1][0] - 1)
    state.replanned = False
