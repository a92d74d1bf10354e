"""Two callbacks beside each other: each holds its own zeros, whatever the other does to the model."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import permutations
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from models import MLP, On, agrees, fit
from torch import Tensor, nn

from lightning_prune import (
    ACDC,
    SET,
    SRSTE,
    ConstantSparsity,
    Distillation,
    GuardedPruning,
    LotteryTicket,
    MagnitudePruning,
    PruningAtInit,
    RigL,
)
from lightning_prune.masked_training import MaskedTraining
from lightning_prune.zeroing import zero_pruned

FIRST, SECOND = {"targets": ("net.0.*",)}, {"targets": ("net.4.*",)}


class Wavering(MLP):
    """Logs a metric that no second sparsity holds, so that a guard goes back; every weight has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2], self.net[5] = nn.Tanh(), nn.Tanh()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("score", 1.0 - float((self.net[0].weight == 0).float().mean() > 0.4))


REWINDING: dict[str, Callable[[], MaskedTraining]] = {
    "ticket": partial(LotteryTicket, 0.5, rounds=2, rewind_to=1, **FIRST),
    "guard": partial(GuardedPruning, "score", step=0.3, precision=0.1, patience=4, **FIRST),
}
BESIDE: dict[str, Callable[[], Any]] = {
    "magnitude": partial(MagnitudePruning, 0.5, start=1, end=6, frequency=1, **SECOND),
    "acdc": partial(ACDC, 0.5, start=1, end=6, frequency=1, **SECOND),
    "set": partial(SET, 0.5, frequency=5, **SECOND),
    "rigl": partial(RigL, 0.5, frequency=5, **SECOND),
    "srste": partial(SRSTE, 2, 4, **SECOND),
    "init": partial(PruningAtInit, 0.5, **SECOND),
    "constant": partial(ConstantSparsity, **SECOND),
    "teacher": partial(Distillation, "dense"),
}


def check(model: nn.Module, callback: Any) -> None:
    """What a callback says is what is counted among its targets."""
    parameters = dict(model.named_parameters())
    found = [parameters[name] for name in callback.target_names()]
    zeros = sum(int((weight == 0).sum()) for weight in found)
    assert callback.sparsity_now == pytest.approx(zeros / sum(weight.numel() for weight in found))


def pairs() -> Iterator[Any]:
    for one in REWINDING:
        for other in BESIDE:
            for order in permutations((one, other)):
                yield pytest.param(order, id="-".join(order))


@pytest.mark.parametrize("order", list(pairs()))
def test_every_callback_holds_its_zeros_while_another_rewinds(order: tuple[str, str]) -> None:
    model = Wavering()
    with torch.no_grad():
        zero_pruned([(model.net[4].weight, torch.arange(80).view(10, 8) % 2 == 0)]) if "constant" in order else None
    callbacks = [{**REWINDING, **BESIDE}[name]() for name in order]
    masked = [callback for callback in callbacks if isinstance(callback, MaskedTraining)]
    seen: list[bool] = []
    look = On(on_train_batch_start=lambda *_: seen.append(all(agrees(model, one.masks) for one in masked)))
    fit(model, *callbacks, look, max_epochs=6)
    assert seen == [True] * 24, "a forward pass saw a weight that is pruned"
    for callback in masked:
        check(model, callback)
        assert callback.sparsity_now == pytest.approx(0.3 if isinstance(callback, GuardedPruning) else 0.5, abs=0.02)


@pytest.mark.parametrize("first", [0, 1])
def test_weights_behind_masks_are_rewound_too(first: int) -> None:
    """N:M weights train as if nothing had come before, from the step that a ticket goes back to."""

    class Diary(MLP):
        pages: list[Tensor]

        def on_train_batch_start(self, *args: Any) -> None:
            self.pages.append(self.net[4].weight.detach().clone())

    model = Diary()
    model.pages = []
    both = [LotteryTicket(0.01, rounds=1, rewind_to=first, **FIRST), SRSTE(2, 4, **SECOND)]  # rounds to no weight
    fit(model, *both, max_epochs=4, limit_val_batches=0)
    for then, now in zip(model.pages[first + 1 : 8], model.pages[8 + first + 1 :], strict=True):
        assert torch.equal(then, now)


class Unfreezing(BaseFinetuning):
    """Adds a group of parameters to the optimizer in the third epoch."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, initial_denom_lr=4.0)


class FineTuned(Wavering):
    """Trains what is not frozen."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1, momentum=0.9)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("score", 1.0 - float((self.net[4].weight == 0).float().mean() > 0.4))


@pytest.mark.parametrize("name", ["ticket", "guard"])
def test_groups_that_are_added_on_the_way_stay(name: str) -> None:
    made = {
        "ticket": partial(LotteryTicket, 0.5, rounds=2, rewind_to=1, **SECOND),
        "guard": partial(GuardedPruning, "score", step=0.3, precision=0.1, patience=1, warmup=1, **SECOND),
    }
    model, callback = FineTuned(), made[name]()
    trainer = fit(model, Unfreezing(), callback, max_epochs=6)
    check(model, callback)
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [6, 2]
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.1, 0.025]


@pytest.mark.parametrize("names", [("ticket", "guard"), ("guard", "ticket"), ("ticket", "ticket")])
def test_two_that_rewind_are_refused(names: tuple[str, str]) -> None:
    both = [REWINDING[name]() for name in names]
    both[1].targets = SECOND["targets"]
    with pytest.raises(ValueError, match=r"callbacks must have at most one among them that rewinds the run.*got \["):
        fit(model := Wavering(), *both, max_epochs=3)
    assert model.trainer.global_step == 0
