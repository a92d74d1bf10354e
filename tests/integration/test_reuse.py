"""A callback that is used again, with another model, starts over, however the last run ended."""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from models import MLP, QUIET, fit
from torch import Tensor, nn
from variants import METHODS

from lightning_prune import Distillation, GuardedPruning, LotteryTicket, MagnitudePruning
from lightning_prune.training.masked import MaskedTraining


class Examined(MLP):
    """Can be tested, and logs a metric that every sparsity holds."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("score", 1.0)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("loss", self(batch[0]).mean())

    def test_dataloader(self) -> Any:
        return self.train_dataloader()


AGAIN: dict[str, Callable[[], MaskedTraining]] = {
    **{name: METHODS[name] for name in ("ACDC", "SET", "SRSTE", "LotteryTicket", "PruningAtInit")},
    "Pruning": partial(MagnitudePruning, 0.5),
    "GuardedPruning": partial(GuardedPruning, "score", patience=1, sparsity=0.5, step=0.5),
}


@pytest.mark.parametrize("name", AGAIN)
def test_what_a_test_restored_is_not_for_the_next_model(name: str, tmp_path: Path) -> None:
    expected, fresh = Examined(seed=1), AGAIN[name]()
    trainer = fit(expected, fresh, max_epochs=3)
    steps, path = trainer.global_step, str(tmp_path / "first.ckpt")
    model, callback = Examined(), AGAIN[name]()
    trainer = fit(model, callback, max_epochs=3)
    trainer.save_checkpoint(path)
    trainer.test(model, ckpt_path=path, verbose=False)
    assert callback.sparsity_now > 0.4
    other = Examined(seed=1)
    assert fit(other, callback, max_epochs=3).global_step == steps > 3
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name
    assert all(torch.equal(callback.masks[name], mask) for name, mask in fresh.masks.items())


def test_a_state_that_the_user_loads_is_for_any_model(tmp_path: Path) -> None:
    callback = MagnitudePruning(0.5, start=1, end=3)
    fit(model := Examined(), callback, max_epochs=1)
    state, other, again = callback.state_dict(), Examined(seed=1), MagnitudePruning(0.5, start=1, end=3)
    with pytest.raises(RuntimeError, match="stop"):
        fit(Stopping(), again)
    again.load_state_dict(state)
    other.load_state_dict(model.state_dict())
    fit(other, again, max_epochs=1)
    assert all(torch.equal(again.masks[name], mask) for name, mask in callback.masks.items())


class Stopping(Examined):
    """Raises in its first step."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        raise RuntimeError("stop")


def test_the_teacher_that_a_test_restored_does_not_teach_the_next_model(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [MagnitudePruning(0.5, start=2, end=4), Distillation()]

    expected = Examined(seed=1)
    fit(expected, *callbacks())
    model, used, path = Examined(), callbacks(), str(tmp_path / "first.ckpt")
    trainer = fit(model, *used)
    trainer.save_checkpoint(path)
    trainer.test(model, ckpt_path=path, verbose=False)
    other = Examined(seed=1)
    fit(other, *used)
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_masks_that_do_not_come_back_are_a_warning(strategy: str) -> None:
    trainer = Trainer(**{**QUIET, "strategy": strategy})
    with pytest.warns(UserWarning, match="MagnitudePruning holds its masks in the processes that the strategy starts"):
        MagnitudePruning(0.5).setup(trainer, Examined(), "fit")


@pytest.mark.parametrize("outputs", [3, 5])
@pytest.mark.parametrize("name", ["GuardedPruning", "LotteryTicket"])
def test_what_is_remembered_of_another_head_is_refused_before_the_first_step(name: str, outputs: int) -> None:
    callbacks = {
        "GuardedPruning": partial(GuardedPruning, "score", patience=1, sparsity=0.5, step=0.5),
        "LotteryTicket": partial(LotteryTicket, 0.5, rounds=2, frequency=8, interval="step"),
    }
    model, callback = Examined(), callbacks[name]()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".* (before the last update|will not reach its target|drops the masks)"
        )
        fit(model, callback, max_epochs=3)
        width = 10 if outputs == 5 else 12
        model.net[4], model.net[6] = nn.Linear(8, width), nn.Linear(width, outputs)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=f"that {name} remembers, to go back to .*: use a new {name} "):
            fit(model, callback, max_epochs=3)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
