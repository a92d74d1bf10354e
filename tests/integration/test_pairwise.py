"""Pairwise coverage: every pair, few cases, the same ones in every process."""

from itertools import combinations
from typing import Any

import pytest
from pairwise import covering

AXES: list[dict[str, Any]] = [
    {"a": "xyz"},
    {"a": "xyz", "b": "12"},
    {"a": "uvwxyz", "b": "12", "c": "+-*"},
    {"a": range(11), "b": range(4), "c": range(7), "d": range(6)},
    {"a": range(16), "b": (True, False), "c": range(3)},
    {"a": [{}, {"k": 1}], "b": [[], [1]], "c": [None, 0, 0.5]},
]


@pytest.mark.parametrize("axes", AXES[1:], ids=lambda axes: "x".join(str(len(values)) for values in axes.values()))
def test_every_two_values_of_two_axes_meet_in_few_cases(axes: dict[str, Any]) -> None:
    cases = covering(axes)
    for one, other in combinations(axes, 2):
        assert all(any(case[one] == x and case[other] == y for case in cases) for x in axes[one] for y in axes[other])
    assert all(list(case) == list(axes) for case in cases)
    sizes = sorted((len(values) for values in axes.values()), reverse=True)
    assert sizes[0] * sizes[1] <= len(cases) <= 1.2 * sizes[0] * sizes[1] + 2
    assert cases == covering(axes)


def test_pairs_that_are_not_possible_are_left_out() -> None:
    axes = {"a": range(4), "b": range(4), "c": range(2)}

    def possible(case: dict[str, int]) -> bool:
        return case.get("a") != case.get("b")

    cases = covering(axes, possible)
    assert all(map(possible, cases))
    met = {(case["a"], case["b"]) for case in cases}
    assert met == {(a, b) for a in range(4) for b in range(4) if a != b}
    with pytest.raises(ValueError, match="possible must leave a value of 'c'"):
        covering(axes, lambda case: "c" not in case or len(case) == 2)


def test_cheap_values_take_the_place_of_those_that_meet_nothing_new() -> None:
    axes = {"a": range(6), "b": range(5), "c": ("slow", "quick")}

    def possible(case: dict[str, Any]) -> bool:
        return case.get("a") != 2 or case.get("c") != "quick"

    cases, plain = covering(axes, possible, {"c": "quick"}), covering(axes, possible)
    assert all(map(possible, cases))
    assert len(cases) == len(plain)
    for one, other in combinations(axes, 2):
        assert {(case[one], case[other]) for case in cases} == {(case[one], case[other]) for case in plain}
    assert [sum(case["c"] == "slow" for case in each) for each in (cases, plain)] == [10, 17]
