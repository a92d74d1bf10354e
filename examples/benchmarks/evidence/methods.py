"""The pruning methods by name: callbacks as a user would write them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning import Callback
from peers import PEERS
from shapes import PERMUTED, SHAPED, SHAPES
from torch import Tensor

from lightning_prune import (
    ACDC,
    ADMM,
    FPGM,
    NM,
    SET,
    SRSTE,
    APoZ,
    Channel,
    Criterion,
    EntropyPruning,
    Fisher,
    GraSP,
    LotteryTicket,
    MagnitudePruning,
    MovementPruning,
    Pruning,
    PruningAtInit,
    Random,
    RandomPruning,
    RigL,
    SensitivityPruning,
    SynFlow,
    Units,
    WandaPruning,
    Weight,
)

ROUNDS = 5
# each group is one panel of the figure; methods without a group prune a dense network by magnitude
GROUPS = {
    "sparse from the first step": ("RigL", "SET", "static", "SNIP", "GraSP", "SynFlow"),
    "other criteria": ("gradual, LAMP", "gradual, Fisher", "gradual, movement", "gradual, Wanda"),
}
HALFWAY: dict[str, Any] = {"schedule": "one_shot", "start": 0.5}
AT_START: dict[str, Any] = {"schedule": "one_shot", "start": 0}
NEURONS: dict[str, Any] = {"granularity": Channel(), "scope": "local", "ignore": ("network.head.*",), **HALFWAY}


HIDDEN: dict[str, Any] = {  # the first kernel of the CNN has one block, and few inputs: one of them stays
    "scope": "local",
    "min_density": 0.01,
    "ignore": ("network.head.*",),
}


class L2(Criterion):
    """The mean square of a unit's weights, which ranks the units of a layer like their L2 norms."""

    def scores(self, units: Units) -> Tensor:
        return units.mean(torch.square)


def random_weights(sparsity: float, seed: int, **options: Any) -> Callback:
    """Return a callback that prunes weights at random."""
    return Pruning(sparsity, criterion=Random(seed), granularity=Weight(), **options)


def shaped(name: str, sparsity: float, seed: int) -> Callback:
    """Return a callback that prunes the hidden layers in a shape."""
    return MagnitudePruning(sparsity, granularity=SHAPES[name], **HIDDEN)


def fine_tuning(sparsity: float, seed: int) -> Callback:
    """Return a callback with the rounds of ``LotteryTicket`` and no rewinding."""

    def due(progress: float) -> float:
        rounds = 1 + (ROUNDS - 1) * progress
        return (1 - (1 - sparsity) ** (rounds / ROUNDS)) / sparsity

    window: dict[str, Any] = {"start": 1 / (ROUNDS + 1), "end": ROUNDS / (ROUNDS + 1)}
    return MagnitudePruning(sparsity, schedule=due, interval="epoch", frequency=5, **window)


METHODS: dict[str, Callable[[float, int], Callback | None]] = {
    "dense": lambda sparsity, seed: None,
    "gradual": lambda sparsity, seed: MagnitudePruning(sparsity),
    "gradual, ERK": lambda sparsity, seed: MagnitudePruning(sparsity, scope="erk"),
    "gradual, uniform": lambda sparsity, seed: MagnitudePruning(sparsity, scope="local"),
    "one-shot": lambda sparsity, seed: MagnitudePruning(sparsity, **HALFWAY),
    "one-shot, random": lambda sparsity, seed: random_weights(sparsity, seed, **HALFWAY),
    "one-shot at start": lambda sparsity, seed: MagnitudePruning(sparsity, **AT_START),
    "one-shot at start, uniform": lambda sparsity, seed: MagnitudePruning(sparsity, scope="local", **AT_START),
    "one-shot at start, random": lambda sparsity, seed: random_weights(sparsity, seed, scope="local", **AT_START),
    "ACDC": lambda sparsity, seed: ACDC(sparsity),
    "ADMM": lambda sparsity, seed: ADMM(sparsity),
    "RigL": lambda sparsity, seed: RigL(sparsity, seed=seed),
    "RigL, uniform": lambda sparsity, seed: RigL(sparsity, seed=seed, scope="local"),
    "SET": lambda sparsity, seed: SET(sparsity, seed=seed),
    "static": lambda sparsity, seed: random_weights(sparsity, seed, scope="erk", **AT_START),
    "static, uniform": lambda sparsity, seed: random_weights(sparsity, seed, scope="local", **AT_START),
    "SNIP": lambda sparsity, seed: PruningAtInit(sparsity),
    "GraSP": lambda sparsity, seed: PruningAtInit(sparsity, GraSP()),
    "SynFlow": lambda sparsity, seed: PruningAtInit(sparsity, SynFlow(), rounds=100),
    "gradual, LAMP": lambda sparsity, seed: MagnitudePruning(sparsity, scope="lamp"),
    "gradual, Fisher": lambda sparsity, seed: Pruning(sparsity, criterion=Fisher()),
    "gradual, movement": lambda sparsity, seed: MovementPruning(sparsity),
    "gradual, Wanda": lambda sparsity, seed: WandaPruning(sparsity),
    "LotteryTicket": lambda sparsity, seed: LotteryTicket(sparsity, ROUNDS),
    "LotteryTicket, random": lambda sparsity, seed: LotteryTicket(sparsity, ROUNDS, "random", seed=seed),
    "LotteryTicket, learning rate": lambda sparsity, seed: LotteryTicket(sparsity, ROUNDS, "learning_rate"),
    "iterative fine-tuning": fine_tuning,
    "2:4, SRSTE": lambda sparsity, seed: SRSTE(2, 4),
    "2:4, gradual": lambda sparsity, seed: MagnitudePruning(sparsity, granularity=NM(2, 4)),
    "neurons, random": lambda sparsity, seed: RandomPruning(sparsity, seed=seed, **NEURONS),
    "neurons, L2": lambda sparsity, seed: Pruning(sparsity, criterion=L2(), **NEURONS),
    "neurons, FPGM": lambda sparsity, seed: Pruning(sparsity, criterion=FPGM(), **NEURONS),
    "neurons, APoZ": lambda sparsity, seed: Pruning(sparsity, criterion=APoZ(), **NEURONS),
    "neurons, Taylor": lambda sparsity, seed: SensitivityPruning(sparsity, **NEURONS),
    "neurons, entropy, low first": lambda sparsity, seed: EntropyPruning(sparsity, prune="low", **NEURONS),
    "neurons, entropy, high first": lambda sparsity, seed: EntropyPruning(sparsity, prune="high", **NEURONS),
    **{name: partial(shaped, name) for name in SHAPED},
    **{permuted: partial(shaped, name) for permuted, name in PERMUTED.items()},
    **PEERS,
}
