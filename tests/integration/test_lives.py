"""The lives of callbacks: whatever happens to a model, no zero is lost, and ``sparsity_now`` is what is there.

Any two methods train one model, which is frozen, unfrozen, replaced in parts, overwritten, validated, tested from a
checkpoint, resumed and exchanged for another model, in any order.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from lightning.pytorch import Callback, LightningModule, Trainer
from models import MLP, QUIET
from modes import leftovers
from torch import Tensor, nn

from lightning_prune import (
    ACDC,
    SET,
    SRSTE,
    Channel,
    ConstantSparsity,
    GuardedPruning,
    LotteryTicket,
    MagnitudePruning,
    Pruning,
    PruningAtInit,
    RigL,
    Sensitivity,
    Wanda,
)
from lightning_prune.training.masked import MaskedTraining

EXAMPLES = int(os.environ.get("FUZZ", "0"))
FIRST, SECOND = ("net.2.weight", "net.4.weight"), ("net.6.weight",)
WINDOW: dict[str, Any] = {"schedule": "linear", "start": 0, "end": 6, "frequency": 2}
METHODS: dict[str, Callable[..., MaskedTraining]] = {
    "magnitude": partial(MagnitudePruning, 0.5, scope="local", **WINDOW),
    "sensitivity": partial(Pruning, 0.5, Sensitivity(window=2), Channel(), scope="local", **WINDOW),
    "wanda": partial(Pruning, 0.5, Wanda(window=2), **WINDOW),
    "constant": ConstantSparsity,
    "at init": partial(PruningAtInit, 0.5),
    "ACDC": partial(ACDC, 0.5, start=1, end=6, frequency=2),
    "SET": partial(SET, 0.5, frequency=2, end=1.0),
    "RigL": partial(RigL, 0.5, frequency=2, end=1.0),
    "SRSTE": partial(SRSTE, 2, 4),
    "ticket": partial(LotteryTicket, 0.5, rounds=2, rewind_to=1, frequency=3, interval="step"),
    "guarded": partial(GuardedPruning, "val_loss", max_drop=0.01, step=0.3, patience=1),
}
LAYERS = st.sampled_from([2, 4, 6])
EVENTS = st.tuples(st.integers(0, 2), st.sampled_from(["freeze", "unfreeze", "replace", "overwrite"]), LAYERS)


class Model(MLP):
    """Square layers, so that a mask could be taken for that of another layer, and one that is never pruned."""

    def build(self, dropout: float) -> nn.Sequential:
        square = [part for _ in range(3) for part in (nn.Tanh(), nn.Linear(8, 8))]
        net = nn.Sequential(nn.Linear(6, 8), *square)
        with torch.no_grad():
            net[4].weight[::2] = 0.0  # for who keeps the zeros that are there
        return net

    test_step = MLP.validation_step
    test_dataloader = MLP.train_dataloader


class Happenings(Callback):
    """Lets events happen before the first batch of epochs of a run."""

    def __init__(self, events: list[tuple[int, str, int]]) -> None:
        self.events = events

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for epoch, what, layer in self.events:
            if epoch == trainer.current_epoch:
                happen(what, pl_module.net, layer, trainer.optimizers)


@torch.no_grad()
def happen(what: str, net: Any, layer: int, optimizers: list[Any]) -> None:
    if what == "replace":
        net[layer] = nn.Linear(8, 8)
        for optimizer in optimizers:
            optimizer.add_param_group({"params": list(net[layer].parameters())})
    elif what == "overwrite":
        net.load_state_dict({name: torch.randn_like(tensor) for name, tensor in net.state_dict().items()})
    else:
        net[layer].weight.requires_grad_(what == "unfreeze")


class Watch(Callback):
    """Looks at masks, weights and what callbacks say of them, after every batch.

    Args:
        callbacks: Those that train under masks.
        held: The names of the targets that each has had a mask of so far.
        weights: Whether to look at weights: what is written behind the callbacks waits for the next step or epoch.
    """

    def __init__(self, callbacks: list[MaskedTraining], held: list[set[str]], weights: bool) -> None:
        self.callbacks, self.held, self.weights = callbacks, held, weights

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.look(pl_module, self.weights)

    def look(self, model: LightningModule, weights: bool = True) -> None:
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        for callback, held in zip(self.callbacks, self.held, strict=True):
            if isinstance(callback, GuardedPruning):  # it may go back to a model without any
                held.intersection_update(callback.masks)
            assert held <= callback.masks.keys(), f"{type(callback).__name__} has lost masks"
            held.update(name for name in callback.masks if parameters[name].ndim == 2)
            if weights:
                lost = [name for name, mask in callback.masks.items() if parameters[name][~mask].any()]
                assert not lost, f"{type(callback).__name__} has lost zeros of {lost}"
            total = sum(parameters[name].numel() for name in held | set(callback.target_names()))
            zeros = sum(int((~callback.masks[name]).sum()) for name in held)
            assert callback.sparsity_now == pytest.approx(zeros / max(1, total), abs=1e-9)


class Lives(RuleBasedStateMachine):
    """One model and two callbacks at a time."""

    @initialize(
        names=st.tuples(st.sampled_from(sorted(METHODS)), st.sampled_from(sorted(METHODS))), swapped=st.booleans()
    )
    def begin(self, names: tuple[str, str], swapped: bool) -> None:
        rewinding = {"ticket", "guarded"}
        names = (names[0], "magnitude") if rewinding.issuperset(names) else names
        self.make = [
            partial(METHODS[name], targets=targets) for name, targets in zip(names, (FIRST, SECOND), strict=True)
        ]
        self.make = self.make[::-1] if swapped else self.make
        self.folder = TemporaryDirectory()
        torch.manual_seed(0)
        self.model, self.callbacks, self.held = Model(), [make() for make in self.make], [set[str]() for _ in self.make]
        self.trainer: Trainer | None = None
        self.replaced = False

    @rule(epochs=st.integers(1, 3), events=st.lists(EVENTS, max_size=3), before=st.booleans())
    def train(self, epochs: int, events: list[tuple[int, str, int]], before: bool) -> None:
        self.fit(epochs, events, before)

    @precondition(lambda self: self.trainer is not None and not self.replaced)
    @rule(events=st.lists(EVENTS, max_size=2), same=st.booleans())
    def resume(self, events: list[tuple[int, str, int]], same: bool) -> None:
        path = self.save()
        if not same:
            trainable = [parameter.requires_grad for parameter in self.model.parameters()]
            self.model, self.callbacks = Model(seed=1), [make() for make in self.make]
            for parameter, trained in zip(self.model.parameters(), trainable, strict=True):
                parameter.requires_grad_(trained)
        self.fit(self.trainer.current_epoch + 2, [(epoch + 2, *event) for epoch, *event in events], True, path)

    @precondition(lambda self: self.trainer is not None)
    @rule()
    def validate(self) -> None:
        self.trainer.validate(self.model, verbose=False)

    @precondition(lambda self: self.trainer is not None)
    @rule()
    def test_from_checkpoint(self) -> None:
        self.trainer.test(self.model, ckpt_path=self.save(), verbose=False)

    @precondition(lambda self: self.trainer is not None)
    @rule(what=st.sampled_from(["freeze", "unfreeze", "replace"]), layer=LAYERS, epochs=st.integers(1, 2))
    def change_and_train(self, what: str, layer: int, epochs: int) -> None:
        happen(what, self.model.net, layer, [])
        self.fit(epochs, [], True)

    @rule(epochs=st.integers(1, 3))
    def take_another_model(self, epochs: int) -> None:
        self.model, self.held, self.replaced = Model(seed=2), [set() for _ in self.make], False
        self.fit(epochs, [], True)
        expected = Model(seed=2)
        Trainer(**{**QUIET, "max_epochs": epochs}, callbacks=[make() for make in self.make]).fit(expected)
        for name, parameter in self.model.named_parameters():
            assert torch.equal(parameter, expected.get_parameter(name)), "an earlier model has left something"

    def fit(self, epochs: int, events: list[tuple[int, str, int]], before: bool, path: str | None = None) -> None:
        try:
            self.train_on(epochs, events, before, path)
        except ValueError as error:
            if "remembers, to go back to" not in str(error):
                raise
            # an optimizer of other layers: said before the first step, and a new callback is what is asked for
            self.callbacks, self.held = [make() for make in self.make], [set() for _ in self.make]
            self.train_on(epochs, events, before, None)
        self.replaced |= len(self.trainer.optimizers[0].param_groups) > 1

    def train_on(self, epochs: int, events: list[tuple[int, str, int]], before: bool, path: str | None) -> None:
        happenings, watch = [Happenings(events)], Watch(self.callbacks, self.held, before)
        callbacks = [*happenings, *self.callbacks] if before else [*self.callbacks, *happenings]
        self.trainer = Trainer(**{**QUIET, "max_epochs": epochs}, callbacks=[*callbacks, watch])
        self.trainer.fit(self.model, ckpt_path=path)

    def save(self) -> str:
        path = str(Path(self.folder.name) / "life.ckpt")
        self.trainer.save_checkpoint(path)
        return path

    @invariant()
    def no_zero_is_lost(self) -> None:
        if getattr(self, "trainer", None) is None:
            return
        assert all(parameter.isfinite().all() for parameter in self.model.parameters())
        assert not leftovers(self.model)
        Watch(self.callbacks, self.held, True).look(self.model)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.timeout(0 if EXAMPLES else 600)
class TestLives(Lives.TestCase):  # type: ignore[name-defined, misc]
    """Runs the machine; ``FUZZ=1000 pytest tests/integration/test_lives.py`` tries so many lives, others each time."""

    settings = settings(
        max_examples=EXAMPLES or 12,
        stateful_step_count=6,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
