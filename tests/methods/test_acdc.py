"""AC/DC: phases of all weights and of the largest ones take turns, and the last is a sparse one."""

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from models import BATCHES, MLP, MaskRecorder, On, agrees, fit, size, weights, zeros
from torch import Tensor, nn

from lightning_prune import ACDC, Channel, Random

EPOCHS = 3
PHASES = [(2, 1.0), (4, 0.0), (6, 1.0), (8, 0.0), (10, 1.0)]  # of twelve steps


class Diary(MaskRecorder):
    """Copies masks, weights and momentum at the start of every batch."""

    def __init__(self, callback: ACDC, key: str) -> None:
        super().__init__(callback)
        self.key = key
        self.weights: list[dict[str, Tensor]] = []
        self.momenta: list[list[Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: nn.Module, *args: Any) -> None:
        self.record()
        self.weights.append(weights(pl_module))
        self.momenta.append([state[self.key].clone() for state in trainer.optimizers[0].state.values()])


def write(optimizer: str = "sgd", **arguments: Any) -> tuple[ACDC, Diary, MLP]:
    callback, model = ACDC(0.6, **{"start": 2, "end": 10, "frequency": 2, **arguments}), MLP(optimizer=optimizer)
    diary = Diary(callback, "momentum_buffer" if optimizer == "sgd" else "exp_avg")
    fit(model, callback, diary, max_epochs=EPOCHS, limit_val_batches=0)
    return callback, diary, model


def test_the_phases_take_turns_and_the_last_is_sparse() -> None:
    callback, diary, model = write()
    assert callback.plan(2, 10) == PHASES
    pruned = round(0.6 * size(model))
    assert diary.counts == [0, 0, *[pruned] * 2, *[0] * 2, *[pruned] * 2, *[0] * 2, *[pruned] * 3]
    assert zeros(model) == pruned
    assert agrees(model, callback.masks)
    for masks, found in zip(diary.masks, diary.weights, strict=False):
        assert not any(found[name][~mask].any() for name, mask in masks.items())


def test_the_masks_are_chosen_anew_from_all_weights_by_magnitude() -> None:
    callback, model = ACDC(0.6, start=2, end=10, frequency=2), MLP(lr=1.0)
    before: list[Tensor] = []  # in front of the callback: the weights that an update sees

    def look(*args: Any) -> None:
        before.append(torch.cat([weight.flatten().abs() for weight in weights(model).values()]))

    recorder = MaskRecorder(callback)
    fit(model, On(on_train_batch_end=look), callback, recorder, max_epochs=EPOCHS, limit_val_batches=0)
    chosen = []
    for at in (2, 6, 10):
        chosen.append(torch.cat([mask.flatten() for mask in recorder.masks[at].values()]))
        largest = before[at - 1].argsort(descending=True)[: 158 - round(0.6 * 158)]
        assert torch.equal(chosen[-1], torch.zeros(158, dtype=torch.bool).index_fill(0, largest, True))
    assert all((later & ~earlier).any() for earlier, later in pairwise(chosen)), "no weight came back for good"


def test_all_weights_train_in_a_decompressed_phase() -> None:
    _, diary, _ = write()
    for at in (4, 8):
        for name, mask in diary.masks[at - 1].items():
            assert not diary.weights[at][name][~mask].any()
            assert diary.weights[at + 1][name][~mask].count_nonzero() > 0.5 * (~mask).sum()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_momentum_is_reset_where_a_decompressed_phase_begins(optimizer: str) -> None:
    _, diary, _ = write(optimizer)
    for at in range(1, EPOCHS * BATCHES):
        moving = [bool(momentum.any()) for momentum in diary.momenta[at]]
        assert moving == [at not in (4, 8)] * len(moving)


def test_the_target_is_reached_in_the_last_phase_only() -> None:
    callback = ACDC(0.6, start=2, end=10, frequency=2)
    reached: list[bool] = []
    look = On(on_train_batch_start=lambda *args: reached.append(callback.reached))
    fit(MLP(), callback, look, max_epochs=EPOCHS, limit_val_batches=0)
    assert reached == [False] * 10 + [True] * 2


def test_the_phases_are_those_of_the_paper() -> None:
    """ResNet-50 for 100 epochs: dense for 10, phases of 5, decompressed from 75 to 85, sparse to the end."""
    callback = ACDC(0.9, interval="epoch")
    first, last = callback.horizon.window(100)
    assert callback.plan(first, last) == [
        *[(at, float(at % 10 == 0)) for at in range(10, 80, 5)],
        (85, 1.0),
    ]


@pytest.mark.parametrize(
    ("window", "expected"),
    [((3, 3), [(3, 1.0)]), ((3, 4), [(4, 1.0)]), ((0, 2), [(0, 1.0), (1, 0.0), (2, 1.0)])],
)
def test_short_windows(window: tuple[int, int], expected: list[tuple[int, float]]) -> None:
    assert ACDC(0.9).plan(*window) == expected


def test_channels_come_back_with_their_bias_and_norm() -> None:
    callback, diary, model = write(criterion=Random(), granularity=Channel(), ignore=("net.6.*",))
    followers = [name for name in callback.masks if name not in weights(model)]
    assert followers
    assert all(mask.all() for mask in diary.masks[4].values())
    assert not all(mask.all() for mask in diary.masks[3].values())
    alive = [weight.any(1) for name, weight in weights(model).items() if name != "net.6.weight"]
    assert int((~torch.cat(alive)).sum()) == round(0.6 * 18)


def test_the_impossible_is_refused() -> None:
    for arguments, message in [
        ({"sparsity": 90}, "sparsity must be in [0, 1), got 90"),
        ({"sparsity": 0.9, "start": 0.9}, "start must not lie after end, got start=0.9 and end=0.85"),
        ({"sparsity": 0.9, "scope": "layer"}, "scope must be one of"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            ACDC(**arguments)


def test_a_run_that_ends_in_mid_phase_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="ACDC (will not reach its target|ended at a sparsity of 0.00%)"):
        fit(MLP(), ACDC(0.6, start=2, end=20, frequency=2), max_epochs=1)
