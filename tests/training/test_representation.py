"""Representation: a callback shows the call that makes it, and runs nothing of the user's for it."""

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from models import MLP, fit
from torch import nn
from variants import METHODS, square_root

import lightning_prune as lp
from lightning_prune.training.representation import call_text

CALLBACKS = [
    value for name in lp.__all__ if inspect.isclass(value := getattr(lp, name)) and issubclass(value, Callback)
]
CALLS = [
    *dict.fromkeys(repr(build()) for build in METHODS.values()),
    "ACDC(0.9, frequency=5)",
    "ADMM(0.9, penalty=0.1, schedule='cubic')",
    "ConstantSparsity()",
    "ConstantSparsity(targets=('a.*', 'b'), log_layers=True)",
    "GroupLasso(strength=0.01, growth=4.0, proximal=True)",
    "Distillation()",
    "LearnedMasks(n=1, m=8, temperature=(2.0, 0.1), end=100)",
    "MaskedAdapters(rank=8, train=('bias', 'head.*'))",
    "Distillation(teacher='dense.ckpt', temperature=4.0)",
    "EntropyPruning(0.5, prune='low', bins=8, window=2, scope='local', min_density=0.1)",
    "GuardedPruning('val_loss', mode='min', reference=0.5)",
    "LotteryTicket(0.75, rounds=2, rewind='learning_rate')",
    "MagnitudePruning(0.9)",
    "MagnitudePruning(0.9, schedule='linear')",
    "MagnitudePruning(0.9, start=0, end=1.0)",
    "MagnitudePruning({'a.*': 0.5, '*': 0.25}, targets=('a.*',))",
    "MagnitudePruning(threshold=0.1)",
    "MovementPruning(0.9, window=2)",
    "Pruning(0.5, criterion=Magnitude(p=float('inf')), granularity=Block(height=2), scope=ERK(dense=('a.*',)))",
    "Pruning(0.5, scope=ERK(overrides={'a.*': 0.5}))",
    "Pruning(0.5, criterion=Random(seed=3), granularity=Channel(coupled=True), scope=OWL(spread=0.2), min_density=0.1)",
    "PruningAtInit(0.5, criterion=SynFlow(), rounds=3)",
    "PruningReport('report.html', log_figures=True)",
    "RandomPruning(0.75, seed=1, granularity=NM(n=1))",
    "RigL(0.5, window=2, scope='local')",
    "SET()",
    "SNIPPruning(0.9, window=2)",
    "SRSTE(n=1, m=8)",
    "SensitivityPruning(0.5, granularity=Weight(), of='flops')",
    "SparseEarlyStopping('val_loss', min_delta=0.1)",
    "SparseEarlyStopping('val_acc', min_delta=0.1, mode='max')",
    "SparseModelCheckpoint()",
    "SparseModelCheckpoint(monitor='val_loss', save_top_k=2, every_n_epochs=3)",
    "SparseModelCheckpoint(every_n_train_steps=5, save_on_train_epoch_end=False)",
    "WandaPruning(0.5, window=None)",
]


def made(text: str) -> Any:
    return eval(text, {name: getattr(lp, name) for name in lp.__all__})


def test_every_callback_has_a_call() -> None:
    found = {call.partition("(")[0] for call in CALLS}
    assert found == {cls.__name__ for cls in CALLBACKS}, "one is missing in CALLS and in variants.METHODS"


@pytest.mark.parametrize("call", CALLS)
def test_a_callback_shows_the_call_that_makes_it(call: str) -> None:
    assert repr(made(call)) == call


@pytest.mark.parametrize("cls", CALLBACKS, ids=lambda cls: cls.__name__)
def test_a_callback_that_is_half_made_can_be_shown(cls: type) -> None:
    assert repr(cls.__new__(cls)) == f"{cls.__name__}()"


class Loud(lp.Criterion):
    """A user's criterion that cannot be asked anything."""

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared")

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        raise AssertionError("shown")


class Mine(lp.MagnitudePruning):
    """A user's callback, which hands its arguments on, and whose attributes cannot be read."""

    def __init__(self, level: float, name: str = "a", **kwargs: Any) -> None:
        super().__init__(level, **kwargs)
        self.level = level

    @property
    def name(self) -> str:
        raise AssertionError("read")


def test_nothing_of_the_users_is_run() -> None:
    assert repr(lp.Pruning(0.5, criterion=Loud(), schedule=square_root)) == (
        "Pruning(0.5, criterion=Loud(...), schedule=square_root)"
    )
    assert repr(lp.Distillation(nn.Linear(2, 2))) == "Distillation(teacher=Linear(...))"
    assert repr(lp.Distillation(Path("a.ckpt"))) == "Distillation(teacher='a.ckpt')"  # type: ignore[arg-type]
    assert repr(Mine(0.5, end=9)) == "Mine(0.5, sparsity=0.5, end=9)"


def test_a_callback_shows_what_it_was_told_after_a_run() -> None:
    callback = lp.MagnitudePruning(0.5, schedule="linear", start=1, end=3)
    fit(MLP(), callback, max_epochs=1)
    assert repr(callback) == "MagnitudePruning(0.5, schedule='linear', start=1, end=3)"


def test_values_of_all_kinds() -> None:
    class Box:
        def __init__(self, value: Any = None) -> None:
            self.value = value

    values = [[1, "a"], (1,), (), {"a": [True]}, math.inf, math.nan, len, nn.ReLU, nn.ReLU(), False]
    assert [call_text(Box(value)) for value in values] == [
        *("Box([1, 'a'])", "Box((1,))", "Box(())", "Box({'a': [True]})", "Box(float('inf'))", "Box(float('nan'))"),
        *("Box(len)", "Box(ReLU)", "Box(ReLU(...))", "Box(value=False)"),
    ]
