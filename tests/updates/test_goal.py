"""Goals: a sparsity, a sparsity per layer, or a threshold, and what each of them asks of the scores."""

import math
import re
from functools import partial
from typing import Any, Literal

import pytest
import torch
from models import MLP, fit
from torch import nn

from lightning_prune import MagnitudePruning, prune, scopes
from lightning_prune.criteria import Entropy, Magnitude
from lightning_prune.models.parameters import find
from lightning_prune.scopes import Scope
from lightning_prune.tensors.selection import Scores
from lightning_prune.updates.target_sparsity import Sparsity, SparsityTarget


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 2))


@pytest.mark.parametrize("sparsity", [0.0, 0, 0.5, 0.999999, {"*": 0.0}, {"0.*": 0.5, "*": 0.9}])
def test_a_sparsity_in_range_is_taken(sparsity: Sparsity) -> None:
    assert SparsityTarget(sparsity).sparsity == sparsity


@pytest.mark.parametrize("threshold", [0.0, 1e-3, -2.0, 5])
def test_a_threshold_is_taken(threshold: float) -> None:
    assert SparsityTarget(None, threshold).threshold == threshold


@pytest.mark.parametrize(
    ("sparsity", "threshold", "message"),
    [
        (None, None, "give either sparsity or threshold, got sparsity=None and threshold=None"),
        (0.5, 0.1, "give either sparsity or threshold, got sparsity=0.5 and threshold=0.1"),
        ({"*": 0.5}, 0.1, "give either sparsity or threshold"),
        (1.0, None, "sparsity must be in [0, 1), got 1.0"),
        (1, None, "sparsity must be in [0, 1), got 1"),
        (-0.1, None, "sparsity must be in [0, 1), got -0.1"),
        (95, None, "sparsity must be in [0, 1), got 95"),
        (math.nan, None, "sparsity must be in [0, 1), got nan"),
        (True, None, "sparsity must be in [0, 1), got True"),
        ("0.5", None, "sparsity must be in [0, 1), got the string '0.5'"),
        ({}, None, "sparsity must map at least one pattern to a fraction"),
        ({"a": 0.5, "b.*": 1.5}, None, "sparsity['b.*'] must be in [0, 1), got 1.5"),
        (None, math.nan, "threshold must be"),
    ],
)
def test_a_goal_that_is_none_is_refused(sparsity: Any, threshold: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SparsityTarget(sparsity, threshold)


# ------------------------------------------------------------------------------------------------ targets of a goal


@pytest.mark.parametrize(
    ("sparsity", "targets", "ignore", "expected"),
    [
        (0.5, (), (), ["0.weight", "2.weight"]),
        (None, (), (), ["0.weight", "2.weight"]),
        (0.5, ("2.*",), (), ["2.weight"]),
        ({"0.weight": 0.5}, (), (), ["0.weight"]),
        ({"*": 0.5}, (), ("0.*",), ["2.weight"]),
        ({"*": 0.5}, ("0.*",), (), ["0.weight"]),
        ({"0.*": 0.5}, ("*",), (), ["0.weight"]),
    ],
)
def test_targets(
    sparsity: Sparsity | None, targets: tuple[str, ...], ignore: tuple[str, ...], expected: list[str]
) -> None:
    assert [
        target.name for target in SparsityTarget(0.5 if sparsity is None else sparsity).find(net(), targets, ignore)
    ] == expected


def test_the_name_of_a_module_is_answered_with_its_pattern() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"^targets must match a parameter, got '0': did you mean '0\.\*'\?$"):
        prune(model, 0.5, targets=["0"])
    with pytest.raises(
        ValueError, match=r"^sparsity must hold patterns .*: each must match a parameter, got '1': did you"
    ):
        prune(model, {"1": 0.5})


def test_a_layer_pattern_that_matches_nothing_is_refused_with_close_names() -> None:
    with pytest.raises(ValueError, match=r"got '0\.wieght'; close names: \['0\.weight'"):
        SparsityTarget({"0.wieght": 0.5}).find(net())


def test_a_layer_pattern_to_which_earlier_ones_leave_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got '0\.\*', which matches none that an earlier pattern does not"):
        SparsityTarget({"*": 0.5, "0.*": 0.9}).find(net())


# ------------------------------------------------------------------------------------------------ allocation

SCORES = {"0.weight": torch.arange(10.0).view(5, 2), "2.weight": torch.arange(10.0, 20.0).view(2, 5)}


@pytest.mark.parametrize(
    ("sparsity", "scope", "due", "expected"),
    [
        (0.5, scopes.local, 1.0, {"0.weight": 5, "2.weight": 5}),
        (0.5, scopes.global_, 1.0, {"0.weight": 0, "2.weight": 10}),
        (0.6, scopes.global_, 0.5, {"0.weight": 4, "2.weight": 10}),  # 0.3 of 20 are due
        (0.6, scopes.local, 0.0, {"0.weight": 10, "2.weight": 10}),
        ({"0.*": 0.8, "*": 0.2}, scopes.global_, 1.0, {"0.weight": 2, "2.weight": 8}),
        ({"0.*": 0.8, "*": 0.2}, scopes.global_, 0.5, {"0.weight": 6, "2.weight": 9}),
    ],
)
def test_a_sparsity_becomes_units_to_keep(
    sparsity: Sparsity, scope: Scope, due: float, expected: dict[str, int]
) -> None:
    allocate = partial(
        SparsityTarget(sparsity).allocate, found=find(net()), criterion=Magnitude(), scope=scope, due=due
    )
    assert allocate(Scores.of(SCORES)) == expected


@pytest.mark.parametrize(
    ("due", "expected"),
    [(1.0, {"0.weight": 0, "2.weight": 8}), (0.5, {"0.weight": 4, "2.weight": 10})],  # 12 below, of which 6 are due
)
def test_a_threshold_becomes_units_to_keep(due: float, expected: dict[str, int]) -> None:
    allocate = partial(
        SparsityTarget(None, 12.0).allocate, found=find(net()), criterion=Magnitude(), scope=scopes.local, due=due
    )
    assert allocate(Scores.of(SCORES)) == expected


@pytest.mark.parametrize(
    ("prune", "threshold", "kept"),
    # entropies 0.5, 1, 1.5, 1; exactly at the threshold is neither above nor below it
    [("high", 1.0, 3), ("high", 0.9, 1), ("high", 2.0, 4), ("low", 1.0, 3), ("low", 1.2, 1), ("low", 0.1, 4)],
)
def test_a_threshold_on_entropy_is_a_bound_from_above_or_below(
    prune: Literal["high", "low"], threshold: float, kept: int
) -> None:
    entropies = torch.tensor([0.5, 1.0, 1.5, 1.0])
    scores = Scores.of({"w": -entropies if prune == "high" else entropies})
    allocate = partial(SparsityTarget(None, threshold).allocate, found=[], criterion=Entropy(prune), scope=scopes.local)
    assert allocate(scores) == {"w": kept}


def test_the_plan_of_a_sparsity_per_layer_says_what_each_pattern_gets() -> None:
    callback = MagnitudePruning({"net.0.*": 0.3, "net.*": 0.7}, schedule="one_shot", start=1)
    fit(MLP(), callback)
    plan = callback.explain()
    assert plan.startswith("MagnitudePruning to sparsity 0.3 of 'net.0.*', 0.7 of 'net.*': 3 parameters")
    assert plan.endswith("1 update, step (sparsity): 1 (57.8%)"), plan
    for name, level in (("net.0.weight", "30.0%"), ("net.4.weight", "70.0%"), ("net.6.weight", "70.0%")):
        assert re.search(rf"^  {name} .* {level}$", plan, re.MULTILINE)


def test_the_plan_of_a_threshold_says_what_each_update_prunes() -> None:
    callback = MagnitudePruning(threshold=0.1, schedule="linear", start=0, end=2, frequency=1)
    fit(MLP(), callback)
    last = callback.explain().splitlines()[-1]
    assert last == "2 updates, step (part of what is below the threshold): 1 (50.0%), 2 (100.0%)"
