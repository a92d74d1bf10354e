"""Every variant of every axis: a new one is tested by the whole matrix as soon as its name stands here."""

import math
from collections.abc import Callable, Mapping
from functools import partial

from lightning_prune import (
    ACDC,
    ADMM,
    FPGM,
    LAMP,
    NM,
    OWL,
    SET,
    SNIP,
    SRSTE,
    ActivationNorm,
    APoZ,
    Block,
    BlockInfluence,
    Channel,
    Criterion,
    Entropy,
    Fisher,
    Granularity,
    GraSP,
    Head,
    Knapsack,
    LotteryTicket,
    Magnitude,
    Movement,
    PruningAtInit,
    Random,
    RigL,
    Sensitivity,
    SharedFanIn,
    SynFlow,
    Wanda,
    Weight,
)
from lightning_prune.training.masked import MaskedTraining


def at_least(scores: Mapping, sparsity: float) -> dict[str, int]:
    """A user's scope: the same fraction of every target, rounded so that rather more is kept."""
    return {name: math.ceil((1 - sparsity) * count) for name, count in scores.sizes.items()}


def square_root(progress: float) -> float:
    """A user's schedule."""
    return progress**0.5


CRITERIA: tuple[Criterion, ...] = (
    *(Magnitude(), Random(seed=3), LAMP(), FPGM()),
    *(Entropy(bins=8, window=2), Wanda(window=2), APoZ(window=2)),
    *(Sensitivity(window=2), Movement(window=2), SNIP(window=1), Fisher(window=2)),
)
GRANULARITIES: tuple[Granularity, ...] = (Weight(), Channel(), NM(7, 10), Block(2, 2), SharedFanIn(2))
COUPLED: tuple[Granularity, ...] = (Channel(coupled=True), Head())  # units that lie in several parameters
# criteria that score whole blocks, for granularity=Layer()
OF_LAYERS: tuple[Criterion, ...] = (BlockInfluence(window=2), Magnitude(), Random(seed=3), Sensitivity(window=2))
# criteria that score the channels of a residual stream, for granularity=ResidualChannel()
OF_STREAMS: tuple[Criterion, ...] = (ActivationNorm(window=2), Magnitude(), Random(seed=3), Sensitivity(window=2))

SCOPES: tuple[str | dict[str, float] | Callable, ...] = (
    "global",
    "local",
    "erk",
    "lamp",
    OWL(outliers=1.5, spread=0.2),
    Knapsack(steps=4),
    {"net.0.*": 0.3, "net.*": 0.7},
    at_least,
)
SCHEDULES: tuple[str | Callable, ...] = ("one_shot", "linear", "cubic", "cosine", "exponential", square_root)
# whole methods, each for a run of about nine steps, and ending with half of the weights
METHODS: dict[str, partial[MaskedTraining]] = {
    "ACDC": partial(ACDC, 0.5, start=1, end=6, frequency=1),
    "ACDC-epochs": partial(ACDC, 0.5, start=0, end=2, frequency=1, interval="epoch"),
    "ADMM": partial(ADMM, 0.5, penalty=0.3, end=6, frequency=2),
    "ADMM-epochs": partial(ADMM, 0.5, schedule="cubic", start=0, end=2, frequency=1, interval="epoch"),
    "SET": partial(SET, 0.5, frequency=2),
    "SET-epochs": partial(SET, 0.5, scope="local", interval="epoch", end=1.0),
    "SRSTE": partial(SRSTE, 2, 4),
    "SRSTE-plain": partial(SRSTE, 1, 2, decay=0.0),
    "RigL": partial(RigL, 0.5, frequency=2),
    "RigL-shared": partial(RigL, 0.5, frequency=2, scope="local", granularity=SharedFanIn(2)),
    "LotteryTicket": partial(LotteryTicket, 0.5, rounds=2),
    "LotteryTicket-steps": partial(LotteryTicket, 0.5, rounds=3, rewind_to=1, frequency=2, interval="step"),
    "LotteryTicket-rate": partial(LotteryTicket, 0.5, rounds=2, rewind="learning_rate", rewind_to=0.1),
    "LotteryTicket-random": partial(LotteryTicket, 0.5, rounds=2, rewind="random", rewind_to=2),
    "PruningAtInit": partial(PruningAtInit, 0.5),
    "PruningAtInit-GraSP": partial(PruningAtInit, 0.5, GraSP()),
    "PruningAtInit-SynFlow": partial(PruningAtInit, 0.5, SynFlow(), rounds=3),
    "PruningAtInit-Wanda": partial(PruningAtInit, 0.5, Wanda(), scope="local"),
    "RigL-window": partial(RigL, 0.5, frequency=3, window=2),
}


def label(variant: object) -> str:
    """A short name of a variant, for the name of its test."""
    if isinstance(variant, str | int):
        return str(variant)
    if isinstance(variant, dict):
        return "per_layer"
    if getattr(variant, "coupled", False) and isinstance(variant, Channel):
        return "CoupledChannel"
    return getattr(variant, "__name__", type(variant).__name__)
