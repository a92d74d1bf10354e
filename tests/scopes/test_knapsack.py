"""Knapsack: what is worth little and costs much goes first, and the goal is met whatever it is counted in."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune import Channel, Knapsack, LatencyTable, prune
from lightning_prune.models.flops import dense_flops
from lightning_prune.tensors.selection import Scores
from lightning_prune.updates.latency import LayerTime


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))


def table(first: float, second: float) -> LatencyTable:
    """Return a table in which the outputs of two layers cost so much."""
    costs = {"0.weight": first, "2.weight": second}
    layers = [LayerTime(name, (0, None), (0.0, ms, 0.0, 0.0)) for name, ms in costs.items()]
    return LatencyTable(tuple(layers), (0.0, 0.0), first + second, "Channel")


def kept(model: nn.Module) -> tuple[int, int]:
    return int(model[0].weight.any(1).sum()), int(model[2].weight.any(1).sum())


@pytest.mark.parametrize(("costs", "slow"), [((9.0, 1.0), 0), ((1.0, 9.0), 1)])
def test_of_what_is_equally_important_the_expensive_goes(costs: tuple[float, float], slow: int) -> None:
    model = network()
    for layer in (model[0], model[2]):
        nn.init.ones_(layer.weight)
    given: dict[str, Any] = {"granularity": Channel(coupled=True), "example_inputs": torch.zeros(2, 6)}
    prune(model, 0.45, of=table(*costs), scope=Knapsack(), **given)
    sizes, left = (16, 32), kept(model)
    assert left[1 - slow] == sizes[1 - slow]
    assert left[slow] == sizes[slow] // 2


def test_of_what_costs_the_same_the_unimportant_goes() -> None:
    scores = Scores.of({"a": torch.ones(8), "b": torch.tensor([1.0] * 4 + [100.0] * 4)})
    priced = Knapsack(8).priced(scores, lambda name, count: count, lambda keep: (keep["a"] + keep["b"]) / 16)
    assert priced(scores, 0.25) == {"a": 8, "b": 4}
    assert priced(scores, 0.0) == {"a": 8, "b": 8}
    assert priced(scores, 1.0) == {"a": 0, "b": 0}


def test_of_units_that_are_worth_nothing_no_more_go_than_it_takes() -> None:
    model = network()
    nn.init.zeros_(model[2].weight[:16])
    given: dict[str, Any] = {"granularity": Channel(coupled=True), "example_inputs": torch.zeros(2, 6)}
    prune(model, 0.1, of="flops", scope=Knapsack(), **given)
    one, two = kept(model)
    assert one == 16
    assert two == 16
    dead = int((model[4].weight == 0).all(0).sum())
    assert dead == 4  # with 2 x 16 + 2 x 3 FLOPs each, of 2 x (6 x 16 + 16 x 32 + 32 x 3)


def test_steps_that_save_nothing_are_taken_with_those_that_do() -> None:
    scores = Scores.of({"a": torch.ones(16), "b": torch.ones(16)})

    def left(keep: dict[str, int]) -> float:
        steps = {16: 10, 15: 8, 14: 8, 13: 8, 12: 8}  # then the first target gets faster with every unit
        return (steps.get(keep["a"], 0.5 * keep["a"]) + 1 + 0.01 * keep["b"]) / 11.16

    priced = Knapsack(16).priced(scores, lambda name, count: count, left)
    assert [priced(scores, part / 32) for part in (1, 5, 8)] == [{"a": 16 - n, "b": 16} for n in (1, 5, 8)]


@pytest.mark.parametrize(
    "of", ["units", "parameters", "flops", table(1.0, 2.0)], ids=["units", "params", "flops", "ms"]
)
@pytest.mark.parametrize("step", [1, 4])
def test_the_goal_is_met(of: Any, step: int) -> None:
    model, inputs = network(), torch.zeros(2, 6)
    channels = Channel(coupled=True, round_to=step)
    prune(model, 0.5, granularity=channels, of=of, scope=Knapsack(), example_inputs=inputs)
    one, two = kept(model)
    assert one % step == 0 == two % step
    dense = dense_flops(network(), inputs)
    left = {
        "units": (one + two) / 48,
        "parameters": (7 * one + (one + 1) * two + 3 * (two + 1)) / (7 * 16 + 17 * 32 + 3 * 33),
        "flops": 2 * 2 * (6 * one + one * two + two * 3) / sum(dense.values()),
    }
    found = left[of] if isinstance(of, str) else (one / 16 + 2 * two / 32) / 3
    assert 0.3 < found <= 0.5


def test_steps_are_at_least_one() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Knapsack(0)
