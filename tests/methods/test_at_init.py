"""PruningAtInit: what ``prune`` does before a training, inside of ``fit`` and without a trace."""

import copy
import pickle
import random
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import BaseFinetuning
from models import MLP, Attention, ConvNet, On, Tiny, TwoOptimizers, agrees, fit, size, weights, zeros
from modes import SGD, Probe, Regression, assert_masked, leftovers, mlp
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from variants import CRITERIA, label

from lightning_prune import (
    SNIP,
    Channel,
    ConstantSparsity,
    Criterion,
    Distillation,
    GraSP,
    Head,
    Magnitude,
    MagnitudePruning,
    PruningAtInit,
    SynFlow,
    Wanda,
    prune,
    sparsity,
)

OWN: tuple[Criterion, ...] = (*CRITERIA, GraSP(), SynFlow())


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def training_loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return loss(model.train(), batch)


def first(model: Tiny) -> list[Tensor]:
    return next(iter(model.train_dataloader()))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


# ------------------------------------------------------------------------------------------------ what it does


@pytest.mark.parametrize("criterion", OWN, ids=label)
def test_a_run_is_that_of_a_model_pruned_before(criterion: Criterion) -> None:
    one, other = MLP(), MLP()
    masks = prune(copy.deepcopy(other), 0.8, criterion=criterion, data=[first(one)], loss=training_loss, rounds=2)
    masks.apply(other)
    torch.manual_seed(1)
    fit(other, ConstantSparsity())
    callback = PruningAtInit(0.8, criterion, rounds=2)
    torch.manual_seed(1)
    with Probe(one, callback) as probe:
        fit(one, callback)
    assert_equal(callback.masks, masks)
    assert_equal(state(one), state(other))
    assert not probe.dense
    assert callback.sparsity_now == sparsity(one) == round(0.8 * size(one)) / size(one)


def test_the_first_batch_is_trained_on_with_the_sparse_network() -> None:
    model, callback, seen = MLP(), PruningAtInit(0.9), []
    assert not callback.reached
    look = On(on_after_backward=lambda *args: seen.append(zeros(model)))  # before the first optimizer step
    fit(model, callback, look, limit_train_batches=1, max_epochs=1)
    assert seen == [round(0.9 * size(model))]
    assert callback.reached


def test_rounds_keep_layers_alive() -> None:
    def alive(rounds: int) -> int:
        model = Regression(nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(6))))
        fit(model, PruningAtInit(0.9, SynFlow(), rounds=rounds), max_epochs=1)
        return sum(bool(weight.any()) for weight in weights(model).values())

    torch.manual_seed(0)
    once = alive(1)
    torch.manual_seed(0)
    assert once < alive(50) == 6


@pytest.mark.parametrize("granularity", [Channel(coupled=True), Head()], ids=label)
def test_the_first_batch_shows_how_units_are_coupled(granularity: Channel | Head) -> None:
    if isinstance(granularity, Head):
        net: nn.Module = nn.Sequential(Attention(6, 3), nn.Flatten(), nn.Linear(12, 1))
        model = Regression(net, size=(2, 6))
    else:
        model = Regression(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)))
    callback = PruningAtInit(0.5, Magnitude(), granularity)
    fit(model, callback)
    behind = dict(model.named_parameters())["net.0.o.weight" if isinstance(granularity, Head) else "net.2.weight"]
    assert 0 < int((behind == 0).all(0).sum()) < behind.shape[1]
    assert 0.0 < callback.sparsity_now < 1.0


def test_targets_a_threshold_and_sparsities_of_layers() -> None:
    model = MLP()
    small = {name: int((weight.abs() < 0.2).sum()) for name, weight in weights(model).items()}
    fit(model, PruningAtInit(threshold=0.2, criterion=Magnitude(), ignore=("net.6.*",)), limit_train_batches=1)
    assert zeros(model) == small["net.0.weight"] + small["net.4.weight"] > 0

    model = MLP()
    callback = PruningAtInit({"net.0.*": 0.25, "net.4.*": 0.75})
    fit(model, callback)
    assert {name: int((weight == 0).sum()) for name, weight in weights(model).items() if (weight == 0).any()} == {
        "net.0.weight": 12,
        "net.4.weight": 60,
    }
    assert callback.sparsity_now == 72 / 128


def test_a_teacher_is_taken_before_the_first_weight_goes() -> None:
    model, distillation = MLP(), Distillation()
    dense = state(model)
    fit(model, PruningAtInit(0.9), distillation, max_epochs=1)
    assert torch.equal(distillation._teacher.module.net[0].weight, dense["net.0.weight"])
    assert zeros(model) == round(0.9 * size(model))


def test_a_second_model_is_pruned_anew_and_a_second_fit_is_not() -> None:
    callback, first, second = PruningAtInit(0.5), MLP(), MLP(seed=1)
    fit(first, callback)
    masks = {name: mask.clone() for name, mask in callback.masks.items()}
    fit(first, callback)
    assert_equal(callback.masks, masks)
    fit(second, callback)
    assert zeros(second) == round(0.5 * size(second))
    assert any(not torch.equal(callback.masks[name], mask) for name, mask in masks.items())


class Unfreezing(BaseFinetuning):
    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 0:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


def test_layers_that_thaw_before_the_first_batch_are_pruned_and_counted() -> None:
    model, callback = Regression(mlp(), optimizer=SGD), PruningAtInit(0.5)
    fit(model, callback, Unfreezing())
    assert callback.target_names() == ["net.0.weight", "net.3.weight", "net.5.weight"]
    assert_masked(model, callback)


def test_callbacks_share_a_model_and_no_target() -> None:
    model, first, second = MLP(), PruningAtInit(0.5, targets=("net.0.*",)), MagnitudePruning(0.9, ignore=("net.0.*",))
    fit(model, first, second)
    assert zeros(model) == round(0.5 * 48) + round(0.9 * 110)
    with pytest.raises(ValueError, match="pruning callbacks must have disjoint targets, got"):
        fit(MLP(), PruningAtInit(0.5), PruningAtInit(0.9, targets=("net.6.*",)))


def test_a_copy_of_the_callback_has_the_masks_and_not_the_model() -> None:
    model, callback = Regression(nn.Linear(1000, 100), size=(1000,)), PruningAtInit(0.5)
    fit(model, callback)
    assert len(pickle.dumps(callback)) < 2 * 100_000 < model.net.weight.nbytes
    again = pickle.loads(pickle.dumps(callback))
    assert_equal(again.masks, callback.masks)
    assert (again.target_names(), again.sparsity_now, again.reached) == (["net.weight"], 0.5, True)


# ------------------------------------------------------------------------------------------------ without a trace


class Watched(ConvNet):
    """Counts what its training step sees, in a metric, a buffer and logs."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.accuracy = MulticlassAccuracy(3)
        self.register_buffer("calls", torch.zeros(()))
        self.shown: list[int] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.calls += 1
        batch[0].mul_(1 + 0.01 * random.random() + np.random.random())  # for all who use the batch behind it
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log_dict({"first": logits[0, 0], "noise": torch.rand(())}, on_step=True, on_epoch=True)
        return nn.functional.cross_entropy(logits, batch[1])


@pytest.mark.parametrize("criterion", [SNIP(), GraSP(), SynFlow(), Wanda(), Magnitude()], ids=label)
def test_a_run_that_prunes_nothing_is_the_dense_one_bit_by_bit(criterion: Criterion) -> None:
    runs = []
    for callbacks in ([], [PruningAtInit(0.0, criterion)]):
        model = Watched()
        seed_everything(1, verbose=False)
        trainer = fit(model, *callbacks)
        metrics = {name: value for name, value in trainer.callback_metrics.items() if "pruning" not in name}
        others = torch.tensor([random.random(), np.random.random()])
        runs.append({**state(model), **metrics, "random": torch.get_rng_state(), "others": others})
        assert leftovers(model, *trainer.optimizers) == []
    assert_equal(runs[1], runs[0])
    assert {"accuracy", "first_epoch", "calls"} <= runs[0].keys()
    assert runs[0]["calls"] == 8


# ------------------------------------------------------------------------------------------------ the loss


class InADict(MLP):
    def training_step(self, batch: list[Tensor]) -> dict[str, Tensor]:
        assert self.trainer.max_epochs == 2
        return {"loss": nn.functional.cross_entropy(self.net(batch[0]), batch[1])}

    def forward(self, inputs: Tensor) -> Tensor:
        raise AssertionError("only training_step knows what to do with a batch")


@pytest.mark.parametrize("criterion", [SNIP(), GraSP(), Wanda()], ids=label)
def test_the_loss_is_that_of_the_training_step(criterion: Criterion) -> None:
    model, plain = InADict(), MLP()
    callback = PruningAtInit(0.7, criterion)
    fit(model, callback, limit_val_batches=0)
    assert_equal(callback.masks, prune(plain, 0.7, criterion=criterion, data=[first(plain)], loss=training_loss))


def squares(model: nn.Module, batch: list[Tensor]) -> Tensor:
    assert model.training
    return model(batch[0]).square().mean()


def test_a_loss_of_ones_own() -> None:
    model, plain = MLP(), MLP()
    callback = PruningAtInit(0.7, loss=squares)
    fit(model, callback)
    own = partial(prune, sparsity=0.7, criterion=SNIP(), data=[first(plain)])
    expected = own(copy.deepcopy(plain), loss=lambda model, batch: squares(model.train(), batch))
    others = own(plain, loss=training_loss)
    assert_equal(callback.masks, expected)
    assert any(not torch.equal(mask, others[name]) for name, mask in expected.items())


def test_steps_by_hand_need_a_loss() -> None:
    with pytest.raises(ValueError, match="loss must be given where training_step optimizes by hand, got None"):
        fit(TwoOptimizers(), PruningAtInit(0.5))
    model = TwoOptimizers()
    fit(model, PruningAtInit(0.5, loss=loss))
    assert zeros(model) == round(0.5 * size(model))
    model = TwoOptimizers()
    fit(model, PruningAtInit(0.5, Magnitude()))
    assert zeros(model) == round(0.5 * size(model))


class Detector(MLP):
    """Returns its loss in training mode only, and takes what it needs out of the batch."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert self.training
        assert batch.extra == "kept"
        return nn.functional.cross_entropy(self.net(batch.pop("inputs")), batch.pop("labels"))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(super().train_dataloader().dataset, batch_size=8, collate_fn=Named.of)


class Named(dict):
    """A batch with an attribute of its own."""

    extra = "kept"

    @classmethod
    def of(cls, samples: list[tuple[Tensor, Tensor]]) -> "Named":
        return cls(zip(("inputs", "labels"), map(torch.stack, zip(*samples, strict=True)), strict=True))


@pytest.mark.parametrize("criterion", [SNIP(), GraSP(), Wanda(), Magnitude()], ids=label)
def test_passes_are_training_steps_on_a_copy_of_the_batch(criterion: Criterion) -> None:
    model = Detector()
    fit(model, PruningAtInit(0.5, criterion, rounds=3), max_epochs=1, limit_val_batches=0)
    assert zeros(model) == round(0.5 * size(model))


class Skipping(MLP):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        return None


def test_a_step_without_a_loss_is_refused_and_changes_nothing() -> None:
    model = Skipping()
    before = state(model)
    with pytest.raises(ValueError, match="loss must be given where training_step returns none, which returned None"):
        fit(model, PruningAtInit(0.5))
    assert_equal(state(model), before)


# ------------------------------------------------------------------------------------------------ ways to train


class HalfFrozen(Regression):
    """A part in bfloat16 that autocasting alone lets work with the rest."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.net[3].requires_grad_(False).to(torch.bfloat16)


@pytest.mark.parametrize("criterion", [SNIP(), GraSP(), Wanda()], ids=label)
def test_passes_are_autocast_as_steps_are(criterion: Criterion) -> None:
    model, callback = HalfFrozen(), PruningAtInit(0.5, criterion)
    fit(model, callback, precision="bf16-mixed", limit_val_batches=0)
    assert_masked(model, callback)
    assert list(callback.masks) == ["net.0.weight", "net.5.weight"]


@pytest.mark.parametrize("criterion", [SNIP(), GraSP(), SynFlow(), Wanda()], ids=label)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision: str, criterion: Criterion) -> None:
    model, callback = Regression(mlp()), PruningAtInit(0.5, criterion)
    with Probe(model, callback) as probe:
        fit(model, callback, precision=precision)
    assert not probe.dense
    assert_masked(model, callback)


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True], ids=["the whole", "a part"])
@pytest.mark.parametrize("criterion", [SNIP(), GraSP(), SynFlow(), Wanda()], ids=label)
def test_a_compiled_model(criterion: Criterion, inside: bool) -> None:
    torch.manual_seed(0)
    net = mlp()
    one, other = (Regression(copy.deepcopy(net)) for _ in range(2))
    one.net = torch.compile(one.net, backend="eager") if inside else one.net
    callbacks = PruningAtInit(0.5, criterion), PruningAtInit(0.5, criterion)
    fit(one if inside else torch.compile(one, backend="eager"), callbacks[0])
    fit(other, callbacks[1])
    assert_equal(callbacks[0].masks, callbacks[1].masks)
    assert zeros(one) == round(0.5 * size(one))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (partial(PruningAtInit, 90), r"sparsity must be in \[0, 1\), got 90"),
        (PruningAtInit, "give either sparsity or threshold, got sparsity=None and threshold=None"),
        (partial(PruningAtInit, 0.9, rounds=0), "rounds must be at least 1, got 0"),
        (partial(PruningAtInit, 0.9, scope="globl"), "scope must be .* got 'globl'"),
        (partial(PruningAtInit, 0.9, min_density=0.2), "min_density must be at most 1 - sparsity, got 0.2"),
    ],
)
def test_arguments_are_checked_at_once(make: Callable[[], Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()


def test_what_cannot_be_pruned_is_refused_before_the_first_step() -> None:
    held = MLP()
    held.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"copy\.deepcopy can copy for PruningAtInit, got MLP \(cannot pickle"):
        fit(held, PruningAtInit(0.5))
    with pytest.raises(ValueError, match=r"targets must match a parameter, got 'ent\.\*'; close names:"):
        fit(MLP(), PruningAtInit(0.5, targets=("ent.*",)))
    lazy = Regression(nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 1)))
    with pytest.raises(ValueError, match="the model must have no uninitialised parameters: run a batch through it"):
        fit(lazy, PruningAtInit(0.5))

    class Blind(Tiny):
        def build(self, dropout: float) -> nn.Sequential:
            self.unused = nn.Linear(3, 3)
            return nn.Sequential(nn.Linear(6, 3))

    with pytest.raises(ValueError, match=r"SNIP needs a gradient of 'unused\.weight', got none in 1 steps"):
        fit(Blind(), PruningAtInit(0.5))


@pytest.mark.parametrize("frozen", [("net.4.weight",), ("net.0.weight", "net.4.weight", "net.6.weight")])
def test_targets_that_are_frozen_in_a_later_fit_keep_their_zeros_and_count(frozen: tuple[str, ...]) -> None:
    model, callback = MLP(), PruningAtInit(0.5)
    fit(model, callback)
    masks = {name: mask.clone() for name, mask in callback.masks.items()}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    fit(model, callback)
    assert masks.keys() == callback.masks.keys()
    assert all(torch.equal(mask, callback.masks[name]) for name, mask in masks.items())
    assert callback.sparsity_now == 0.5
    assert agrees(model, masks)
