"""Damaged states of callbacks: what is taken up from one means what was saved, and all else is refused by its key."""

import copy
import io
import pickle
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damaged, places, refusal
from lightning.pytorch import Callback, Trainer
from models import MLP, fit
from modes import leftovers
from torch import Tensor, nn

from lightning_prune import (
    SET,
    SRSTE,
    Distillation,
    Entropy,
    GroupLasso,
    GuardedPruning,
    LearnedMasks,
    LotteryTicket,
    MagnitudePruning,
    Movement,
    Pruning,
    PruningAtInit,
    PruningReport,
    RigL,
)

STEPS = {"schedule": "linear", "start": 1, "end": 7, "frequency": 2}
STATEFUL: dict[str, Callable[[], Any]] = {
    "Magnitude": partial(MagnitudePruning, 0.5, **STEPS),
    "Movement": partial(Pruning, 0.5, Movement(window=4), start=1, end=7, frequency=5),
    "Entropy": partial(Pruning, 0.5, Entropy(bins=8, window=4), start=1, end=7, frequency=5),
    "SET": partial(SET, 0.5, frequency=2),
    "RigL": partial(RigL, 0.5, frequency=4, window=3),
    "LotteryTicket": partial(LotteryTicket, 0.5, rounds=2, frequency=2, interval="step"),
    "GuardedPruning": partial(GuardedPruning, "val_loss", max_drop=5.0, mode="min", patience=1),
    "SRSTE": partial(SRSTE, 2, 4),
    "LearnedMasks": partial(LearnedMasks, 2, 4),
    "PruningAtInit": partial(PruningAtInit, 0.5),
    "Distillation": Distillation,
    "GroupLasso": GroupLasso,
    "PruningReport": PruningReport,
}


class Net(MLP):
    def build(self, dropout: float) -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


class Saver(Callback):
    """Saves a checkpoint after the fifth step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 5:
            trainer.save_checkpoint(self.path)


def callbacks_of(method: str) -> tuple[Any, list[Any]]:
    """Return the callback of a method, and all that it needs beside it."""
    callback = STATEFUL[method]()
    alone = not isinstance(callback, Distillation | GroupLasso | PruningReport)
    return callback, [callback] if alone else [MagnitudePruning(0.5, **STEPS), callback]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A checkpoint of the fifth step of each method, while its next update is observed."""
    found = {}
    for method in STATEFUL:
        path = tmp_path_factory.mktemp("states") / f"{method}.ckpt"
        _, callbacks = callbacks_of(method)
        fit(Net(), Saver(path), *callbacks, max_epochs=3, default_root_dir=path.parent)
        found[method] = torch.load(path, weights_only=True)
    return found


def state_of(checkpoint: dict[str, Any], callback: Any) -> dict[str, Any]:
    return checkpoint["callbacks"][callback.state_key]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def loadable(state: dict[str, Any]) -> bool:
    """Whether torch loads it from a file: bytes, for one, it refuses itself."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* resumes with")
@pytest.mark.parametrize("method", STATEFUL)
def test_a_damaged_state_is_refused_by_its_key_or_does_no_harm(
    method: str, checkpoints: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    chance, checkpoint = random.Random(method), checkpoints[method]
    callback, _ = callbacks_of(method)
    state = state_of(checkpoint, callback)
    callback.load_state_dict(copy.deepcopy(state))
    before, taken = callback.state_dict(), []
    for _ in range(150):
        path = chance.choice(list(places(state)))
        broken = damaged(state, path, chance)
        error = refusal(callback.load_state_dict, copy.deepcopy(broken))
        if error is not None:
            assert any(str(key) in error for key in path), (path, error)
            assert same(callback.state_dict(), before), path  # nothing of it has been taken up
        else:
            taken.append((path, broken))
            callback.load_state_dict(copy.deepcopy(state))
    resumed = [entry for entry in taken if entry[0][0] != "teacher" and loadable(entry[1])]
    for path, broken in chance.sample(resumed, min(2 if method == "PruningReport" else 4, len(resumed))):
        callback, callbacks = callbacks_of(method)
        file, model = tmp_path / "damaged.ckpt", Net(seed=1)
        torch.save({**checkpoint, "callbacks": {**checkpoint["callbacks"], callback.state_key: broken}}, file)
        error = refusal(fit, model, *callbacks, ckpt_path=str(file), max_epochs=3, default_root_dir=tmp_path)
        assert error is None or any(str(key) in error for key in path), (path, error)
        assert not leftovers(model), path


@pytest.mark.parametrize("method", STATEFUL)
def test_a_state_of_a_later_release_is_refused(method: str, checkpoints: dict[str, dict[str, Any]]) -> None:
    callback, _ = callbacks_of(method)
    state = state_of(checkpoints[method], callback)
    with pytest.raises(ValueError, match=r"must be of 'version' 1 to 1, got 2: load a later one with the release"):
        callback.load_state_dict({**state, "version": 2})


def test_sparsity_is_that_of_the_masks_whatever_the_state_says(checkpoints: dict[str, dict[str, Any]]) -> None:
    callback, _ = callbacks_of("Magnitude")
    state = state_of(checkpoints["Magnitude"], callback)
    callback.load_state_dict({**state, "levels": dict.fromkeys(state["levels"], 1.0)})
    assert callback.sparsity_now == pytest.approx(callback.masks.sparsity)
    assert 0.0 < callback.sparsity_now < 0.5
    with pytest.raises(ValueError, match=r"must have a mask of 'net.9.weight' in 'masks'"):
        callback.load_state_dict({**state, "levels": {"net.9.weight": 0.5}})


def test_an_update_that_is_not_planned_is_no_end(checkpoints: dict[str, dict[str, Any]]) -> None:
    callback, _ = callbacks_of("Magnitude")
    state = state_of(checkpoints["Magnitude"], callback)
    with pytest.raises(ValueError, match=r"an update in 'applied', at most 7 according to .*, got 1000000000"):
        callback.load_state_dict({**state, "applied": 10**9})
    assert not callback.masks
