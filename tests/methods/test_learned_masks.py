"""Learned masks: against MaskLLM written by hand, and what every moment of a run sees of the weights."""

import copy
import itertools
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import SAM
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from models import BATCHES, MLP, ConvNet, On, Tiny, TwoOptimizers, agrees, fit, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import NM, Distillation, LearnedMasks, Magnitude, Masks, Wanda, prune, sparsity
from lightning_prune.methods.pattern_logits import (
    Draw,
    PatternLogits,
    groups,
    gumbel,
    most_likely,
    patterns,
    prior_logits,
)

EPOCHS = 3


def start(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def valid(masks: dict[str, Tensor], n: int = 2, m: int = 4) -> bool:
    """Whether every whole group of m along the inputs keeps n."""
    return all(bool((groups(mask, 1, m).sum(-1) == n).all()) for mask in masks.values())


def exact(model: nn.Module, callback: LearnedMasks, before: dict[str, Tensor]) -> bool:
    """Whether every parameter is what it was, bit for bit, or zero where its mask prunes it."""
    return all(
        torch.equal(
            parameter, torch.where(callback.masks[name], before[name], 0.0) if name in callback.masks else before[name]
        )
        for name, parameter in model.named_parameters()
    )


# ------------------------------------------------------------------------------------------------ by hand


def soft(logits: Tensor, weight: Tensor, mask: Tensor, draw: Draw, name: str, n: int, m: int) -> Tensor:
    """A linear layer's weight under the soft mask, as the paper has it."""
    noise = gumbel(logits, draw.generator(name, logits.device))
    likely = ((logits * draw.scale + noise) / draw.temperature).softmax(0)
    whole = weight.shape[1] // m * m
    inside = (likely.T @ patterns(n, m).to(likely)).view(len(weight), -1)
    return weight * torch.cat([inside, mask[:, whole:].to(likely)], 1)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (4, 8)])
@pytest.mark.parametrize("regularization", [0.0, 0.3])
def test_the_gradient_of_the_logits_is_that_of_autograd(n: int, m: int, regularization: float) -> None:
    weight, upstream = torch.randn(6, 19, dtype=torch.float64), torch.randn(6, 19, dtype=torch.float64)
    mask = prune_by_magnitude(weight, n, m)
    logits = prior_logits(mask, 1, n, m, 3.0, torch.float64)
    parameter, draw = nn.Parameter(weight.clone()), Draw(0, 5, 0.7, 50.0)
    each = PatternLogits("w", parameter, 1, n, m, nn.Parameter(logits.clone()), weight.clone())
    logits.requires_grad_()
    expected = soft(logits, weight, mask, draw, "w", n, m)
    inside = expected[:, : 19 // m * m]
    ((expected * upstream).sum() - regularization * inside.square().sum()).backward()
    each.soften(draw, mask)
    torch.testing.assert_close(parameter.detach(), expected.detach())
    parameter.grad = upstream.clone()
    each.take_gradient(draw, regularization)
    torch.testing.assert_close(each.logits.grad, logits.grad)
    assert logits.grad.abs().max() > 1e-3
    assert parameter.grad is None
    assert torch.equal(each.dense, weight)
    assert torch.equal(each.choose(mask), mask)


def prune_by_magnitude(weight: Tensor, n: int, m: int) -> Tensor:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    return prune(layer, 1 - n / m, granularity=NM(n, m))["weight"]


def by_hand(model: MLP, make: Callable[..., torch.optim.Optimizer], clip: float) -> dict[str, Tensor]:
    """MaskLLM with the forward pass of the paper, and return the logits."""
    base = {name: weight.double() for name, weight in weights(model).items()}
    masks = {name: prune_by_magnitude(weight, 2, 4) for name, weight in base.items()}
    learned = {name: nn.Parameter(prior_logits(masks[name], 1, 2, 4, 3.0, torch.float64)) for name in base}
    optimizer, steps = make(learned.values()), EPOCHS * BATCHES
    for step in range(steps):
        done = step / (steps - 1)
        draw = Draw(0, step, 4.0 + done * (0.05 - 4.0), 100.0 + done * 400.0)
        seen = {name: soft(learned[name], base[name], masks[name], draw, name, 2, 4) for name in base}
        inputs, labels = list(model.train_dataloader())[step % BATCHES]
        optimizer.zero_grad()
        outputs = torch.func.functional_call(model.double(), seen, (inputs.double(),))
        loss = nn.functional.cross_entropy(outputs, labels)
        for weight in seen.values():
            loss = loss - 1e-5 * weight[:, : weight.shape[1] // 4 * 4].square().sum()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(learned.values(), clip)
        optimizer.step()
    return {name: logits.detach() for name, logits in learned.items()}


@pytest.mark.parametrize("clip", [0.0, 0.01])
@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.AdamW, lr=0.01),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    ],
    ids=["adamw", "sgd"],
)
def test_a_run_equals_the_soft_masks_of_the_paper(make: Callable[..., torch.optim.Optimizer], clip: float) -> None:
    model = MLP()
    expected = by_hand(copy.deepcopy(model), make, clip)
    model.configure_optimizers = lambda: make(model.parameters())
    callback = LearnedMasks(2, 4)
    fit(
        model,
        callback,
        gradient_clip_val=clip or None,
        max_epochs=EPOCHS,
        limit_val_batches=0,
        precision="64-true",
    )
    for name, logits in callback.state.logits.items():
        torch.testing.assert_close(logits.detach(), expected[name], rtol=0, atol=1e-7)
    first = prune(MLP(), 0.5, granularity=NM(2, 4))
    assert clip or any(not torch.equal(mask, callback.masks[name]) for name, mask in first.items())


# ------------------------------------------------------------------------------------------------ it learns


class Regression(LightningModule):
    """A linear layer that is to output what it outputs with all of its weights, from inputs of different sizes."""

    def __init__(self, correlated: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.layer = nn.Linear(8, 12, bias=False)
        self.layer.weight.data.normal_(generator=generator)
        mixing = torch.randn(8, 8, generator=generator) if correlated else torch.eye(8)
        self.inputs = torch.randn(256, 8, generator=generator) @ (mixing * torch.logspace(-1, 0.5, 8))
        self.outputs = self.layer(self.inputs).detach()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.layer(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.003)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.inputs, self.outputs), batch_size=64)

    @torch.no_grad()
    def errors(self, masks: Tensor) -> Tensor:
        """The error of each output under masks, (ways, outputs, inputs)."""
        return ((self.inputs @ (self.layer.weight * masks).mT) - self.outputs).square().mean(1)


@pytest.mark.parametrize(("correlated", "close", "rows"), [(False, 1.01, 9), (True, 1.25, 4)])
def test_it_finds_masks_that_magnitude_does_not(correlated: bool, close: float, rows: int) -> None:
    model = Regression(correlated)
    pairs = itertools.product(patterns(2, 4), repeat=2)
    ways = torch.stack([torch.cat(pair) for pair in pairs])[:, None].expand(-1, 12, -1)
    best = model.errors(ways).amin(0)  # of the 36 ways for each row
    magnitude = model.errors(prune(copy.deepcopy(model), 0.5, granularity=NM(2, 4))["layer.weight"][None])[0]
    fit(model, callback := LearnedMasks(2, 4), max_epochs=100)
    learned = model.errors(callback.masks["layer.weight"][None])[0]
    assert magnitude.sum() > 2.5 * best.sum()
    assert learned.sum() < close * best.sum()
    assert (learned <= best * 1.0001).sum() >= rows


# ------------------------------------------------------------------------------------------------ every moment


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("kind", [MLP, ConvNet])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2)])
def test_training_sees_soft_masks_and_everything_else_hard_ones(
    n: int, m: int, kind: type[Tiny], accumulate: int, tmp_path: Path
) -> None:
    model, callback, seen = kind(optimizer="adam"), LearnedMasks(n, m), {"training": 0, "validation": 0, "between": 0}
    before, step, validate = start(model), model.training_step, model.validation_step

    def hard(when: str) -> None:
        assert valid(callback.masks, n, m)
        assert exact(model, callback, before)
        seen[when] += 1

    def soft_step(batch: list[Tensor], batch_idx: int) -> Tensor:
        for name, each in callback.state.learned.items():
            expected = copy.deepcopy(each)
            expected.soften(callback.state.draw, callback.masks[name])
            assert torch.equal(expected.weight, model.get_parameter(name))
            early = model.trainer.global_step < 4 and each.logits.numel()
            assert not (early and agrees(model, {name: callback.masks[name]}))
        seen["training"] += 1
        return step(batch, batch_idx)

    def hard_validation(batch: list[Tensor], batch_idx: int) -> None:
        hard("validation")
        validate(batch, batch_idx)

    model.training_step, model.validation_step = soft_step, hard_validation
    between = On(on_train_batch_end=lambda *anything: hard("between"))
    keys = list(model.state_dict())
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer_kwargs = {"accumulate_grad_batches": accumulate, "val_check_interval": 1, "enable_checkpointing": True}
    fit(model, between, callback, saver, max_epochs=EPOCHS, **trainer_kwargs)
    assert seen == {"training": EPOCHS * BATCHES, "validation": EPOCHS * BATCHES, "between": EPOCHS * BATCHES}
    assert exact(model, callback, before)
    assert list(model.state_dict()) == keys
    assert callback.sparsity_now == pytest.approx(callback.masks.sparsity)
    assert callback.sparsity_now == pytest.approx(sparsity(model))
    for path in tmp_path.glob("*.ckpt"):
        saved = torch.load(path, weights_only=True)
        (state,) = (value for key, value in saved["callbacks"].items() if "LearnedMasks" in key)
        for name, weight in state["dense"].items():
            assert torch.equal(weight, before[name])
            assert ((saved["state_dict"][name] == weight) | (saved["state_dict"][name] == 0)).all()


def test_the_noise_of_a_step_is_its_own_and_the_same_again() -> None:
    parameter = nn.Parameter(torch.randn(4, 8))
    logits = nn.Parameter(torch.zeros(6, 8))
    each = PatternLogits("w", parameter, 1, 2, 4, logits, parameter.detach().clone())
    (first,), (again,), (later,) = (
        [likely for _, likely in each.probabilities(Draw(0, step, 1.0, 100.0))] for step in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, later)


def test_the_noise_follows_the_gumbel_distribution() -> None:
    noise = gumbel(torch.empty(1_000_000), torch.Generator().manual_seed(0))
    assert noise.isfinite().all()
    assert noise.mean() == pytest.approx(0.5772, abs=0.005)
    assert noise.var() == pytest.approx(1.6449, abs=0.02)


def test_the_most_likely_pattern_is_the_first_of_equals() -> None:
    logits = torch.randint(0, 4, (6, 500), generator=torch.Generator().manual_seed(0)).float()
    expected = [column.index(max(column)) for column in logits.T.tolist()]
    assert most_likely(logits).tolist() == expected


def test_an_interrupted_run_leaves_hard_masks_and_the_weights(tmp_path: Path) -> None:
    model, callback = MLP(optimizer="adam"), LearnedMasks(2, 4)
    before, step = start(model), model.training_step

    def fail(batch: list[Tensor], batch_idx: int) -> Tensor:
        if model.trainer.global_step == 3:
            raise RuntimeError("interrupted")
        return step(batch, batch_idx)

    model.training_step = fail
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(model, callback)
    assert exact(model, callback, before)
    assert valid(callback.masks)
    assert all(torch.equal(weight, before[name]) for name, weight in callback.state.dense.items())
    assert not callback.state.learned, "the model is held after training"


# ------------------------------------------------------------------------------------------------ ways to train


def test_accumulated_gradients_are_those_of_one_large_batch() -> None:
    class Halves(MLP):
        def build(self, dropout: float) -> nn.Sequential:
            net = super().build(dropout)
            net[1] = nn.LayerNorm(8)
            return net

        def train_dataloader(self) -> Any:
            return DataLoader(super().train_dataloader().dataset, self.batch)

    ends = []
    for batch, times in ((8, 1), (4, 2)):
        model, callback = Halves(), LearnedMasks(2, 4)
        model.batch = batch
        fit(model, callback, accumulate_grad_batches=times, max_epochs=EPOCHS, limit_val_batches=0)
        ends.append(callback.state.logits)
    for name, logits in ends[0].items():
        torch.testing.assert_close(logits, ends[1][name], rtol=0, atol=1e-5)


def test_weights_in_bfloat16_have_logits_in_single_precision() -> None:
    model = MLP(optimizer="adam").bfloat16()
    before = start(model)
    fit(model, callback := LearnedMasks(2, 4), precision="bf16-true", max_epochs=EPOCHS)
    assert {logits.dtype for logits in callback.state.logits.values()} == {torch.float32}
    assert exact(model, callback, before)
    assert callback.sparsity_now == pytest.approx(0.5, abs=0.02)


def test_skipped_steps_change_nothing_and_fused_gradients_are_scaled_alike() -> None:
    class Overflow(MLP):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (torch.inf if batch_idx == 1 else 1.0)

    ends = []
    for fused in (False, True):
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
        model, callback, seen = Overflow(), LearnedMasks(2, 4, regularization=0.1), []
        before = start(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
        model.configure_optimizers = lambda optimizer=optimizer: optimizer

        def look(*anything: Any, model: Any = model, callback: Any = callback, before: Any = before) -> None:
            assert exact(model, callback, before)

        def note(*anything: Any, callback: Any = callback, seen: Any = seen) -> None:
            seen.append({name: logits.detach().clone() for name, logits in callback.state.logits.items()})

        fit(model, On(on_train_batch_end=look), callback, On(on_train_batch_end=note), plugins=[plugin], max_epochs=1)
        assert all(torch.equal(seen[0][name], logits) for name, logits in seen[1].items())
        assert not any(torch.equal(seen[2][name], logits) for name, logits in seen[1].items())
        ends.append(seen[-1])
    for name, logits in ends[0].items():
        torch.testing.assert_close(ends[1][name], logits, rtol=1e-3, atol=1e-4)


def test_manual_optimization_with_two_optimizers() -> None:
    model = TwoOptimizers()
    before, callback, seen = start(model), LearnedMasks(2, 4), []
    look = lambda *anything: seen.append(agrees(model, callback.masks))  # noqa: E731
    model.net.register_forward_pre_hook(look)
    fit(model, callback, max_epochs=EPOCHS, limit_val_batches=0)
    assert seen == [False] * EPOCHS * BATCHES * 2  # the second pass of a batch is under soft masks, too
    assert exact(model, callback, before)
    assert all(logits.abs().max() > 0.05 for logits in callback.state.logits.values())


def test_distillation_teaches_the_logits() -> None:
    ends = []
    for others in ([], [Distillation(weight=1.0)]):
        model, callback = MLP(optimizer="adam"), LearnedMasks(2, 4)
        before = start(model)
        fit(model, callback, *others, max_epochs=EPOCHS)
        assert exact(model, callback, before)
        ends.append(callback.state.logits["net.4.weight"])
    assert not torch.equal(*ends)


def test_what_is_to_be_trained_too_is_trained() -> None:
    model = MLP(optimizer="adam")
    before = start(model)
    fit(model, callback := LearnedMasks(2, 4, train=("bias",)), max_epochs=EPOCHS)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if name.endswith("bias")} | callback.masks.keys()


def test_groups_shorter_than_m_keep_the_masks_they_start_with() -> None:
    model = nn.Linear(3, 5)
    first = prune(copy.deepcopy(model), 0.5, granularity=NM(2, 4))

    class Short(MLP):
        size = (3,)

        def build(self, dropout: float) -> nn.Sequential:
            return nn.Sequential(copy.deepcopy(model))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.net(batch[0]).square().mean()

        validation_step = training_step

    prior = Masks({"net.0.weight": first["weight"]})
    short, callback = Short(optimizer="adam"), LearnedMasks(2, 4, prior)
    fit(short, callback)
    assert torch.equal(callback.masks["net.0.weight"], first["weight"])
    assert agrees(short, callback.masks)


# ------------------------------------------------------------------------------------------------ where it starts


def test_the_prior_is_the_masks_at_first() -> None:
    model = MLP()
    data = [batch[0] for batch in model.train_dataloader()]
    prior = prune(copy.deepcopy(model), 0.5, criterion=Wanda(), scope="local", granularity=NM(2, 4), data=data)
    for given, expected in ((prior, prior), (Magnitude(), prune(MLP(), 0.5, granularity=NM(2, 4)))):
        callback, first = LearnedMasks(2, 4, given), []
        fit(MLP(lr=0.0), callback, On(on_train_start=lambda *_, own=callback, to=first: to.append(own.masks)))
        for name, mask in expected.items():
            assert torch.equal(first[0][name], mask)
            assert torch.equal(callback.masks[name], mask), "a learning rate of zero changes nothing"


def test_weights_that_are_pruned_already_are_noticed() -> None:
    model = MLP()
    prune(model, 0.5, granularity=NM(2, 4))
    with pytest.warns(UserWarning, match="zero already in .*net.0.weight.*before it was pruned"):
        fit(model, LearnedMasks(2, 4))


def test_a_later_fit_goes_on_from_the_logits_and_the_weights_that_are_there() -> None:
    model, callback = MLP(optimizer="adam"), LearnedMasks(2, 4)
    before = start(model)
    fit(model, callback)
    between = {name: logits.detach().clone() for name, logits in callback.state.logits.items()}
    fit(model, callback, max_steps=1, max_epochs=-1)
    for name, logits in callback.state.logits.items():
        assert 0 < (logits - between[name]).abs().max() <= 0.0101
    assert exact(model, callback, before)
    other, fresh = MLP(seed=1), MLP(seed=1)
    fit(other, callback)
    fit(fresh, LearnedMasks(2, 4))
    assert all(torch.equal(weight, weights(fresh)[name]) for name, weight in weights(other).items())


def test_the_plan_says_what_is_trained() -> None:
    callback = LearnedMasks(2, 4)
    fit(MLP(), callback)
    lines = callback.explain().splitlines()
    assert lines[0] == "LearnedMasks to 2 of 4 weights kept, sparsity 0.5: 3 parameters, 158 weights"
    assert lines[-1] == "trained: 204 logits; temperature and scale reach their last values at step 8"


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LearnedMasks(4, 2), "n must be at least 1 and less than m, got n=4 and m=2"),
        (lambda: LearnedMasks(8, 16), "at most 256 ways to keep n of m, got 12,870 for n=8 and m=16"),
        (lambda: LearnedMasks(prior=Wanda()), "prior must score by the weights alone, got Wanda"),
        (lambda: LearnedMasks(prior="wanda"), "prior must be a Criterion, got"),
        (lambda: LearnedMasks(strength=0.0), "strength must be above 0, got 0.0"),
        (
            lambda: LearnedMasks(temperature=(1.0,)),
            "temperature must be two numbers, the first and the last, got (1.0,)",
        ),
        (lambda: LearnedMasks(scale=(0.0, 1.0)), "scale must be numbers in (0, inf), got 0.0"),
        (lambda: LearnedMasks(end=1.5), "end must be"),
    ],
)
def test_arguments_out_of_range_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("model", "callback", "message", "trainer_kwargs"),
    [
        (MLP(optimizer="lbfgs"), LearnedMasks(), "must not run the model inside its step for LearnedMasks", {}),
        (MLP(), LearnedMasks(prior=Masks()), "prior must have a mask for 'net.0.weight' of shape (8, 6), got none", {}),
        (
            MLP(),
            LearnedMasks(
                prior=Masks({f"net.{n}.weight": torch.ones(MLP().net[n].weight.shape).bool() for n in (0, 4, 6)})
            ),
            "prior must keep 2 of every 4 weights, got a mask that keeps [4] of 'net.0.weight'",
            {},
        ),
        (MLP(), LearnedMasks(train=("net.4.*",)), "train must have no targets in it", {}),
        (MLP(), LearnedMasks(), "end must be an int where the length of the run is unknown", {"max_epochs": -1}),
    ],
)
def test_runs_that_cannot_be_are_refused(
    model: MLP, callback: LearnedMasks, message: str, trainer_kwargs: dict[str, Any]
) -> None:
    before = start(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(model, callback, **trainer_kwargs)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_an_optimizer_that_runs_the_model_inside_its_step_is_refused() -> None:
    model = MLP()
    model.configure_optimizers = lambda: SAM(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="must not run the model inside its step for LearnedMasks, got SAM"):
        fit(model, LearnedMasks())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_longer_resumed_run_keeps_its_schedule_and_its_groups(tmp_path: Path) -> None:
    model = MLP(optimizer="adam")
    saver = ModelCheckpoint(tmp_path, "last")
    fit(model, LearnedMasks(2, 4), saver, enable_checkpointing=True)
    path = str(tmp_path / "last.ckpt")
    fit(MLP(optimizer="adam"), longer := LearnedMasks(2, 4), ckpt_path=path, max_epochs=4)
    assert longer.state.last == 2 * BATCHES
    with pytest.raises(ValueError, match=re.escape("got n=1 (2 before)")):
        fit(MLP(optimizer="adam"), LearnedMasks(1, 4), ckpt_path=path, max_epochs=4)
