"""Reconstruction: what is left of each block is fitted to the dense outputs, with less error and the same zeros."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import (
    NM,
    APoZ,
    Channel,
    Criterion,
    Granularity,
    Magnitude,
    Masks,
    Random,
    Reconstruction,
    ResidualChannel,
    Sensitivity,
    SharedFanIn,
    Wanda,
    Weight,
    prune,
    shrink,
    sparsity,
)

FAST = Reconstruction(steps=20, lr=1e-2)


class Block(nn.Module):
    """Takes what comes along as keywords, too, and gives more than one thing back, as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6)

    def forward(self, hidden: Tensor, scale: Tensor, *, shift: dict[str, Tensor]) -> tuple[Tensor, None]:
        return hidden + self.down(torch.relu(self.norm(self.up(hidden)) * scale + shift["by"])), None


class Stacked(nn.Module):
    """A stem, three blocks and a head, which returns a dict."""

    def __init__(self, keyword: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.blocks, self.head = nn.Linear(4, 6), nn.ModuleList(Block() for _ in range(3)), nn.Linear(6, 2)
        self.keyword = keyword

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden, also = self.stem(x), {"scale": x.mean(), "shift": {"by": x.std()}}
        for block in self.blocks:
            hidden = block(hidden=hidden, **also)[0] if self.keyword else block(hidden, **also)[0]
        return {"logits": self.head(hidden), "hidden": hidden, "name": "stacked"}


class Convolutions(nn.Module):
    """Two blocks of a convolution and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(2)]
        self.blocks = nn.Sequential(*blocks)
        for _ in range(20):
            self(torch.randn(8, 8, 6, 6) * 2 + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def batches(count: int = 3, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, *(shape or (4,)), generator=generator) for _ in range(count)]


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)["logits"].square().mean()


def outputs(model: nn.Module, data: list[Tensor]) -> Tensor:
    with torch.no_grad():
        found = [model.eval()(batch) for batch in data]
    return torch.cat([torch.cat([one["logits"], one["hidden"]], 1) if isinstance(one, dict) else one for one in found])


def error(model: nn.Module, dense: nn.Module, data: list[Tensor]) -> float:
    return float((outputs(model, data) - outputs(dense, data)).square().mean())


# ---------------------------------------------------------------------------------------------------- what is reached


def test_a_linear_layer_reaches_the_least_squares_of_the_weights_that_are_left() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(6, 3)
    model, data = copy.deepcopy(dense), batches(2, 6)
    masks = prune(model, 0.5, scope="local", data=data, reconstruct=Reconstruction(2000, 1e-2))
    x = torch.cat(data)
    with torch.no_grad():
        wanted = dense(x)
    for row, mask in enumerate(masks["weight"]):
        inputs = torch.cat([x[:, mask], torch.ones(len(x), 1)], 1)
        best = torch.linalg.lstsq(inputs, wanted[:, row]).solution
        left = torch.cat([model.weight[row][mask], model.bias[row, None]])
        torch.testing.assert_close(left, best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sequential", [None, "blocks"])
@pytest.mark.parametrize("criterion", [Wanda(), Magnitude(), Sensitivity(window=3)])
@pytest.mark.parametrize("keyword", [False, True])
def test_the_error_falls_and_the_zeros_stay(criterion: Criterion, sequential: str | None, keyword: bool) -> None:
    dense, data = Stacked(keyword), batches()
    common: dict[str, Any] = {"criterion": criterion, "scope": "local", "data": data, "targets": ["blocks.*"]}
    common["loss"] = loss if criterion.needs == "gradients" else None
    plain, model = copy.deepcopy(dense), copy.deepcopy(dense)
    prune(plain, 0.5, **common, sequential=sequential if criterion.needs == "forwards" else None)
    masks = prune(model, 0.5, **common, sequential=sequential, reconstruct=FAST)
    assert error(model, dense, data) < 0.8 * error(plain, dense, data)
    assert sparsity(model, ["blocks.*"]) == masks.sparsity == 0.5
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert torch.equal(weight != 0, mask), name
    for name in ("stem.weight", "stem.bias", "head.weight"):  # no targets, and outside of the blocks
        if sequential or "weight" in name:
            assert torch.equal(model.get_parameter(name), dense.get_parameter(name)), name


@pytest.mark.parametrize("granularity", [Weight(), NM(2, 4), SharedFanIn(2), Channel(coupled=False)])
def test_masks_of_every_granularity_are_kept(granularity: Granularity) -> None:
    model, data = Stacked(), batches()
    masks = prune(
        model, 0.5, granularity=granularity, scope="local", data=data, sequential="blocks", reconstruct=FAST,
        example_inputs=data[0], targets=["blocks.*.up.weight"],
    )  # fmt: skip
    assert len(masks) == 3 * (4 if granularity.follows else 1)  # with biases and norms
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in masks.items())


def test_what_lies_outside_of_the_blocks_is_fitted_to_the_outputs_of_the_model() -> None:
    dense, data = Stacked(), batches()
    plain, model = copy.deepcopy(dense), copy.deepcopy(dense)
    common: dict[str, Any] = {"criterion": Wanda(), "scope": "local", "data": data, "targets": ["head.weight"]}
    prune(plain, 0.5, **common, sequential="blocks")
    prune(model, 0.5, **common, sequential="blocks", reconstruct=FAST)
    assert error(model, dense, data) < 0.7 * error(plain, dense, data)
    assert torch.equal(model.blocks[0].up.weight, dense.blocks[0].up.weight)
    assert torch.equal(model.blocks[0].up.bias, dense.blocks[0].up.bias)


def test_a_block_is_fitted_to_the_dense_outputs_behind_the_fitted_blocks() -> None:
    dense, data = Stacked(), batches()
    at_once, by_hand = copy.deepcopy(dense), copy.deepcopy(dense)
    common: dict[str, Any] = {"criterion": Wanda(), "scope": "local", "data": data, "sequential": "blocks"}
    masks = prune(at_once, 0.5, **common, targets=["blocks.*"], reconstruct=FAST)
    first = prune(by_hand, 0.5, **common, targets=["blocks.0.*"], reconstruct=FAST)
    for name, mask in first.items():
        assert torch.equal(mask, masks[name])
        assert torch.equal(by_hand.get_parameter(name), at_once.get_parameter(name))

    # the second block makes up for errors of the first
    def behind(model: Stacked, number: int) -> Tensor:
        short = copy.deepcopy(model)
        short.blocks, short.head = short.blocks[:number], nn.Identity()
        return outputs(short, data)

    second = copy.deepcopy(dense)
    prune(second, 0.5, **common, targets=["blocks.0.*", "blocks.1.*"], reconstruct=FAST)
    without = copy.deepcopy(second)
    with torch.no_grad():
        for name, value in dense.blocks[1].named_parameters():
            mask = masks.get(f"blocks.1.{name}")
            without.blocks[1].get_parameter(name).copy_(value if mask is None else value * mask)
    errors = [(behind(model, 2) - behind(dense, 2)).square().mean() for model in (second, without)]
    assert errors[0] < errors[1]


def test_batch_norms_are_measured_again_and_fitted() -> None:
    dense, data = Convolutions(), batches(3, 8, 6, 6)
    plain, model = copy.deepcopy(dense), copy.deepcopy(dense)
    common: dict[str, Any] = {"criterion": Wanda(), "scope": "local", "data": data, "sequential": "blocks"}
    prune(plain, 0.8, **common)
    prune(model, 0.8, **common, reconstruct=FAST)
    assert error(model, dense, data) < 0.8 * error(plain, dense, data)
    norms, before = model.blocks[0][1], dense.blocks[0][1]
    assert not torch.equal(norms.weight, before.weight)
    assert norms.momentum == before.momentum
    assert norms.training == before.training


def test_statistics_of_batch_norms_are_measured_again_where_that_lowers_the_error() -> None:
    dense, data = Convolutions(), batches(3, 8, 6, 6)
    with torch.no_grad():
        dense.blocks[0][0].weight.abs_()  # so that the mean of the outputs falls with the weights
        dense.train()
        for batch in data * 10:
            dense(batch.abs())
    model, data = copy.deepcopy(dense), [batch.abs() for batch in data]
    prune(model, 0.8, criterion=Wanda(), data=data, sequential="blocks", reconstruct=Reconstruction(1, 1e-6))
    before, after = dense.blocks[0][1].running_mean, model.blocks[0][1].running_mean
    with torch.no_grad():
        mean = model.blocks[0][0](torch.cat(data)).mean((0, 2, 3))
    torch.testing.assert_close(after, mean, rtol=0.01, atol=0.01)
    assert (before - after).abs().min() > 0.1


def test_batch_norms_of_finished_blocks_are_not_measured_with_the_rest_of_the_model() -> None:
    data = batches(3, 8, 6, 6)
    model = Convolutions()
    model.blocks.append(nn.Flatten())
    model = nn.Sequential(model, nn.Linear(8 * 36, 2))
    before = copy.deepcopy(model)
    common: dict[str, Any] = {"criterion": Wanda(), "data": [batch * 2 for batch in data], "sequential": "0.blocks"}
    prune(model, 0.5, **common, targets=["1.weight"], reconstruct=FAST)
    assert not torch.equal(model[1].weight, before[1].weight)
    assert all(torch.equal(value, before[0].state_dict()[name]) for name, value in model[0].state_dict().items())


def test_a_batch_of_one_leaves_the_statistics_of_batch_norms() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    prune(model, 0.5, data=[torch.randn(1, 4)], reconstruct=FAST)
    assert model[1].running_mean.tolist() == [0.0] * 4


# ----------------------------------------------------------------------------------------------------- what is kept


def test_no_learning_rate_makes_the_error_larger() -> None:
    dense, data = Stacked(), batches()
    plain, model = copy.deepcopy(dense), copy.deepcopy(dense)
    common: dict[str, Any] = {"criterion": Wanda(), "scope": "local", "data": data, "sequential": "blocks"}
    prune(plain, 0.5, **common)
    prune(model, 0.5, **common, reconstruct=Reconstruction(3, 1e6))
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_learning_rate_that_is_too_high_is_lowered() -> None:
    dense, data = Stacked(), batches()
    plain, model = copy.deepcopy(dense), copy.deepcopy(dense)
    common: dict[str, Any] = {"criterion": Wanda(), "scope": "local", "data": data, "sequential": "blocks"}
    prune(plain, 0.5, **common)
    prune(model, 0.5, **common, reconstruct=Reconstruction(20, 1.0))
    assert error(model, dense, data) < error(plain, dense, data)


def test_it_is_the_same_every_time_and_leaves_no_trace() -> None:
    data, found = batches(), []
    for seed in (0, 1):
        model = Stacked()
        model.head.weight.grad = torch.ones(2, 6)
        model.blocks[0].train()
        model.blocks[1].eval()
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        prune(model, 0.5, criterion=Wanda(), data=data, sequential="blocks", reconstruct=True, targets=["blocks.*"])
        assert torch.equal(torch.get_rng_state(), state)
        assert model.blocks[0].training
        assert not model.blocks[1].training
        assert torch.equal(model.head.weight.grad, torch.ones(2, 6))
        assert model.blocks[0].up.weight.grad is None
        assert all(parameter.grad is None for parameter in model.blocks.parameters())
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_frozen_and_ignored_weights_and_earlier_zeros_stay() -> None:
    model, data = Stacked(), batches()
    model.blocks[0].norm.requires_grad_(False)
    with torch.no_grad():
        model.blocks[0].up.weight[:, 0] = 0.0
    before = copy.deepcopy(model)
    prune(model, 0.25, criterion=Wanda(), data=data, sequential="blocks", ignore=["blocks.*.down.*"], reconstruct=FAST)
    for name in ("blocks.0.norm.weight", "blocks.0.norm.bias", "blocks.0.down.weight"):
        assert torch.equal(model.get_parameter(name), before.get_parameter(name)), name
    assert not model.blocks[0].up.weight[:, 0].any()
    assert not torch.equal(model.blocks[0].up.bias, before.blocks[0].up.bias)


class Residual(nn.Module):
    """A residual stream between a stem and a head, with norms over it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(4, 8), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))
        self.branch = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stem(x)
        return self.head(hidden + self.branch(hidden))


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("criterion", [Magnitude(), APoZ(window=3), Sensitivity(window=3)])
def test_norms_of_the_dense_model_see_all_channels_of_a_stream(criterion: Criterion, rounds: int) -> None:
    dense, data = Residual(), batches()
    plain, model = copy.deepcopy(dense), copy.deepcopy(dense)
    common: dict[str, Any] = {"criterion": criterion, "data": data, "example_inputs": data[0], "rounds": rounds}
    common["granularity"] = ResidualChannel()
    common["loss"] = (lambda net, batch: net(batch).square().mean()) if criterion.needs == "gradients" else None
    expected = prune(plain, 0.5, **common)
    masks = prune(model, 0.5, **common, reconstruct=Reconstruction(100, 1e-2))
    assert all(torch.equal(mask, expected[name]) for name, mask in masks.items())
    assert error(model, dense, data) < 0.5 * error(plain, dense, data)
    small = shrink(model, example_inputs=data[0])
    torch.testing.assert_close(outputs(small, data), outputs(model, data))


def test_channels_of_the_stream_are_not_taken_block_by_block() -> None:
    with pytest.raises(ValueError, match="sequential must be None for ResidualChannel"):
        prune(
            Residual(), 0.5, granularity=ResidualChannel(), data=batches(), example_inputs=batches()[0],
            sequential="branch", reconstruct=True,
        )  # fmt: skip


@pytest.mark.parametrize("criterion", [Wanda(), Random()])
def test_rounds_are_pruned_first(criterion: Criterion) -> None:
    dense, data = Stacked(), batches()
    plain, model = copy.deepcopy(dense), copy.deepcopy(dense)
    common: dict[str, Any] = {"criterion": criterion, "scope": "local", "rounds": 2, "targets": ["blocks.*"]}
    sequential = "blocks" if criterion.needs == "forwards" else None
    expected = prune(plain, 0.5, **common, data=data, sequential=sequential)
    masks = prune(model, 0.5, **common, data=iter(data), sequential="blocks", reconstruct=FAST)
    assert masks.keys() == expected.keys()
    assert all(torch.equal(mask, expected[name]) for name, mask in masks.items())
    assert error(model, dense, data) < error(plain, dense, data)


def test_no_more_than_the_inputs_and_outputs_of_one_block_are_held() -> None:
    model, data = Stacked(), batches()
    alive: list[Any] = []
    peak = 0

    def watch(module: nn.Module, args: Any, output: tuple[Tensor, None]) -> None:
        nonlocal peak
        alive.append(torch.multiprocessing.reductions.StorageWeakRef(output[0].untyped_storage()))
        peak = max(peak, sum(not reference.expired() for reference in alive))

    for block in model.blocks:
        block.register_forward_hook(watch)
    prune(model, 0.5, criterion=Wanda(), data=data, sequential="blocks", targets=["blocks.*"], reconstruct=FAST)
    assert peak <= 2 * len(data) + 2


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"data": None, "criterion": Magnitude()}, "data must be given to refine masks or to reconstruct, got None"),
        ({"data": [], "criterion": Magnitude()}, "data must have a batch, got none"),
        (
            {"recalibrate": 1},
            "recalibrate and distributed must be left out with refine and reconstruct, got 1 and False",
        ),
        ({"reconstruct": 5}, "reconstruct must be a Reconstruction, got 5"),
        (
            {"model": Stacked().bfloat16()},
            "targets must be of float32 or float64 to be reconstructed, got torch.bfloat16",
        ),
    ],
)
def test_what_cannot_be_reconstructed_is_refused(wrong: dict[str, Any], message: str) -> None:
    given = {"model": Stacked(), "criterion": Wanda(), "data": batches(), "reconstruct": True, **wrong}
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        prune(given.pop("model"), 0.5, **given)


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("lr", 0.0), ("lr", float("inf"))])
def test_settings_are_checked(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        Reconstruction(**{name: value})


def test_false_reconstructs_nothing() -> None:
    plain, model = Stacked(), Stacked()
    expected: Masks = prune(plain, 0.5)
    masks = prune(model, 0.5, reconstruct=False)
    assert masks.keys() == expected.keys()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
