"""A layer that comes out empty, or with one unit, is a warning, whatever the unit, in training and without."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from models import MLP, fit
from torch import nn

from lightning_prune import (
    SET,
    Block,
    Channel,
    Granularity,
    GuardedPruning,
    InputChannel,
    LotteryTicket,
    MagnitudePruning,
    Pruning,
    PruningAtInit,
    Weight,
    prune,
    sparsegpt,
)

UNITS: tuple[Granularity, ...] = (Weight(), Channel(), InputChannel(), Block(2, 2))


def weak(layer: int = 4) -> MLP:
    """Return a network whose layer in the middle has the least of all weights."""
    model = MLP(lr=1e-5)
    with torch.no_grad():
        model.net[layer].weight.mul_(1e-4)
    return model


def said(act: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        act()
    return [str(warning.message) for warning in seen if "hardly any signal" in str(warning.message)]


@pytest.mark.parametrize("granularity", UNITS, ids=lambda units: type(units).__name__)
def test_a_layer_that_training_leaves_empty_is_told_once(granularity: Granularity) -> None:
    window: dict[str, Any] = {"schedule": "linear", "start": 0, "end": 6, "frequency": 3}
    callback = Pruning(0.6, granularity=granularity, scope="global", min_density=0.0, **window)
    (message,) = [message for message in said(partial(fit, weak(), callback)) if "no unit" in message]
    assert not callback.masks["net.4.weight"].any()
    assert message.startswith("Pruning leaves no unit of ['net.4.weight']")


@pytest.mark.parametrize("granularity", UNITS, ids=lambda units: type(units).__name__)
def test_a_layer_that_prune_leaves_empty_is_told(granularity: Granularity) -> None:
    (message,) = said(partial(prune, weak(), 0.6, granularity=granularity, scope="global", min_density=0.0))
    assert message.startswith("prune leaves no unit of ['net.4.weight']")


def test_the_only_unit_of_a_layer_is_told_when_it_goes() -> None:
    model, other = (nn.Sequential(nn.Conv2d(1, 16, 3), nn.Flatten(), nn.Linear(576, 64)) for _ in range(2))
    blocks: dict[str, Any] = {"granularity": Block(16, 16), "scope": "local"}  # the kernel is one, of 16 x 9
    (message,) = said(partial(prune, model, 0.8, **blocks))
    assert message.startswith("prune leaves no unit of ['0.weight']: ")
    assert not model[0].weight.any()
    assert not said(partial(prune, other, 0.8, min_density=0.01, **blocks))
    assert other[0].weight.all()


def test_one_unit_is_told_and_then_none() -> None:
    window: dict[str, Any] = {"schedule": "linear", "start": 0, "end": 6, "frequency": 1}
    callback = Pruning(0.3, granularity=Channel(), scope="global", min_density=0.0, **window)
    found = said(partial(fit, Narrow(lr=1e-5), callback))
    assert [message.split(":")[0] for message in found] == [
        "Pruning leaves one unit of ['net.0.weight']",
        "Pruning leaves no unit of ['net.0.weight']",
    ]
    (message,) = said(partial(prune, Narrow(), {"*": 0.5}, granularity=Channel(), targets=("net.0.*",)))
    assert message.startswith("prune leaves one unit of ['net.0.weight']: ")


class Narrow(MLP):
    """Begins with two channels that are the first to go."""

    def build(self, dropout: float) -> nn.Sequential:
        net = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 6), nn.Linear(6, 3))
        with torch.no_grad():
            net[0].weight.mul_(1e-4)
        return net


@pytest.mark.parametrize(
    "callback",
    [
        partial(SET, 0.9, scope=lambda scores, sparsity: {n: 0 if "4" in n else s for n, s in scores.sizes.items()}),
        partial(LotteryTicket, 0.65, rounds=1),
        partial(PruningAtInit, 0.65, criterion=Pruning(0.5).criterion),
        partial(GuardedPruning, "val_loss", max_drop=10.0, sparsity=0.65, step=0.65, patience=1),
    ],
    ids=["SET", "LotteryTicket", "PruningAtInit", "GuardedPruning"],
)
def test_every_method_tells(callback: Callable[[], Any]) -> None:
    found = said(partial(fit, weak(), callback(), max_epochs=4))
    assert any("leaves no unit of ['net.4.weight']" in message for message in found)


def test_sparsegpt_tells() -> None:
    model, data = nn.Linear(6, 4), [torch.randn(8, 6)]
    assert said(partial(sparsegpt, model, 0.95, data=data))[0].startswith("sparsegpt leaves one unit of ['weight']: ")


def test_what_leaves_more_is_not_told() -> None:
    assert not said(partial(fit, MLP(), MagnitudePruning(0.5)))
    narrow = nn.Sequential(nn.Linear(6, 1, bias=False), nn.Linear(1, 6))
    assert not said(partial(prune, narrow, {"0.*": 0.0, "1.*": 0.5}, granularity=Channel()))  # it had no more before
