"""Granularities: how weights form units, and what is pruned together with a unit."""

import copy
from typing import Literal

import pytest
import torch
import torch.nn.utils.prune
from models import MLP, fit
from torch import Tensor, nn

from lightning_prune import (
    FPGM,
    NM,
    APoZ,
    BatchNormScale,
    Block,
    Channel,
    Criterion,
    Entropy,
    Granularity,
    InputChannel,
    Magnitude,
    Pruning,
    Random,
    Sensitivity,
    Weight,
    prune,
)
from lightning_prune.models.parameters import find
from lightning_prune.scopes import local
from lightning_prune.units.finding import make_units
from lightning_prune.units.units import Units
from lightning_prune.updates.decision import decide

SHAPES = [(3, 4), (4, 2, 3), (2, 3, 2, 2), (1, 5), (5, 1)]


def one(layer: nn.Module, granularity: Granularity) -> Units:
    return make_units(find(layer), layer, granularity)[0]


# ------------------------------------------------------------------------------------------------ pooling


def test_single_weights_are_not_pooled() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert Weight().pool(values, 0).tolist() == values.tolist()
    assert Weight().count(torch.Size([4, 3, 2]), 0) == 24


@pytest.mark.parametrize(("dim", "expected"), [(0, [6.0, 15.0]), (1, [5.0, 7.0, 9.0])])
def test_a_channel_is_summed_over_all_other_dimensions(dim: int, expected: list[float]) -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert Channel().pool(values, dim).tolist() == expected
    assert Channel().pool(values[..., None, None].expand(2, 3, 2, 2), dim).tolist() == [4 * e for e in expected]
    assert Channel().count(values.shape, dim) == len(expected)


@pytest.mark.parametrize(
    ("dim", "keep", "expected"),
    [
        (0, [True, False], [[True, True, True], [False, False, False]]),
        (1, [False, True, False], [[False, True, False], [False, True, False]]),
    ],
)
def test_a_decision_on_channels_reaches_all_their_weights(dim: int, keep: list[bool], expected: list[Tensor]) -> None:
    assert Channel().expand(torch.tensor(keep), torch.Size([2, 3]), dim).tolist() == expected
    kernel = Channel().expand(torch.tensor(keep), torch.Size([2, 3, 2, 2]), dim)
    assert kernel.shape == (2, 3, 2, 2)
    assert kernel.float().mean((2, 3)).bool().tolist() == expected


@pytest.mark.parametrize("granularity", [Weight(), Channel(), InputChannel(), Block(2, 3), Block(1, 100), NM(2, 4)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dim", [0, 1])
def test_pooling_an_expanded_decision_gives_it_back(granularity: Granularity, shape: tuple[int, ...], dim: int) -> None:
    torch.manual_seed(0)
    size = torch.Size(shape)
    units = granularity.count(size, dim)
    keep = torch.rand(granularity.pool(torch.zeros(size), dim).shape) > 0.5
    assert keep.numel() == units
    mask = granularity.expand(keep, size, dim)
    assert (mask.shape, mask.dtype) == (size, torch.bool)
    pooled = granularity.pool(mask.float(), dim)
    assert torch.equal(pooled / granularity.pool(torch.ones(size), dim), keep.float())  # all of a unit, or nothing


@pytest.mark.parametrize("granularity", [Weight(), Channel()])
def test_granularities_compare_by_value(granularity: Granularity) -> None:
    assert granularity == type(granularity)()
    assert eval(repr(granularity)) == granularity


# ------------------------------------------------------------------------------------------------ units of a layer


def test_units_of_a_layer() -> None:
    layer = nn.Linear(3, 2)
    layer.weight.data = torch.tensor([[1.0, -2.0, 3.0], [0.0, 0.5, -0.5]])
    rows, weights = one(layer, Channel()), one(layer, Weight())
    assert (rows.size, weights.size) == (2, 6)
    assert rows.sum(torch.abs).tolist() == [6.0, 1.0]
    assert rows.mean(torch.square).tolist() == pytest.approx([14 / 3, 0.5 / 3])
    assert weights.sum(torch.abs).tolist() == weights.mean(torch.abs).tolist() == layer.weight.abs().tolist()
    assert rows.index().tolist() == [0, 1]
    assert weights.index().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert rows.spread(torch.tensor([7.0, 8.0])).tolist() == [[7.0] * 3, [8.0] * 3]


def test_units_of_a_transposed_convolution_are_its_output_channels() -> None:
    layer = nn.ConvTranspose2d(2, 3, 2)
    units = one(layer, Channel())
    assert (units.size, units.channels) == (3, 3)
    assert torch.allclose(units.sum(torch.square), layer.weight.square().sum((0, 2, 3)))
    masks = units.masks(torch.tensor([True, False, True]))
    assert masks["weight"].sum((0, 2, 3)).tolist() == [8, 0, 8]
    assert masks["bias"].tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_criterion_sees_weights_of_at_least_single_precision(dtype: torch.dtype) -> None:
    layer = nn.Linear(2, 2, dtype=dtype)
    layer.weight.grad = torch.ones_like(layer.weight)
    weight = one(layer, Weight()).weight()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert weight.grad is not None
    assert (weight.dtype, weight.grad.dtype, weight.requires_grad) == (wide, wide, False)


def test_masks_are_of_the_shape_of_their_parameters_and_do_not_share_memory() -> None:
    layer = nn.Linear(3, 2)
    keep = torch.tensor([True, False])
    masks = one(layer, Channel()).masks(keep)
    assert {name: mask.shape for name, mask in masks.items()} == {"weight": (2, 3), "bias": (2,)}
    masks["weight"][0, 0] = False
    masks["bias"][1] = True
    assert masks["weight"].tolist() == [[False, True, True], [False] * 3]
    assert keep.tolist() == [True, False]


@pytest.mark.parametrize(
    ("mask", "kept"),
    # a row of which something is left counts as kept
    [
        ([[True, True], [False, False], [True, True]], [True, False, True]),
        ([[False, True], [False, False], [True, False]], [True, False, True]),
    ],
)
def test_units_read_from_a_mask(mask: list[list[bool]], kept: list[bool]) -> None:
    found = one(nn.Linear(2, 3), Channel()).kept({"weight": torch.tensor(mask)})
    assert found is not None
    assert found.tolist() == kept
    assert one(nn.Linear(2, 3), Weight()).kept({"weight": torch.tensor(mask)}).tolist() == mask  # type: ignore[union-attr]
    assert one(nn.Linear(2, 3), Channel()).kept({}) is None


# ------------------------------------------------------------------------------------------------ what follows


def followers(model: nn.Module, granularity: Granularity = Channel()) -> dict[str, list[str]]:
    return {unit.name: list(getattr(unit, "followers", ())) for unit in make_units(find(model), model, granularity)}


def test_nothing_follows_a_single_weight() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert followers(model, Weight()) == {"0.weight": []}


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(2, 3), {"weight": ["bias"]}),
        (nn.Linear(2, 3, bias=False), {"weight": []}),
        (nn.Conv2d(2, 3, 1), {"weight": ["bias"]}),
        (nn.ConvTranspose1d(2, 3, 1), {"weight": ["bias"]}),
        (nn.LSTM(2, 3), {"weight_ih_l0": ["bias_ih_l0"], "weight_hh_l0": ["bias_hh_l0"]}),
        (nn.GRUCell(2, 3), {"weight_ih": ["bias_ih"], "weight_hh": ["bias_hh"]}),
        (
            nn.MultiheadAttention(4, 2),
            {"in_proj_weight": ["in_proj_bias"], "out_proj.weight": ["out_proj.bias"]},
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_bias_of_the_layer_follows(layer: nn.Module, expected: dict[str, list[str]]) -> None:
    assert followers(layer) == expected


def test_weight_and_bias_of_the_norm_behind_follow() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    assert followers(model) == {"0.weight": ["1.weight", "1.bias"], "3.weight": ["3.bias"]}


def test_a_norm_without_parameters_or_bias() -> None:
    model = nn.Sequential(
        *(nn.Linear(2, 3), nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2), nn.LayerNorm(2, bias=False)),
        *(nn.Linear(2, 4), nn.RMSNorm(4)),
    )
    assert followers(model) == {
        "0.weight": ["0.bias"],
        "2.weight": ["2.bias", "3.weight"],
        "4.weight": ["4.bias", "5.weight"],
    }


def test_what_is_frozen_does_not_follow() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model[0].bias.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    assert followers(model) == {"0.weight": ["1.weight"]}


def test_biases_of_all_layers_that_share_a_weight_follow() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    assert followers(model) == {"0.weight": ["0.bias", "2.bias"]}


def test_a_pruned_channel_outputs_zero_whatever_goes_in() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    model[1].running_mean.data.uniform_(-1, 1)
    nn.init.uniform_(model[1].bias, 1.0, 2.0)
    masks = prune(model, 0.5, granularity=Channel(), targets=("*",))
    gone = ~masks["0.bias"]
    assert torch.equal(gone, ~masks["1.weight"])
    assert torch.equal(gone, ~masks["1.bias"])
    hidden = model[:3](torch.randn(4, 2, 5, 5))
    assert (hidden[:, gone] == 0).all()
    assert (hidden[:, ~gone] != 0).any(dim=3).all()
    assert (model(torch.randn(4, 2, 5, 5))[:, ~masks["3.bias"]] == 0).all()


def test_other_granularities_of_ones_own_fit_in() -> None:
    class Column(Granularity):
        """All weights that read one input."""

        def pool(self, values: Tensor, dim: int) -> Tensor:
            return values.sum(0)

        def expand(self, keep: Tensor, shape: torch.Size, dim: int) -> Tensor:
            return keep.expand(shape)

        def count(self, shape: torch.Size, dim: int) -> int:
            return shape[1]

    layer = nn.Linear(3, 2)
    layer.weight.data = torch.tensor([[1.0, 3.0, 2.0], [1.0, -4.0, 0.0]])
    masks = prune(layer, 1 / 3, granularity=Column())
    assert list(masks) == ["weight"]
    assert layer.weight.tolist() == [[0.0, 3.0, 2.0], [0.0, -4.0, 0.0]]


# ------------------------------------------------------------------------------------------------ N:M


def groups(mask: Tensor, m: int) -> Tensor:
    """Return how many are kept in each whole group along the inputs; channels of a convolution, at each place."""
    rows = mask.movedim(1, -1).flatten(0, -2)
    return rows[:, : rows.shape[1] // m * m].unflatten(1, (-1, m)).sum(-1)


@pytest.mark.parametrize("criterion", [Magnitude(), Random(seed=1)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (3, 4), (4, 8), (8, 32)])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_exactly_n_of_every_m_are_kept(scope: Literal["global", "local"], n: int, m: int, criterion: Criterion) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 5, 3), nn.Flatten(), nn.Linear(64, 3))
    model[2].weight.data.mul_(100)  # the ranks count, not the size
    masks = prune(model, 1 - n / m, criterion=criterion, granularity=NM(n, m), scope=scope)
    for name, mask in masks.items():
        assert (groups(mask, m) == n).all()
        if isinstance(criterion, Magnitude):
            weight = model.get_parameter(name)
            kept = weight.abs().masked_fill(~mask, torch.inf).movedim(1, -1).unflatten(-1, (-1, m)).amin(-1)
            assert (kept > 0).all()


def test_of_each_group_the_smallest_go() -> None:
    layer = nn.Linear(8, 1)
    layer.weight.data = torch.tensor([[0.1, -0.4, 0.3, 0.2, 90.0, -70.0, 60.0, 80.0]])
    masks = prune(layer, 0.5, granularity=NM(2, 4))
    assert masks["weight"].tolist() == [[False, True, True, False, True, False, False, True]]


def test_equal_scores_of_a_group_go_in_their_order() -> None:
    layer = nn.Linear(8, 2)
    nn.init.ones_(layer.weight)
    masks = prune(layer, 0.5, granularity=NM(2, 4))
    assert masks["weight"].tolist() == [[False, False, True, True] * 2] * 2


@pytest.mark.parametrize("inputs", [5, 6, 7, 3, 2, 1])
def test_a_last_group_that_is_shorter_is_pruned_in_proportion(inputs: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, 20)
    mask = prune(layer, 0.5, granularity=NM(2, 4))["weight"]
    assert int(mask.sum()) == 10 * inputs
    assert (groups(mask, 4) == 2).all()
    rest = mask[:, inputs // 4 * 4 :].sum(1)
    assert rest.numel() == 0 or int(rest.max() - rest.min()) <= 1


def test_a_transposed_convolution_has_its_inputs_first() -> None:
    mask = prune(nn.ConvTranspose2d(8, 3, 2), 0.5, granularity=NM(2, 4))["weight"]
    assert (mask.view(2, 4, 3, 2, 2).sum(1) == 2).all()


def test_groups_are_pruned_evenly_on_the_way() -> None:
    """Each update of a gradual schedule, and each prune after another, adds to the masks that are held."""
    torch.manual_seed(0)
    layer, counts = nn.Linear(16, 16), []
    units = [one(layer, NM(2, 4))]
    masks: dict[str, Tensor] = {}
    for sparsity in (0.1, 0.25, 0.3, 0.5):
        old = masks
        masks = decide(units, Random(seed=int(100 * sparsity)), lambda s, x=sparsity: local(s, x), masks).masks
        assert all(not (masks[name] & ~mask).any() for name, mask in old.items())
        counts.append(groups(masks["weight"], 4).unique().tolist())
    assert counts == [[3, 4], [3], [2, 3], [2]]


@pytest.mark.parametrize("sparsity", [0.25, {"*": 0.25}])
def test_less_than_the_granularity_is_made_for_is_refused(sparsity: float | dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be at least 0\.5 for NM\(n=2, m=4\), got 0\.25"):
        Pruning(sparsity, granularity=NM(2, 4))


def test_a_threshold_on_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"threshold must be None for NM\(n=2, m=4\).* got 0\.1"):
        Pruning(threshold=0.1, granularity=NM(2, 4))


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4)])
def test_an_impossible_pattern_is_refused(n: int, m: int) -> None:
    with pytest.raises(ValueError, match=f"n must be at least 1 and less than m, got n={n} and m={m}"):
        NM(n, m)


# ------------------------------------------------------------------------------------------------ blocks


def test_blocks_are_pruned_as_wholes_by_the_mean_of_their_weights() -> None:
    layer = nn.Linear(5, 3)
    layer.weight.data = torch.tensor([[1.0, 1, 9, 9, 5], [1, 1, 9, 9, 5], [8, 8, 2, 2, 0]])
    mask = prune(layer, 0.5, granularity=Block(2, 2))["weight"]
    # means 1, 9, 5 above, and 8, 2, 0 below
    assert mask.tolist() == [[False, False, True, True, True]] * 2 + [[True, True, False, False, False]]


def test_kernel_places_of_a_convolution_are_inputs_of_a_block() -> None:
    conv = nn.Conv2d(2, 4, 2)
    mask = prune(conv, 0.5, granularity=Block(2, 4))["weight"]
    blocks = mask.flatten(1).view(2, 2, 2, 4)
    assert all(blocks[i, :, j].unique().numel() == 1 for i in range(2) for j in range(2))
    assert int(mask.sum()) == 16


@pytest.mark.parametrize(("arguments", "message"), [((0, 4), "height must be"), ((4, 0), "width must be")])
def test_an_empty_block_is_refused(arguments: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message} at least 1, got 0"):
        Block(*arguments)


# ------------------------------------------------------------------------------------------------ input channels


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(6, 4), nn.Conv2d(6, 4, 3), nn.Conv1d(12, 4, 3, groups=2), nn.ConvTranspose2d(6, 4, 2)],
    ids=lambda layer: type(layer).__name__,
)
def test_input_channels_die_alone_and_by_their_columns(layer: nn.Module) -> None:
    axis = int(not isinstance(layer, nn.ConvTranspose2d))
    columns = layer.weight.detach().movedim(axis, 0).flatten(1).abs().mean(1)
    theirs = copy.deepcopy(layer)
    torch.nn.utils.prune.ln_structured(theirs, "weight", amount=3, n=1, dim=axis)
    masks = prune(layer, 0.5, granularity=InputChannel())
    assert list(masks) == ["weight"]
    assert torch.equal(masks["weight"], theirs.weight_mask.bool())
    assert torch.equal(layer.weight.movedim(axis, 0).flatten(1).any(1), columns > columns.sort()[0][2])


def test_the_contribution_of_an_input_channel_is_that_of_the_input() -> None:
    layer = nn.Linear(6, 4)
    x, t = torch.randn(8, 6, requires_grad=True), torch.randn(8, 4)
    nn.functional.mse_loss(layer(x), t).backward()
    (units,) = make_units(find(layer), layer, InputChannel())
    torch.testing.assert_close(Sensitivity().observe(units), (x * x.grad).sum(0).square().detach())


@pytest.mark.parametrize("criterion", [FPGM(), Entropy(window=1), APoZ(window=1), BatchNormScale()], ids=repr)
def test_scores_of_outputs_are_refused_for_input_channels_before_training(criterion: Criterion) -> None:
    name = type(criterion).__name__
    with pytest.raises(ValueError, match=rf"units of output channels, which {name} scores, got InputChannel\(\) for"):
        fit(model := MLP(), Pruning(0.5, criterion=criterion, granularity=InputChannel()))
    assert model.trainer.global_step == 0
    with pytest.raises(ValueError, match="granularity must have units of output channels"):
        prune(MLP(), 0.5, criterion=criterion, granularity=InputChannel(), data=[torch.ones(1)])


def test_a_run_prunes_input_channels_and_does_not_shrink() -> None:
    model, callback = MLP(), Pruning(0.5, granularity=InputChannel(), scope="local", schedule="one_shot", start=1)
    fit(model, callback)
    assert callback.sparsity_now == pytest.approx(0.5, abs=0.05)
    assert not model.net[4].weight.any(0).all()
    with pytest.raises(ValueError, match=r"Layer\(\) or ResidualChannel\(\) to shrink the model, got InputChannel"):
        Pruning(0.5, granularity=InputChannel(), shrink_at_end=True)
