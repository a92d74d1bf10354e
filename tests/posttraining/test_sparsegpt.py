"""SparseGPT: against brute force column by column, exact counts, and less error than masks without reconstruction."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import NM, Channel, SharedFanIn, prune, sparsegpt
from lightning_prune.posttraining.reconstruction import inverse_factor, reconstruct


def correlated(count: int, size: int, seed: int = 0) -> Tensor:
    """Inputs of very different scales that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator) * torch.rand(size, generator=generator).mul(3).exp()
    return torch.randn(count, size, generator=generator) @ mixing


# ------------------------------------------------------------------------------------------------ against brute force


def by_least_squares(row: Tensor, x: Tensor, pruned: Tensor) -> Tensor:
    """What is left of a row: after each column, those to come are fitted again with all before them as they are."""
    new, wanted = row.clone(), x @ row
    for column in range(len(row)):
        rest = wanted - x[:, :column] @ new[:column]
        free = slice(column + 1, None) if pruned[column] else slice(column, None)
        new[column:] = 0.0
        if len(row[free]):
            new[free] = torch.linalg.lstsq(x[:, free], rest).solution
    return new


@pytest.mark.parametrize("blocksize", [1, 3, 7, 64])
def test_each_row_is_what_least_squares_leave_of_it(blocksize: int) -> None:
    x = correlated(60, 7).double()
    rows = torch.randn(4, 7, dtype=torch.float64)
    pruned = torch.rand(7, 4) < 0.5
    spans = [1, 3, 2, 1]
    parts = iter(pruned[None].split(spans, 1))
    new, gone = (out[0] for out in reconstruct(rows[None], (x.T @ x)[None], lambda _: next(parts), spans, blocksize, 0))
    assert torch.equal(gone, pruned.T)
    expected = torch.stack([by_least_squares(row, x, mask) for row, mask in zip(rows, pruned.T, strict=True)])
    torch.testing.assert_close(new, expected, rtol=1e-7, atol=1e-9)
    assert not new[gone].any()


def test_the_saliency_is_the_error_that_the_optimal_brain_surgeon_expects() -> None:
    x = correlated(60, 5).double()
    row = torch.randn(5, dtype=torch.float64)
    shown: list[Tensor] = []
    reconstruct(
        row[None, None], (x.T @ x)[None], lambda saliency: shown.append(saliency) or saliency < 0, [1] * 5, damping=0
    )
    for column, saliency in enumerate(
        shown
    ):  # nothing is pruned: what goes first costs this much, with columns to come
        free = x[:, column + 1 :]
        fitted = free @ torch.linalg.lstsq(free, x[:, column]).solution if free.numel() else 0.0
        error = (row[column] * (x[:, column] - fitted)).square().sum()
        torch.testing.assert_close(saliency.squeeze(), error)


def test_one_weight_that_goes_first_is_the_optimal_brain_surgeon() -> None:
    x = correlated(40, 6).double()
    row, inverse = torch.randn(6, dtype=torch.float64), torch.linalg.inv(x.T @ x)
    first = torch.arange(6)[None, :, None] == 0
    new, _ = reconstruct(row[None, None], (x.T @ x)[None], lambda _: first, [6], damping=0)
    torch.testing.assert_close(new[0, 0], row - row[0] / inverse[0, 0] * inverse[0])


def test_the_factor_is_that_of_the_inverse() -> None:
    x = correlated(30, 6).double()
    moments = x.T @ x
    factor = inverse_factor(moments, 0.1)
    damped = moments + 0.1 * moments.diagonal().mean() * torch.eye(6)
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped))
    assert not factor.tril(-1).any()


def test_singular_moments_are_damped_until_they_are_not() -> None:
    assert inverse_factor(torch.ones(3, 3, dtype=torch.float64), 0.0).isfinite().all()
    assert inverse_factor(torch.zeros(3, 3), 0.0).isfinite().all()


# ------------------------------------------------------------------------------------------------ less error


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(48, 32), (400, 48)),
    "sequence": (nn.Linear(48, 32, bias=False), (20, 20, 48)),
    "conv1d": (nn.Conv1d(12, 24, 4, stride=2, dilation=2, padding="valid"), (30, 12, 31)),
    "conv2d": (nn.Conv2d(8, 24, 3, padding=1), (12, 8, 9, 9)),
    "same": (nn.Conv2d(8, 24, (3, 2), padding="same", padding_mode="circular"), (12, 8, 8, 8)),
    "groups": (nn.Conv2d(12, 24, 3, groups=3, stride=(1, 2), padding=(0, 2)), (12, 12, 9, 9)),
    "depthwise": (nn.Conv2d(16, 16, 5, groups=16), (12, 16, 9, 9)),
    "conv3d": (nn.Conv3d(4, 24, 2, padding=1, padding_mode="reflect"), (8, 4, 5, 5, 5)),
}


def smooth(size: tuple[int, ...]) -> Tensor:
    """Inputs as layers meet them: neighbours are alike, and a few channels are loud."""
    x = torch.randn(size)
    for dim in range(2, len(size)):
        x = x.cumsum(dim)
    mixing = torch.randn(size[1], size[1]) / size[1] ** 0.5 + torch.eye(size[1])
    return torch.einsum("nc...,cd->nd...", x, mixing * torch.rand(size[1]).mul(2).exp())


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_much_less_of_the_output_is_lost_than_by_magnitude(kind: str) -> None:
    layer, size = copy.deepcopy(LAYERS[kind])
    layer.reset_parameters()
    x = smooth((20, 20, 48)).reshape(size) if kind in ("linear", "sequence") else smooth(size)
    dense = layer(x)

    def error(pruned: nn.Module) -> float:
        return float((pruned(x) - dense).square().sum())

    plain, fixed, rebuilt = copy.deepcopy(layer), copy.deepcopy(layer), copy.deepcopy(layer)
    prune(plain, 0.47)
    masks = sparsegpt(rebuilt, 0.47, data=[x[:6], (x[6:], "anything")], damping=1e-4)
    masks.apply(fixed)
    zeros = round(0.47 * layer.weight.numel())
    assert int((rebuilt.weight == 0).sum()) == int((~masks["weight"]).sum()) == zeros
    assert not rebuilt.weight[~masks["weight"]].any()
    assert error(rebuilt) < 0.8 * error(fixed)
    assert error(rebuilt) < 0.8 * error(plain)


def test_a_weight_with_two_owners_is_fitted_to_the_inputs_of_both() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x[0]) + self.second(x[1])

    one, other = correlated(50, 6, 1), correlated(50, 6, 2)
    tied, alone = Tied(), nn.Linear(6, 6, bias=False)
    alone.load_state_dict(tied.first.state_dict())
    sparsegpt(tied, 0.5, data=[torch.stack([one, other])])
    sparsegpt(alone, 0.5, data=[torch.cat([one, other])])
    torch.testing.assert_close(tied.first.weight, alone.weight)


# ------------------------------------------------------------------------------------------------ counts


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        *(nn.Linear(24, 9), nn.Dropout(0.5), nn.Linear(9, 5)),
    )


@pytest.mark.parametrize("blocksize", [1, 5, 128])
@pytest.mark.parametrize("sparsity", [0.0, 0.35, 0.9])
def test_every_target_has_exactly_its_zeros(sparsity: float, blocksize: int) -> None:
    model = net()
    masks = sparsegpt(model, sparsity, data=[torch.randn(9, 1, 6, 6)], blocksize=blocksize)
    assert masks.keys() == {"0.weight", "5.weight", "7.weight"}
    for name, mask in masks.items():
        zero = model.get_parameter(name) == 0
        assert torch.equal(zero, ~mask)
        assert int(zero.sum()) == round(sparsity * mask.numel())


def test_a_sparsity_for_each_layer_and_layers_that_are_left_alone() -> None:
    model = net()
    head = model[7].weight.clone()
    masks = sparsegpt(model, {"0.*": 0.5, "5.*": 0.25}, data=[torch.randn(9, 1, 6, 6)])
    assert {name: int((~mask).sum()) for name, mask in masks.items()} == {"0.weight": 27, "5.weight": 54}
    assert torch.equal(model[7].weight, head)


def test_inputs_that_are_always_zero_go_first() -> None:
    x = torch.randn(50, 8)
    x[:, [1, 4]] = 0.0
    layer = nn.Linear(8, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(4, 8) + 0.5)
    masks = sparsegpt(layer, 0.25, data=[x])
    assert torch.equal(~masks["weight"], (x == 0).all(0).expand(4, 8))


@pytest.mark.parametrize(
    ("layer", "size", "groups"),
    [
        (nn.Linear(16, 6), (40, 16), 24),
        (nn.Linear(18, 5), (40, 18), 20),  # two inputs are left over
        (nn.Conv2d(8, 6, 3), (6, 8, 7, 7), 108),
        (nn.Conv2d(12, 6, 3, groups=2), (6, 12, 7, 7), 54),
    ],
    ids=str,
)
@pytest.mark.parametrize("blocksize", [1, 128])
def test_every_group_of_m_inputs_loses_its_share(
    layer: nn.Module, size: tuple[int, ...], groups: int, blocksize: int
) -> None:
    layer = copy.deepcopy(layer)
    masks = sparsegpt(layer, 0.5, data=[torch.randn(size)], granularity=NM(2, 4), blocksize=blocksize)
    n = layer.weight.numel()
    assert int((layer.weight == 0).sum()) == int((~masks["weight"]).sum()) == round(0.5 * n)
    rows = masks["weight"].movedim(1, -1)
    kept = rows[..., : rows.shape[-1] // 4 * 4].unflatten(-1, (-1, 4)).sum(-1)
    assert kept.numel() == groups
    assert (kept == 2).all()


def test_choosing_in_groups_loses_less_than_by_magnitude() -> None:
    layer, x = nn.Linear(48, 32), smooth((20, 20, 48)).reshape(400, 48)
    plain, rebuilt = copy.deepcopy(layer), copy.deepcopy(layer)
    prune(plain, 0.5, granularity=NM(2, 4))
    sparsegpt(rebuilt, 0.5, data=[x], granularity=NM(2, 4), damping=1e-4)
    assert (rebuilt(x) - layer(x)).square().sum() < 0.5 * (plain(x) - layer(x)).square().sum()


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Linear(50, 32), (90, 50)),
        (nn.Linear(50, 30), (90, 50)),  # the last group has fewer rows
        (nn.Conv2d(8, 24, 3), (6, 8, 7, 7)),
        (nn.Conv2d(12, 24, 3, groups=2), (6, 12, 7, 7)),
    ],
    ids=str,
)
@pytest.mark.parametrize("blocksize", [1, 16, 128])
@torch.no_grad()
def test_the_rows_of_a_group_lose_the_same_inputs(layer: nn.Module, size: tuple[int, ...], blocksize: int) -> None:
    layer, x = copy.deepcopy(layer), torch.randn(size)
    plain, dense = copy.deepcopy(layer), copy.deepcopy(layer)
    masks = sparsegpt(layer, 0.7, data=[x], granularity=SharedFanIn(8), blocksize=blocksize)
    assert not layer.weight[~masks["weight"]].any()
    columns = layer.weight[0].numel()
    for group in masks["weight"].flatten(1).split(8):
        assert (group == group[0]).all()
        assert int(group[0].sum()) == columns - round(0.7 * columns)
    prune(plain, 0.7, granularity=SharedFanIn(8))
    lost = [float((each(x) - dense(x)).square().sum()) for each in (layer, plain)]
    assert lost[0] < lost[1] or blocksize == 1  # which leaves no choice among columns


def test_groups_of_rows_keep_the_zeros_that_they_have_and_one_input_at_least() -> None:
    layer = nn.Linear(40, 16)
    before = prune(layer, 0.5, granularity=SharedFanIn(8))["weight"]
    after = sparsegpt(layer, 0.8, data=[torch.randn(90, 40)], granularity=SharedFanIn(8), blocksize=10)["weight"]
    assert not (after & ~before).any()
    assert (after.sum(1) == 8).all()
    assert (sparsegpt(layer, 0.999, data=[torch.randn(90, 40)], granularity=SharedFanIn(8))["weight"].sum(1) == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_of_numbers(dtype: torch.dtype) -> None:
    layer = nn.Linear(12, 5, dtype=dtype)
    masks = sparsegpt(layer, 0.4, data=[torch.randn(30, 12, dtype=dtype)])
    assert layer.weight.dtype == dtype
    assert int((layer.weight == 0).sum()) == int((~masks["weight"]).sum()) == 24


# ------------------------------------------------------------------------------------------------ left as it was


def test_nothing_but_the_targets_changes() -> None:
    model = net()
    model[7].bias.grad = torch.ones(5)
    model[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = [torch.rand(9, 1, 6, 6)]
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    masks = sparsegpt(model, 0.5, data=data)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert model[7].bias.grad is not None
    assert not any(module._forward_hooks for module in model.modules())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == masks.keys()
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (nn.Linear(4, 2), {"sparsity": 50}, "sparsity must be in [0, 1), got 50"),
        (nn.Linear(4, 2), {"granularity": NM(2, 4), "sparsity": 0.4}, "must be at least 0.5 for NM(n=2, m=4), got 0.4"),
        (
            nn.Linear(4, 2),
            {"granularity": Channel()},
            "granularity must be Weight(), NM(n, m) or SharedFanIn(rows), got Channel(",
        ),
        (nn.Linear(4, 2), {"blocksize": 0}, "blocksize must be at least 1, got 0"),
        (nn.Linear(4, 2), {"damping": -1.0}, "damping must be at least 0, got -1.0"),
        (nn.LSTM(4, 2), {}, "targets must belong to linear layers and convolutions, got 'weight_ih_l0' of LSTM"),
        (nn.ConvTranspose1d(4, 2, 1), {}, "convolutions, got 'weight' of ConvTranspose1d"),
        (nn.Linear(4, 2), {"data": []}, "data must reach the layer of 'weight', got no forward pass through it"),
        (nn.Linear(4, 2), {"data": [torch.full((3, 4), torch.nan)]}, "inputs must be finite, got NaN or infinity"),
        (nn.Linear(4, 2), {"targets": ["6.*"]}, "targets must match a parameter, got '6.*'"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_the_model(
    model: nn.Module, arguments: dict[str, Any], message: str
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        sparsegpt(model, **{"sparsity": 0.5, "data": [torch.rand(3, 4)], **arguments})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
