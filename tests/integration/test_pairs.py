"""Two methods in one run, with every kind of optimizer, place of clipping and compilation, in pairs.

Each value of an axis meets each value of each other axis in at least one run, which takes some hundred runs of a dozen
steps where all combinations would be thousands. Of two methods now one comes first and now the other, by turns.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from foreign import SAM, Divided, ScheduleFree, Shampoo
from lightning.pytorch import Callback, LightningModule
from models import fit
from modes import Regression, assert_masked, plain_parameters
from pairwise import covering
from torch import Tensor, nn
from variants import METHODS as VARIANTS

from lightning_prune import (
    ACDC,
    ADMM,
    SET,
    SRSTE,
    Channel,
    ConstantSparsity,
    Distillation,
    Entropy,
    GuardedPruning,
    LotteryTicket,
    MagnitudePruning,
    Pruning,
    PruningAtInit,
    RigL,
    Sensitivity,
    prune,
)

WINDOW: dict[str, Any] = {"schedule": "linear", "start": 0, "end": 10, "frequency": 2}
METHODS: dict[str, partial] = {
    "magnitude": partial(MagnitudePruning, 0.5, **WINDOW),
    "sensitivity": partial(Pruning, 0.5, criterion=Sensitivity(window=2), granularity=Channel(), **WINDOW),
    "entropy": partial(Pruning, 0.5, criterion=Entropy(window=2), granularity=Channel(), **WINDOW),
    "ACDC": partial(ACDC, 0.5, start=1, end=8, frequency=2),
    "ADMM": partial(ADMM, 0.5, start=1, end=8, frequency=2),
    "SET": partial(SET, 0.5, scope="local", frequency=2),
    "RigL": partial(RigL, 0.5, scope="local", frequency=2, grow_init="gradient", regrow=True),
    "SRSTE": partial(SRSTE, 2, 4),
    "ticket": partial(LotteryTicket, 0.5, rounds=2, rewind_to=1, frequency=4, interval="step"),
    "at init": partial(PruningAtInit, 0.5),
    "constant": partial(ConstantSparsity),
    "guarded": partial(GuardedPruning, "val_loss", 9.0, "min", warmup=0, step=0.3, patience=1),
}
METHODS |= {name: build for name, build in VARIANTS.items() if build.func not in {own.func for own in METHODS.values()}}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "AdamW": partial(torch.optim.AdamW, lr=0.01),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.05, initial_accumulator_value=0.1),
    "Rprop": partial(torch.optim.Rprop, lr=0.01),
    "LBFGS": partial(torch.optim.LBFGS, lr=0.1, max_iter=2),
    "SAM": partial(SAM, lr=0.05),
    "Shampoo": Shampoo,
    "divided": Divided,
    "schedule-free": ScheduleFree,
}
CLIPS = ("no", "trainer", "before step", "after backward", "callback")
AXES: dict[str, tuple[str, ...]] = {
    **{"first": tuple(METHODS), "second": tuple(METHODS), "optimizer": tuple(OPTIMIZERS)},
    **{"clip": CLIPS, "compiled": ("no", "yes"), "distilled": ("no", "yes")},
}
CHEAP = {"compiled": "no", "distilled": "no"}
Case = dict[str, str]


def in_turn(first: str, second: str) -> bool:
    """Whether this one of two methods comes first: that listed before the other, or the other, by turns."""
    one, other = list(METHODS).index(first), list(METHODS).index(second)
    return one == other or (one < other) == bool((one + other) % 2)


def possible(case: Case) -> bool:
    """Whether no value excludes another: these pairs are refused, by Lightning or by this package."""
    again = case.get("optimizer") in ("LBFGS", "SAM")  # they run the model inside their step
    methods = case.get("first"), case.get("second")
    if None not in methods and not in_turn(*methods):
        return False
    rewinding = all(method in ("ticket", "guarded") for method in methods)  # the whole run, which one can do
    searching = case.get("optimizer") == "LBFGS" and "ADMM" in methods  # it compares losses without the penalty
    return not (again and "SRSTE" in methods) and not searching and not rewinding


class Model(Regression):
    """Two square layers, each the target of a method, and places to clip in."""

    clip = "no"

    def on_after_backward(self) -> None:
        if self.clip == "after backward":
            nn.utils.clip_grad_norm_(self.parameters(), 0.1)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.clip == "before step":
            nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class Clipping(Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: LightningModule, optimizer: Any) -> None:
        nn.utils.clip_grad_norm_(pl_module.parameters(), 0.1)


def build(case: Case) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        square = [layer for _ in range(2) for layer in (nn.ReLU(), nn.Linear(8, 8))]
        net = nn.Sequential(nn.Linear(6, 8), *square, nn.ReLU(), nn.Linear(8, 4))
    for place, number in (("first", 2), ("second", 4)):
        if case[place] == "constant":  # what it is to keep
            prune(net, 0.5, targets=(f"{number}.weight",))
    model = Model(net, optimizer=OPTIMIZERS[case["optimizer"]])
    model.clip = case["clip"]
    if case["compiled"] == "yes":
        torch._dynamo.reset()
        model.net = torch.compile(model.net, backend="eager")
    return model


@pytest.mark.filterwarnings("ignore:Using .torch.compile.module.. when there are global hooks")
@pytest.mark.parametrize("case", covering(AXES, possible, CHEAP), ids=lambda case: "-".join(case.values()))
def test_two_methods_hold_their_zeros(case: Case) -> None:
    model = build(case)
    first = METHODS[case["first"]](targets=("net.2.weight",))
    second = METHODS[case["second"]](targets=("net.4.weight",))
    seen: list[str] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *args: Any) -> None:
            parameters: dict[str, Tensor] = plain_parameters(pl_module)
            for callback in (first, second):
                seen.extend(name for name, mask in callback.masks.items() if parameters[name][~mask].any())

    clip = {"gradient_clip_val": 0.1} if case["clip"] == "trainer" else {}
    others: list[Callback] = [Clipping()] if case["clip"] == "callback" else []
    if case["distilled"] == "yes":
        others.append(Distillation(nn.Linear(6, 4), layer=""))
    guarded = "guarded" in (case["first"], case["second"])
    validate = {"val_check_interval": 1} if guarded else {"limit_val_batches": 0}
    fit(model, first, second, *others, Look(), **validate, **clip)
    assert not seen
    for callback in (first, second):
        search = isinstance(callback, GuardedPruning)  # is longer, and ends at the sparsity that holds the metric
        assert callback.reached or search
        assert callback.sparsity_now > 0.0
        assert_masked(model, callback, callback.sparsity_now if search else 0.5)
