"""Training goes on with a shrunk model as it would have gone on with the masked one."""

import sys
import warnings
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CASES, Case, build
from distributed import Layout, Net, rank, result
from distributed import fit as fit_ranks
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from models import MLP, Attending, ConvNet, agrees, fit
from ranks import run
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_prune import Channel, Head, Masks, Pruning, Weight, prune, shrink
from lightning_prune.structure.cut_record import cut_record_of
from lightning_prune.structure.surgery import cut

OPTIMIZERS: dict[str, Any] = {
    "sgd": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=0.001, amsgrad=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.001, centered=True),
    "adagrad": partial(torch.optim.Adagrad, lr=0.01),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, seed: int) -> None:
    goal = torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=inputs.dtype)
    optimizer.zero_grad()
    (model(inputs) - goal).square().mean().backward()
    optimizer.step()


def close(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-6) for a, b in pairs)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        *(("resnet_basic", "sgd"), ("resnet_basic", "adamw"), ("mobilenet", "rmsprop")),
        *(("densenet", "adagrad"), ("vgg", "adamw"), ("lstm", "adamw")),
    ],
)
def test_steps_after_shrinking_are_those_of_the_masked_model(name: str, optimizer: str) -> None:
    case: Case = CASES[name]
    model, inputs = build(case)
    model, inputs = model.double(), inputs.double()  # Adam and others divide by gradients, which may be all rounding
    masks = prune(model, 0.5, granularity=Channel(coupled=True), example_inputs=inputs)
    masked, stepping = model, OPTIMIZERS[optimizer](model.parameters())
    for seed in range(3):
        step(masked, stepping, inputs, seed)
        masks.apply(masked)
    small = deepcopy(masked)
    going_on = OPTIMIZERS[optimizer](small.parameters())
    going_on.load_state_dict(deepcopy(stepping.state_dict()))
    parameters = list(small.parameters())
    assert shrink(small, inputs, inplace=True, optimizers=[going_on]) is small
    assert all(a is b for a, b in zip(small.parameters(), parameters, strict=True))
    assert all(p.grad is None or p.grad.shape == p.shape for p in parameters)
    for seed in range(3, 6):
        step(masked, stepping, inputs, seed)
        masks.apply(masked)
        step(small, going_on, inputs, seed)
    kept = cut_record_of(small)
    assert kept is not None
    cut(masked, kept)
    assert close(masked, small)


@pytest.mark.parametrize("decay", [0.5, None], ids=["ema", "mean"])
def test_averages_shrink_along_and_go_on_averaging(decay: float | None) -> None:
    model, inputs = build(CASES["resnet_basic"])
    masks = prune(model, 0.5, granularity=Channel(coupled=True), example_inputs=inputs)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay) if decay else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for seed in range(2):
        step(model, optimizer, inputs, seed)
        masks.apply(model)
        average.update_parameters(model)
    before = deepcopy(average).eval()(inputs)
    shrink(model, inputs, inplace=True, optimizers=[optimizer], averages=[average])
    assert torch.allclose(average.eval()(inputs), before, rtol=1e-4, atol=1e-5)
    step(model, optimizer, inputs, 2)
    average.update_parameters(model)
    assert [p.shape for p in average.parameters()] == [p.shape for p in model.parameters()]


def test_a_channel_that_is_alive_in_an_average_stays_in_both() -> None:
    model, inputs = build(CASES["conv1d"])
    average = deepcopy(model)
    prune(model, 0.5, granularity=Channel(coupled=True), example_inputs=inputs)
    with pytest.warns(UserWarning, match="nothing was removed|stay in the model"):
        shrink(model, inputs, inplace=True, averages=[average])
    assert model[0].out_channels == average[0].out_channels == 8


def test_lbfgs_starts_afresh() -> None:
    model, inputs = build(CASES["vgg"])
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    prune(model, 0.5, granularity=Channel(coupled=True), example_inputs=inputs)
    shrink(model, inputs, inplace=True, optimizers=[optimizer])
    assert not optimizer.state
    assert optimizer.step(closure).isfinite()


def test_rows_and_columns_of_a_state_are_cut_and_what_is_neither_is_forgotten() -> None:
    model, inputs = build(CASES["vgg"])
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    step(model, optimizer, inputs, 0)
    optimizer.state[model[7].weight]["sketch"] = torch.zeros(3, 5, 7)
    prune(model, 0.5, granularity=Channel(coupled=True), example_inputs=inputs)
    with pytest.warns(UserWarning, match=r"Adafactor loses its state .* 'sketch' must have .* got \(3, 5, 7\)"):
        shrink(model, inputs, inplace=True, optimizers=[optimizer])
    assert model[7].weight not in optimizer.state
    rows = optimizer.state[model[9].weight]
    assert {tuple(value.shape) for value in rows.values() if value.numel() > 1} == {(5, 1), (1, model[9].in_features)}
    step(model, optimizer, inputs, 1)


# ------------------------------------------------------------------------------------------------ at the end of a run


@pytest.mark.parametrize(
    ("model", "granularity", "average"),
    [
        *((ConvNet, Channel(), "none"), (ConvNet, Channel(), "first"), (ConvNet, Channel(), "last")),
        (Attending, Head(), "last"),
    ],
    ids=["channels", "average-before", "average-behind", "heads"],
)
def test_a_run_ends_with_a_smaller_model_that_goes_on_training(model: Any, granularity: Any, average: str) -> None:
    coupled = Channel(coupled=True) if isinstance(granularity, Channel) else granularity

    def run(units: Any, shrinking: bool) -> tuple[Any, Pruning, Any]:
        trained = model(optimizer="adam")
        callback = Pruning(0.5, granularity=units, schedule="one_shot", start=1, shrink_at_end=shrinking)
        callbacks = [callback]
        if average != "none":
            callbacks.insert(0 if average == "first" else 1, EMAWeightAveraging(decay=0.5))
        return trained, callback, fit(trained, *callbacks)

    masked, reference, _ = run(coupled, False)
    small, callback, trainer = run(granularity, True)
    inputs = next(iter(masked.train_dataloader()))[0]
    assert agrees(masked, reference.masks)
    assert sum(p.numel() for p in small.parameters()) == sum(
        int(mask.sum()) for mask in reference.masks.values()
    ) + sum(p.numel() for name, p in masked.named_parameters() if name not in reference.masks)
    assert torch.allclose(small.eval()(inputs), masked.eval()(inputs), rtol=1e-5, atol=1e-6)
    assert callback.sparsity_now == reference.sparsity_now > 0.4  # of the targets as they were
    assert agrees(small, callback.masks)
    state = trainer.optimizers[0].state
    assert all(state[p]["exp_avg"].shape == p.shape for p in small.parameters() if p in state)
    trainer.validate(small, verbose=False)
    shapes = [parameter.shape for parameter in small.parameters()]
    fit(small.train(), max_epochs=1)
    assert [parameter.shape for parameter in small.parameters()] == shapes


@pytest.mark.parametrize("granularity", [Weight(), Channel(coupled=False)])
def test_only_channels_and_heads_can_be_removed(granularity: Any) -> None:
    with pytest.raises(ValueError, match=r"Layer\(\) or ResidualChannel\(\) to shrink the model, got"):
        Pruning(0.5, granularity=granularity, shrink_at_end=True)


def test_without_torch_pruning_training_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    model = ConvNet()
    before = deepcopy(model.state_dict())
    with pytest.raises(ImportError, match=r"pip install '\.\[shrink\]' in the repository"):
        fit(model, Pruning(0.5, granularity=Channel(), shrink_at_end=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_masks_of_what_is_left_fit_the_smaller_model() -> None:
    model, inputs = build(CASES["vgg"])
    masks = prune(model, 0.5, granularity=Channel(coupled=True), example_inputs=inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shrink(model, inputs, inplace=True)
    kept = cut_record_of(model)
    assert kept is not None
    Masks({name: kept.of_mask(name, mask) for name, mask in masks.items()}).check(dict(model.named_parameters()))


# ------------------------------------------------------------------------------------------------ ranks


def shrink_on(layout: Layout) -> dict[str, Any]:
    model = Net(layout)
    callback = Pruning(0.4, granularity=Channel(), of="flops", schedule="one_shot", start=1, shrink_at_end=True)
    torch.manual_seed(rank())
    fit_ranks(model, callback)
    return result(model, callback.masks)


def shrink_in_pieces() -> str:
    with pytest.raises(ValueError, match="needs whole parameters, got sharded ones") as error:
        shrink_on("fsdp")
    return str(error.value)


@pytest.mark.distributed
def test_with_ddp_every_rank_ends_with_the_small_model_of_one_process() -> None:
    expected = shrink_on("one")["weights"]
    assert sum(weight.numel() for weight in expected.values()) < sum(p.numel() for p in parameters_of_net())
    for found in run(shrink_on, 2, "ddp"):
        assert all(torch.allclose(found["weights"][name], weight, atol=1e-6) for name, weight in expected.items())


@pytest.mark.distributed
def test_pieces_of_parameters_are_refused_before_training() -> None:
    assert all("Channel(coupled=False)" in told for told in run(shrink_in_pieces, 2))


def parameters_of_net() -> list[Tensor]:
    model = Net()
    model.configure_model()
    return list(model.parameters())


@pytest.mark.parametrize("how", ["fit", "validate"])
def test_a_checkpoint_of_the_whole_model_is_refused_with_the_way_out(how: str, tmp_path: Path) -> None:
    model, callback = MLP(), Pruning(0.4, granularity=Channel(), schedule="one_shot", start=1, shrink_at_end=True)
    saves = ModelCheckpoint(tmp_path)
    trainer = fit(model, callback, saves, enable_checkpointing=True)
    with pytest.raises(RuntimeError, match=r"since shrink_at_end has cut it, got one of the whole model"):
        getattr(trainer, how)(model, ckpt_path=saves.best_model_path)
