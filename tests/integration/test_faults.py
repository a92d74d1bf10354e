"""Faults: whatever raises in whatever hook, a run leaves zeros where masks are, no hook, and callbacks that go on."""

from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from models import MLP, QUIET, agrees, fit
from modes import leftovers

from lightning_prune import (
    ACDC,
    SRSTE,
    Channel,
    Distillation,
    Entropy,
    GuardedPruning,
    LotteryTicket,
    MagnitudePruning,
    Pruning,
    PruningAtInit,
    PruningReport,
    RigL,
    Sensitivity,
)

WINDOW: dict[str, Any] = {"schedule": "linear", "start": 0, "end": 8, "frequency": 2}
METHODS: dict[str, Callable[[], Any]] = {
    "magnitude": partial(MagnitudePruning, 0.5, **WINDOW),
    "sensitivity": partial(Pruning, 0.5, Sensitivity(window=2), Channel(), scope="local", **WINDOW),
    "entropy": partial(Pruning, 0.5, Entropy(window=2), Channel(), scope="local", **WINDOW),
    "ACDC": partial(ACDC, 0.5, start=1, end=8, frequency=2),
    "RigL": partial(RigL, 0.5, frequency=2),
    "SRSTE": partial(SRSTE, 2, 4),
    "ticket": partial(LotteryTicket, 0.5, rounds=2, frequency=3, interval="step"),
    "guarded": partial(GuardedPruning, "val_loss", max_drop=5.0, step=0.25, patience=1, sparsity=0.5),
    "at init": partial(PruningAtInit, 0.5),
}
HOOKS = (
    *("setup", "on_fit_start", "on_sanity_check_start", "on_sanity_check_end", "on_train_start"),
    *("on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "on_train_batch_end", "on_validation_start", "on_validation_epoch_start"),
    *("on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end", "on_validation_end"),
    *("on_train_epoch_end", "on_save_checkpoint", "on_train_end", "on_fit_end", "teardown"),
)


class Fault(Callback):
    """Raises in one hook, from the second epoch on where the hook is called so late."""

    def __init__(self, hook: str, error: type[BaseException]) -> None:
        self.error = error
        self.raised = False
        setattr(self, hook, partial(self._fail, hook in HOOKS[HOOKS.index("on_train_epoch_start") : -3]))

    def _fail(self, late: bool, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if not self.raised and (not late or trainer.current_epoch >= 1):
            self.raised = True
            raise self.error("stop")


def cases() -> list[tuple[str, type[BaseException], bool, str]]:
    """Return every hook with an error, every other one with an interrupt, too, in both orders, and each method."""
    methods = cycle(METHODS)
    raised: list[tuple[str, type[BaseException]]] = [
        *((hook, RuntimeError) for hook in HOOKS),
        *((hook, KeyboardInterrupt) for hook in HOOKS[::2]),
    ]
    return [(hook, error, turn % 2 == 0, next(methods)) for turn, (hook, error) in enumerate(raised)]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("hook", "error", "first", "method"), cases())
def test_a_fault_in_any_hook_leaves_true_masks_and_no_hook(
    hook: str, error: type[BaseException], first: bool, method: str, tmp_path: Path
) -> None:
    model, callback, fault = MLP(), METHODS[method](), Fault(hook, error)
    callbacks = [fault, callback] if first else [callback, fault]
    saves = ModelCheckpoint(tmp_path, every_n_epochs=1)
    arguments = {**QUIET, "max_epochs": 3, "num_sanity_val_steps": 1, "enable_checkpointing": True}
    trainer = Trainer(**arguments, callbacks=[*callbacks, saves])
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        trainer.fit(model)
    assert fault.raised
    assert agrees(model, callback.masks)
    assert not leftovers(model, *(trainer.optimizers or []))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    model.train()
    again = fit(model, callback, max_epochs=4)  # the same callback goes on with what it has
    assert agrees(model, callback.masks)
    assert not leftovers(model, *again.optimizers)
    assert callback.reached
    weights = sum(mask.numel() for mask in callback.masks.values() if mask.ndim == 2)
    zeros = sum(int((~mask).sum()) for mask in callback.masks.values() if mask.ndim == 2)
    assert callback.sparsity_now == pytest.approx(zeros / weights)


class Unwritable(MLP):
    """Takes a state that it cannot be given back, where the disk is full."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_that_cannot_be_written_leaves_true_masks(method: str, tmp_path: Path) -> None:
    model, callback = Unwritable(), METHODS[method]()
    with pytest.raises(OSError, match="No space left"):
        fit(model, callback, ModelCheckpoint(tmp_path), enable_checkpointing=True, max_epochs=3)
    assert agrees(model, callback.masks)
    assert not leftovers(model)


@pytest.mark.parametrize("place", ["a file in the way", "a folder in the way"])
def test_a_report_that_cannot_be_written_ends_no_run(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.html").mkdir()
    path = tmp_path / "file" / "report.html" if place == "a file in the way" else tmp_path / "folder.html"
    model, callback = MLP(), METHODS["magnitude"]()
    with pytest.warns(UserWarning, match="could not write its page; the run is complete without"):
        trainer = fit(model, callback, Distillation(teacher=MLP(seed=1)), PruningReport(str(path)), max_epochs=3)
    assert trainer.state.finished
    assert callback.reached
    assert torch.isfinite(model.net[0].weight).all()
