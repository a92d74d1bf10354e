"""Schedules as functions, the window that start and end describe, and the updates that follow from both."""

import math
import re
from collections.abc import Callable
from itertools import pairwise

import pytest

from lightning_prune import schedules
from lightning_prune.schedules import SCHEDULES, Horizon, updates

# what each schedule asks for at 0, 1/4, 1/2, 3/4 and 1
EXPECTED = {
    "one_shot": [1.0, 1.0, 1.0, 1.0, 1.0],
    "linear": [0.0, 0.25, 0.5, 0.75, 1.0],
    "cubic": [0.0, 37 / 64, 7 / 8, 63 / 64, 1.0],  # 1 - (3/4)^3, 1 - (1/2)^3, 1 - (1/4)^3
    "cosine": [0.0, (2 - math.sqrt(2)) / 4, 0.5, (2 + math.sqrt(2)) / 4, 1.0],  # (1 - cos(pi/4)) / 2 and so on
    "exponential": [0.0, *((1 - math.exp(-5 * p)) / (1 - math.exp(-5)) for p in (0.25, 0.5, 0.75)), 1.0],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_values_of_every_schedule(name: str) -> None:
    schedule = schedules.resolve(name)
    assert [schedule(p / 4) for p in range(5)] == pytest.approx(EXPECTED[name])


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_ends_at_exactly_one_and_never_falls(name: str) -> None:
    values = [schedules.resolve(name)(p / 1000) for p in range(1001)]
    assert values[-1] == 1.0
    assert all(0.0 <= value <= 1.0 for value in values)
    assert values == sorted(values)


def test_exponential_leaves_a_constant_factor_of_what_is_left() -> None:
    left = [schedules.exponential(1.0) - schedules.exponential(p / 10) for p in range(8)]
    # up to a constant, what is left is exp(-5 p) - exp(-5)
    factors = [(b + 1 / math.expm1(5)) / (a + 1 / math.expm1(5)) for a, b in pairwise(left)]
    assert factors == pytest.approx([math.exp(-0.5)] * 7)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'cosine'.*'cubic'.*'exponential'.*'linear'.*'one_shot'.*got 'cubics'"):
        schedules.resolve("cubics")


@pytest.mark.parametrize("schedule", [math.sqrt, lambda p: 1.0, lambda p: 0.5 + p / 2, lambda p: p * (1 + 1e-12)])
def test_a_callable_is_taken_as_it_is(schedule: Callable[[float], float]) -> None:
    assert schedules.resolve(schedule) is schedule


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(lambda p: 0.9 * p, id="ends below 1"),
        pytest.param(lambda p: 2.0 * p, id="ends above 1"),
        pytest.param(lambda p: p - 0.5 + p / 2, id="begins below 0"),
        pytest.param(lambda p: 1.5 - p / 2, id="begins above 1"),
        pytest.param(lambda p: math.nan, id="is not a number"),
    ],
)
def test_a_callable_with_wrong_ends_is_refused(schedule: Callable[[float], float]) -> None:
    with pytest.raises(ValueError, match=r"schedule must map \[0, 1\] into \[0, 1\] and 1 to 1"):
        schedules.resolve(schedule)


# ------------------------------------------------------------------------------------------------ window


@pytest.mark.parametrize(
    ("start", "end", "length", "expected"),
    [
        (0, 0, 100, (0, 0)),
        (3, 40, 100, (3, 40)),
        (3, 40, math.inf, (3, 40)),
        (3, 400, 100, (3, 400)),  # a run that is too short is not this function's business
        (0.1, 0.7, 100, (10, 70)),
        (0.0, 1.0, 7, (0, 7)),
        (0.1, 20, 100, (10, 20)),
        (5, 1.0, 100, (5, 100)),
        (0.25, 0.25, 10, (2, 2)),
        (0.1, 0.7, 4, (0, 3)),
    ],
)
def test_window(start: float, end: float, length: float, expected: tuple[int, int]) -> None:
    window = Horizon(start, end).window(length)
    assert window == expected
    assert all(type(position) is int for position in window)


def test_the_smallest_frequency_is_one() -> None:
    assert Horizon(0, 5, frequency=1).frequency == 1


def test_one_as_int_is_the_first_interval_and_as_float_the_whole_run() -> None:
    assert Horizon(0, 1).window(50) == (0, 1)
    assert Horizon(0, 1.0).window(50) == (0, 50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": -1, "end": 5}, "start must be an int of at least 0 or a float in [0, 1], got -1"),
        ({"start": 0, "end": 1.5}, "end must be an int of at least 0 or a float in [0, 1], got 1.5"),
        ({"start": -0.1, "end": 0.5}, "start must be an int of at least 0 or a float in [0, 1], got -0.1"),
        ({"start": math.nan, "end": 0.5}, "start must be an int of at least 0 or a float in [0, 1], got nan"),
        ({"start": 6, "end": 5}, "start must not lie after end, got start=6 and end=5"),
        ({"start": 0.6, "end": 0.5}, "start must not lie after end, got start=0.6 and end=0.5"),
        ({"start": 0, "end": 5, "interval": "batch"}, 'interval must be "step" or "epoch", got \'batch\''),
        ({"start": 0, "end": 5, "frequency": 0}, "frequency must be at least 1 step, got 0"),
        (
            {"start": 0, "end": 5, "frequency": -2, "interval": "epoch"},
            "frequency must be at least 1 epoch, got -2",
        ),
    ],
)
def test_a_horizon_out_of_range_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Horizon(**arguments)  # type: ignore[arg-type]


def test_a_start_after_the_end_is_refused_once_the_length_is_known() -> None:
    horizon = Horizon(20, 0.5)
    assert horizon.window(40) == (20, 20)
    with pytest.raises(ValueError, match=r"start=20 and end=0\.5, which are the steps 20 and 15 of 30"):
        horizon.window(30)


@pytest.mark.parametrize(("start", "end", "named"), [(0.1, 20, "start"), (3, 0.7, "end")])
def test_a_fraction_of_an_unlimited_run_is_refused(start: float, end: float, named: str) -> None:
    with pytest.raises(ValueError, match=rf"{named} must be an int where the length of the run is unknown.*epochs"):
        Horizon(start, end, interval="epoch").window(math.inf)


# ------------------------------------------------------------------------------------------------ updates


@pytest.mark.parametrize(
    ("schedule", "start", "end", "frequency", "expected"),
    [
        # at the start nothing is due yet; the last update is at the end, whatever the frequency
        ("linear", 0, 4, 1, [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]),
        ("linear", 0, 5, 2, [(2, 0.4), (4, 0.8), (5, 1.0)]),
        ("linear", 10, 14, 3, [(13, 0.75), (14, 1.0)]),
        ("linear", 0, 4, 100, [(4, 1.0)]),
        ("cubic", 2, 4, 1, [(3, 0.875), (4, 1.0)]),
        # everything at the start, and nothing new afterwards
        ("one_shot", 3, 9, 2, [(3, 1.0)]),
        ("one_shot", 3, 9, None, [(3, 1.0)]),
        # a window of no length
        ("linear", 7, 7, None, [(7, 1.0)]),
        ("one_shot", 0, 0, 5, [(0, 1.0)]),
    ],
)
def test_updates(schedule: str, start: int, end: int, frequency: int | None, expected: list[tuple[int, float]]) -> None:
    assert updates(schedules.resolve(schedule), start, end, frequency) == expected


@pytest.mark.parametrize("start", [0, 7, 5000])
@pytest.mark.parametrize(
    ("length", "every", "count"),
    # without a frequency: about 100 updates, at least 1 apart
    [(50, 1, 50), (100, 1, 100), (149, 1, 149), (151, 2, 76), (1000, 10, 100), (123_456, 1235, 100)],
)
def test_no_frequency_spreads_about_a_hundred_updates(start: int, length: int, every: int, count: int) -> None:
    positions = [position for position, _ in updates(schedules.linear, start, start + length, None)]
    assert len(positions) == count
    assert positions[0] == start + every
    assert positions[-1] == start + length


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("frequency", [None, 1, 2, 3, 7, 50])
def test_the_last_update_is_at_the_end_and_complete(name: str, frequency: int | None) -> None:
    plan = updates(schedules.resolve(name), 5, 37, frequency)
    positions, fractions = zip(*plan, strict=True)
    assert fractions[-1] == 1.0
    assert positions[-1] == (5 if name == "one_shot" else 37)
    assert list(positions) == sorted(set(positions))
    assert list(fractions) == sorted(set(fractions))


def test_a_callable_that_ends_nearly_at_one_still_lands_on_one() -> None:
    plan = updates(schedules.resolve(lambda p: p * (1 - 1e-12)), 0, 2, 1)
    assert plan[-1] == (2, 1.0)


def test_steps_on_which_nothing_new_is_due_are_left_out() -> None:
    stairs = updates(lambda p: math.floor(2 * p) / 2, 0, 8, 1)
    assert stairs == [(4, 0.5), (8, 1.0)]


def test_a_schedule_that_leaves_its_range_in_between_is_refused_with_the_position() -> None:
    bump = schedules.resolve(lambda p: p + 4 * p * (1 - p))  # 0 at 0, 1 at 1, 1.5 in the middle
    with pytest.raises(ValueError, match=r"schedule must stay in \[0, 1\], got 1\.5 at 15"):
        updates(bump, 10, 20, 5)
