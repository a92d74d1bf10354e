"""Schedules: functions from progress through the pruning window, 0 to 1, to the fraction of the target sparsity."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lightning_prune.validation.arguments import choice, integer, number, position, real
from lightning_prune.validation.instances import named, settle
from lightning_prune.validation.values import shown

Schedule = Callable[[float], float]
ScheduleName = Literal["one_shot", "linear", "cubic", "cosine", "exponential"]

_MAX_UPDATES = 1_000_000  # in a run


def one_shot(progress: float) -> float:
    """Return 1.0: prune to the target in one step, at the start of the window.

    >>> one_shot(0.0), one_shot(1.0)
    (1.0, 1.0)
    """
    return 1.0


def linear(progress: float) -> float:
    """Return the progress itself: prune at a constant rate.

    >>> linear(0.25)
    0.25
    """
    return progress


def cubic(progress: float) -> float:
    """Return ``1 - (1 - progress)**3``: fast at first, while the network can still recover, and slow at the end.

    Reference: Zhu and Gupta, 2017, "To prune, or not to prune", arXiv:1710.01878.

    >>> cubic(0.5)
    0.875
    """
    return 1.0 - (1.0 - progress) ** 3


def cosine(progress: float) -> float:
    """Return ``(1 - cos(pi * progress)) / 2``: slow at both ends of the window.

    >>> round(cosine(0.5), 6)
    0.5
    """
    return (1.0 - math.cos(math.pi * progress)) / 2.0


def exponential(progress: float) -> float:
    """Return ``(1 - exp(-5 * progress)) / (1 - exp(-5))``: the rate decays exponentially.

    >>> exponential(0.0), round(exponential(0.5), 3), exponential(1.0)
    (0.0, 0.924, 1.0)
    """
    return math.expm1(-5.0 * progress) / math.expm1(-5.0)


def after(done: float, sparsity: float) -> float:
    """Return the sparsity after a fraction of the rounds, each of which prunes the same share of the remaining weights.

    That is ``1 - (1 - sparsity)**done``.

    >>> [round(after(done, 0.99), 3) for done in (0.0, 0.5, 1.0)]
    [0.0, 0.9, 0.99]
    """
    return sparsity if done == 1.0 else 1.0 - (1.0 - sparsity) ** done


def begin_at(initial: float, sparsity: Any, schedule: Schedule) -> Schedule:
    """Return a schedule that starts at an initial sparsity, as in Zhu and Gupta.

    Raises:
        ValueError: If ``initial`` is not in [0, sparsity), or ``sparsity`` is not a single number.

    >>> [round(0.8 * begin_at(0.5, 0.8, linear)(progress), 3) for progress in (0.0, 0.5, 1.0)]
    [0.5, 0.65, 0.8]
    """
    initial = number("initial", initial, "[0, 1)")
    if initial and (isinstance(sparsity, Mapping) or sparsity is None or initial >= sparsity):
        raise ValueError(f"initial must be less than one sparsity for all targets, got {initial} for {sparsity}")
    return partial(_from_initial, schedule, initial / sparsity) if initial else schedule


def _from_initial(schedule: Schedule, least: float, progress: float) -> float:
    return least + (1.0 - least) * schedule(progress)


SCHEDULES: dict[str, Schedule] = {f.__name__: f for f in (one_shot, linear, cubic, cosine, exponential)}


def resolve(schedule: str | Schedule) -> Schedule:
    """Return the schedule of that name, or the callable itself if its first and last values are valid.

    Raises:
        ValueError: If the name is unknown, or the callable leaves [0, 1] or does not end at 1.
        TypeError: If it is neither a name nor such a callable.

    >>> resolve("linear")(0.5)
    0.5
    """
    found = named("schedule", schedule, SCHEDULES, "progress")
    first, last = value_at("schedule", found, 0.0), value_at("schedule", found, 1.0)
    if not 0.0 <= first <= 1.0 or not math.isclose(last, 1.0, abs_tol=1e-9):
        raise ValueError(f"schedule must map [0, 1] into [0, 1] and 1 to 1, got {first} at 0 and {last} at 1")
    return found


def value_at(argument: str, curve: Schedule, progress: float) -> float:
    """Return the value of a user's function of progress.

    Raises:
        TypeError: If it does not map numbers to numbers.

    >>> value_at("schedule", str, 0.5)
    Traceback (most recent call last):
    TypeError: schedule(0.5) must be a number, got the string '0.5'
    """
    try:
        found = curve(progress)
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{argument} must map numbers to numbers, got {shown(curve)}: {error}") from error
    return real(f"{argument}({progress:g})", found)


@dataclass(frozen=True)
class Horizon:
    """When pruning starts and ends, as given by the user.

    Args:
        start: First update: an int counts intervals, a float in [0, 1] is a fraction of the run.
        end: Last update, likewise.
        interval: What an int counts: "step" or "epoch".
        frequency: Intervals from one update to the next; None for about 100 updates over the window.

    Raises:
        ValueError: If an argument is out of range, or start lies after end.

    >>> Horizon(0.1, 20).window(100)
    (10, 20)
    """

    start: int | float
    end: int | float
    interval: str = "step"
    frequency: int | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        settle(self, start=position("start", self.start), end=position("end", self.end))
        settle(self, interval=choice("interval", self.interval, ("step", "epoch")))
        if self.frequency is not None:
            settle(self, frequency=integer("frequency", self.frequency, 1, unit=self.interval))
        if type(self.start) is type(self.end) and self.start > self.end:
            raise ValueError(f"start must not lie after end, got start={self.start} and end={self.end}")

    def window(self, length: float) -> tuple[int, int]:
        """Return the first and the last update, in intervals, of a run of this length.

        Raises:
            ValueError: If the length is unknown (infinite) for a fraction, or start lies after end.
        """
        start, end = (self._position(argument, length) for argument in ("start", "end"))
        if start > end:
            raise ValueError(
                f"start must not lie after end, got start={self.start} and end={self.end}, "
                f"which are the {self.interval}s {start} and {end} of {length:g}"
            )
        return start, end

    def _position(self, argument: str, length: float) -> int:
        value: int | float = getattr(self, argument)
        if isinstance(value, int):
            return value
        if math.isinf(length):
            raise ValueError(
                f"{argument} must be an int where the length of the run is unknown, got the fraction {value} "
                f"of an unlimited number of {self.interval}s{_WAY_OUT[self.interval]}"
            )
        return round(value * length)


# with a loader of unknown length, the number of epochs may still be known
_WAY_OUT = {"step": ': count epochs with interval="epoch", or limit the run by max_steps', "epoch": ": set max_epochs"}


def positions(first: int, last: int, every: int) -> range:
    """Return every ``every``-th position from the first on, without the last.

    Raises:
        ValueError: If there are more than a million.

    >>> list(positions(2, 7, 2))
    [2, 4, 6]
    """
    found = range(first, last, every)
    if last - first > _MAX_UPDATES * every:
        raise ValueError(f"frequency must leave at most {_MAX_UPDATES:,} updates, got {every} from {first} to {last}")
    return found


def updates(schedule: Schedule, start: int, end: int, frequency: int | None) -> list[tuple[int, float]]:
    """Return the mask updates of a run as ``(position, fraction of the target)``, in order.

    Positions are start, start + frequency, ... and always ``end``; those that do not change the fraction are left out.

    Args:
        schedule: Maps progress to the fraction of the target.
        start: First position, in steps or epochs.
        end: Last position; the fraction there is 1.
        frequency: Distance between updates; None spreads about 100 over the window, at least 1 apart.

    Raises:
        ValueError: If the schedule leaves [0, 1].

    >>> updates(linear, 2, 7, 2)
    [(4, 0.4), (6, 0.8), (7, 1.0)]
    >>> updates(one_shot, 2, 7, 2)
    [(2, 1.0)]
    """
    every = frequency or max(1, round((end - start) / 100))
    plan: list[tuple[int, float]] = []
    last_fraction = 0.0
    for at in [*positions(start, end, every), end]:
        fraction = 1.0 if at == end else value_at("schedule", schedule, (at - start) / (end - start))
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"schedule must stay in [0, 1], got {fraction} at {at}")
        if fraction != last_fraction:
            plan.append((at, fraction))
            last_fraction = fraction
    return plan
