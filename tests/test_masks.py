"""Masks: apply, pack, and how scores become masks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune import (
    Channel,
    Criterion,
    Granularity,
    Magnitude,
    Masks,
    Random,
    Sensitivity,
    Weight,
    prune,
    scopes,
)
from lightning_prune.models.parameters import find
from lightning_prune.scopes import SCOPES
from lightning_prune.tensors.packing import pack, pack_all, unpack, unpack_all
from lightning_prune.tensors.selection import Scores
from lightning_prune.units.finding import make_units
from lightning_prune.units.units import Units
from lightning_prune.updates.decision import decide
from lightning_prune.updates.target_sparsity import SparsityTarget


def linear(weight: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight))
    layer.weight.data = torch.tensor(weight)
    return layer


@pytest.fixture(params=["held", "streamed"], autouse=True)
def size_of_model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decide as for a small model, and as for one whose scores are not held in memory."""
    if request.param == "streamed":
        monkeypatch.setattr("lightning_prune.updates.decision.HELD", 0)


def new_masks(
    model: nn.Module,
    keep: Callable[[Scores], Mapping[str, int]],
    held: Mapping[str, Tensor] | None = None,
    criterion: Criterion = Magnitude(),
    granularity: Granularity = Weight(),
) -> Masks:
    return decide(make_units(find(model), model, granularity), criterion, keep, held or {}).masks


# ------------------------------------------------------------------------------------------------ apply


def test_apply_zeroes_what_is_masked_and_nothing_else() -> None:
    model = nn.Sequential(linear([[1.0, -2.0], [3.0, 4.0]]), nn.Linear(2, 2))
    bias, other = model[0].bias.clone(), model[1].weight.clone()
    parameter, place = model[0].weight, model[0].weight.data_ptr()
    Masks({"0.weight": torch.tensor([[False, True], [True, False]])}).apply(model)
    assert model[0].weight.tolist() == [[0.0, -2.0], [3.0, 0.0]]
    assert torch.equal(model[0].bias, bias)
    assert torch.equal(model[1].weight, other)
    assert model[0].weight is parameter
    assert parameter.data_ptr() == place


def test_apply_is_idempotent_and_leaves_gradients_and_graph_alone() -> None:
    layer = linear([[1.0, 2.0]])
    layer.weight.grad = torch.ones(1, 2)
    masks = Masks(weight=torch.tensor([[True, False]]))
    masks.apply(layer)
    masks.apply(layer)
    assert layer.weight.tolist() == [[1.0, 0.0]]
    assert layer.weight.grad.tolist() == [[1.0, 1.0]]
    assert layer.weight.requires_grad
    assert layer.weight.is_leaf


def test_apply_finds_tied_and_compiled_parameters() -> None:
    model = nn.Sequential(linear([[1.0, 2.0], [3.0, 4.0]]), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    Masks({"0.weight": torch.tensor([[True, False], [True, True]])}).apply(torch.compile(model))
    assert model[1].weight.tolist() == [[1.0, 0.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"wieght": torch.ones(2, 2)}, "must have the masked parameter 'wieght', got none of that name"),
        (
            {"weight": torch.ones(2, 3)},
            r"'weight' must have the shape of its mask, got \(2, 2\) for a mask of \(2, 3\)",
        ),
        ({"weight": torch.ones(4)}, r"'weight' must have the shape of its mask, got \(2, 2\) for a mask of \(4,\)"),
    ],
)
def test_masks_that_do_not_fit_are_refused_before_anything_is_changed(masks: dict[str, Tensor], message: str) -> None:
    layer = nn.Linear(2, 2)
    before = layer.bias.clone()
    with pytest.raises(ValueError, match=message):
        Masks({"bias": torch.zeros(2, dtype=torch.bool), **{n: m.bool() for n, m in masks.items()}}).apply(layer)
    assert torch.equal(layer.bias, before)


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        ({}, 0.0),
        ({"a": [True, True]}, 0.0),
        ({"a": [False, True], "b": [[True, True], [False, True]]}, 1 / 3),
        ({"a": [False]}, 1.0),
    ],
)
def test_sparsity_counts_all_masked_entries(masks: dict[str, Any], expected: float) -> None:
    assert Masks({name: torch.tensor(mask) for name, mask in masks.items()}).sparsity == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------ pack

SHAPES = [(), (0,), (1,), (7,), (8,), (9,), (3, 0, 2), (3, 5), (2, 4), (4, 3, 3, 3), (1, 1, 1, 1, 17), (65537,)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_packed_masks_come_back(shape: tuple[int, ...], density: float) -> None:
    torch.manual_seed(0)
    mask = torch.rand(shape) < density
    packed = pack(mask)
    found = unpack(packed)
    assert (found.shape, found.dtype) == (mask.shape, torch.bool)
    assert torch.equal(found, mask)
    assert packed["shape"] == list(shape)
    assert packed["bits"].dtype == torch.uint8
    assert packed["bits"].shape == (-(-mask.numel() // 8),)


@settings(derandomize=True, database=None, deadline=None)
@given(st.lists(st.booleans(), max_size=40))
def test_every_small_mask_comes_back(entries: list[bool]) -> None:
    packed = pack(torch.tensor(entries, dtype=torch.bool))
    assert packed["bits"].numel() == (len(entries) + 7) // 8
    assert unpack(packed).tolist() == entries


def test_bits_are_packed_from_the_highest() -> None:
    packed = pack(torch.tensor([[True, False, False, False, False], [False, False, True, True, False]]))
    assert packed["bits"].tolist() == [0b10000001, 0b10000000]


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param((torch.arange(12) % 5 == 0).view(3, 4).T, id="transposed"),
        pytest.param((torch.arange(24) % 5 == 0)[::2], id="strided"),
        pytest.param(torch.tensor([[True], [False]]).expand(2, 9), id="expanded"),
    ],
)
def test_masks_of_any_layout_are_packed(mask: Tensor) -> None:
    assert torch.equal(unpack(pack(mask)), mask)


def test_packing_copies() -> None:
    mask = torch.ones(8, dtype=torch.bool)
    packed = pack(mask)
    mask.zero_()
    found = unpack(packed)
    assert found.all()
    found.zero_()
    assert packed["bits"].tolist() == [255]


@pytest.mark.parametrize(
    "packed",
    [
        pytest.param({"shape": [9], "bits": torch.zeros(1, dtype=torch.uint8)}, id="too few bytes"),
        pytest.param({"shape": [8], "bits": torch.zeros(2, dtype=torch.uint8)}, id="too many bytes"),
        pytest.param({"shape": [3, 5], "bits": torch.zeros(15, dtype=torch.uint8)}, id="not packed"),
        pytest.param({"shape": [8], "bits": torch.zeros(1)}, id="floats"),
        pytest.param({"shape": [9], "bits": torch.zeros(2, 1, dtype=torch.uint8)}, id="two dimensions"),
        pytest.param({"shape": [-1], "bits": torch.zeros(0, dtype=torch.uint8)}, id="a negative length"),
        pytest.param({"shape": [-1, 0], "bits": torch.zeros(0, dtype=torch.uint8)}, id="a negative length of nothing"),
        pytest.param({"shape": [-2, -4], "bits": torch.zeros(1, dtype=torch.uint8)}, id="negative lengths"),
    ],
)
def test_a_damaged_pack_is_refused(packed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a packed mask"):
        unpack(packed)


def three_masks() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.rand(shape) > 0.5 for name, shape in {"b": (3, 5), "none": (0, 2), "a": (2, 4)}.items()}


def test_masks_that_are_packed_together_come_back_in_order() -> None:
    packed = pack_all(three_masks())
    assert packed["shapes"] == {"b": [3, 5], "none": [0, 2], "a": [2, 4]}
    assert packed["bits"].dtype == torch.uint8
    assert packed["bits"].numel() == 2 + 0 + 1  # a byte belongs to one mask only
    found = unpack_all(packed)
    assert list(found) == ["b", "none", "a"]
    assert all(torch.equal(found[name], mask) for name, mask in three_masks().items())


def test_masks_of_all_shapes_are_packed_together() -> None:
    torch.manual_seed(0)
    masks = {str(shape): torch.rand(shape) > 0.5 for shape in SHAPES}
    found = unpack_all(pack_all(masks))
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())


def test_no_masks_are_packed_too() -> None:
    assert unpack_all(pack_all({})) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": torch.zeros(2, dtype=torch.uint8)}, "a complete mask of 'a'"),
        ({"bits": torch.zeros(4, dtype=torch.uint8)}, "3 bytes"),
        ({"bits": torch.zeros(3)}, "a complete mask of 'b'"),
        ({"shapes": {"b": [3, 5], "a": [2, -4]}}, "a complete mask of 'a'"),
        ({"shapes": {"b": [3, 5]}}, "2 bytes of masks for .*'b'.*, got 3"),
    ],
)
def test_damaged_masks_are_refused_with_the_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"must hold {message}"):
        unpack_all({**pack_all(three_masks()), **change})


# ------------------------------------------------------------------------------------------------ decide


def test_the_lowest_scores_are_pruned() -> None:
    layer = linear([[1.0, -0.2, 0.5], [-3.0, 0.1, 0.4]])
    masks = new_masks(layer, lambda scores: {"weight": 3})
    assert masks["weight"].tolist() == [[True, False, True], [True, False, False]]
    assert masks["weight"].dtype == torch.bool


def test_weights_are_not_touched_by_making_masks() -> None:
    layer = linear([[1.0, -0.2]])
    new_masks(layer, lambda scores: {"weight": 1})
    assert layer.weight.tolist() == [[1.0, pytest.approx(-0.2)]]


@pytest.mark.parametrize("granularity", [Weight(), Channel()])
def test_keeping_all_and_nothing(granularity: Granularity) -> None:
    layer = linear([[1.0, 2.0], [3.0, 4.0]])
    assert new_masks(layer, lambda scores: scores.sizes, granularity=granularity)["weight"].all()
    assert not new_masks(layer, lambda scores: {"weight": 0}, granularity=granularity)["weight"].any()


def test_what_is_pruned_stays_pruned() -> None:
    # the pruned weight has the highest score, as when it moved away from zero in between
    layer = linear([[9.0, 1.0, 2.0, 3.0]])
    held = {"weight": torch.tensor([[False, True, True, True]])}
    assert new_masks(layer, lambda scores: {"weight": 2}, held)["weight"].tolist() == [[False, False, True, True]]
    assert new_masks(layer, lambda scores: {"weight": 3}, held)["weight"].tolist() == [[False, True, True, True]]


def test_pruned_channels_stay_pruned() -> None:
    layer = linear([[9.0, 9.0], [1.0, 1.0], [2.0, 2.0]])
    held = {"weight": torch.tensor([[False, False], [True, True], [True, True]])}
    masks = new_masks(layer, lambda scores: {"weight": 1}, held, granularity=Channel())
    assert masks["weight"].tolist() == [[False, False], [False, False], [True, True]]
    assert masks["bias"].tolist() == [False, False, True]


def test_a_scope_that_asks_for_growth_gets_none_and_the_total_holds() -> None:
    # "a" has 3 pruned, and the scope would keep all of it and prune 5 in "b": 2 of them are left
    model = nn.Sequential(linear([[1.0, 2.0], [3.0, 4.0]]), linear([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    held = {"0.weight": torch.tensor([[False, False], [False, True]]), "1.weight": torch.ones(2, 3).bool()}
    masks = new_masks(model, lambda scores: {"0.weight": 4, "1.weight": 1}, held)
    assert masks["0.weight"].tolist() == held["0.weight"].tolist()
    assert masks["1.weight"].tolist() == [[False, False, True], [True, True, True]]


def test_what_growth_would_have_given_is_taken_from_the_target_with_most_to_prune_anew() -> None:
    # "0" has 2 pruned and is asked for none: of the 1 and the 5 that are due in the others, 2 fewer of the 5 are pruned
    model = nn.Sequential(*(linear([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]) for _ in range(3)))
    held = {f"{i}.weight": torch.arange(6)[None] >= (2 if i == 0 else 0) for i in range(3)}
    masks = new_masks(model, lambda scores: {"0.weight": 6, "1.weight": 5, "2.weight": 1}, held)
    assert [int(mask.sum()) for mask in masks.values()] == [4, 5, 3]


def test_growth_that_nothing_can_balance_is_not_granted_either() -> None:
    model = linear([[1.0, 2.0, 3.0, 4.0]])
    held = {"weight": torch.tensor([[False, False, False, True]])}
    masks = new_masks(model, lambda scores: {"weight": 3}, held)
    assert masks["weight"].tolist() == [[False, False, False, True]]


def three_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(24, 7), nn.Linear(7, 3))  # 216, 168, 21


@pytest.mark.parametrize("granularity", [Weight(), Channel()])
@pytest.mark.parametrize("scope", SCOPES)
def test_gradual_pruning_never_regrows_and_is_exact_at_every_update(scope: str, granularity: Granularity) -> None:
    model = three_layers()
    found = find(model)
    units = make_units(found, model, granularity)
    total = sum(unit.size for unit in units)
    held = Masks()
    levels = [0.0, 0.01, 0.02, 0.021, 0.3, 0.305, 0.5, 0.66, 0.9, 0.95, 0.97]
    for step, level in enumerate(levels):
        criterion = Random(step)  # wants other units at each update
        masks = decide(
            units,
            criterion,
            partial(SparsityTarget(level).allocate, found=found, criterion=criterion, scope=SCOPES[scope]),
            held,
        ).masks
        for name, before in held.items():
            assert not (masks[name] & ~before).any(), f"{name} has regrown at {level}"
        pruned = {unit.name: unit.size - int(unit.kept(masks).sum()) for unit in units}  # type: ignore[union-attr]
        if scope == "local":
            assert pruned == {unit.name: round(level * unit.size) for unit in units}
        else:
            assert sum(pruned.values()) == round(level * total)
        held = masks


def test_rounding_that_makes_erk_ask_for_growth_does_not_regrow() -> None:
    # sums 3, 5, 5 of the shapes (1, 2), (1, 4), (1, 4). Keep 7 of 10: 1.6, 2.7, 2.7, so 1, 3, 3;
    # keep 6: 1.38, 2.31, 2.31, so 2, 2, 2: more of the first. It stays at 1, and one of the others loses none.
    model = nn.Sequential(linear([[1.0, 2.0]]), linear([[1.0, 2.0, 3.0, 4.0]]), linear([[1.0, 2.0, 3.0, 4.0]]))
    held = new_masks(model, lambda scores: scopes.erk(scores, 0.3))
    assert [int(mask.sum()) for mask in held.values()] == [1, 3, 3]
    asked = {}
    masks = new_masks(model, lambda scores: asked.setdefault("keep", scopes.erk(scores, 0.4)), held)
    assert list(asked["keep"].values()) == [2, 2, 2]
    assert sorted(int(mask.sum()) for mask in masks.values()) == [1, 2, 3]
    assert all(not (masks[name] & ~before).any() for name, before in held.items())


def test_units_with_equal_scores_are_pruned_in_order() -> None:
    model = nn.Sequential(linear([[1.0, 1.0]]), linear([[1.0], [1.0]]))
    masks = new_masks(model, lambda scores: scopes.global_(scores, 0.75))
    assert [mask.flatten().tolist() for mask in masks.values()] == [[False, False], [False, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tau", [0.0, 0.25, 0.7, 1.0, 5.0])
def test_a_threshold_prunes_exactly_what_is_smaller(dtype: torch.dtype, tau: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 30, bias=False, dtype=dtype)
    layer.weight.data.normal_().flatten()[:6] = torch.tensor(
        [tau, -tau, 0.0, -0.0, tau * 1.01, tau * 0.99], dtype=dtype
    )
    weight = layer.weight.detach().clone()
    masks = prune(layer, threshold=tau)
    wide = weight if dtype == torch.float64 else weight.float()
    assert torch.equal(masks["weight"], ~(wide.abs() < tau))
    assert torch.equal(layer.weight, torch.where(masks["weight"], weight, 0.0))


@pytest.mark.parametrize("tau", [0.1, 0.7])
def test_a_threshold_is_exact_for_double_weights(tau: float) -> None:
    layer = nn.Linear(3, 1, dtype=torch.float64)
    layer.weight.data = torch.tensor([[tau - 1e-12, -tau, tau + 1e-12]], dtype=torch.float64)
    assert prune(layer, threshold=tau)["weight"].tolist() == [[False, True, True]]


# ------------------------------------------------------------------------------------------------ refused


class Given(Criterion):
    """Scores every unit with the number that belongs to its parameter."""

    def __init__(self, **scores: float) -> None:
        self.given = {name.replace("_", "."): score for name, score in scores.items()}

    def scores(self, units: Units) -> Tensor:
        return units.mean(torch.abs).mul(0.0) + self.given.get(units.name, 0.0)


class Signed(Criterion):
    """Scores every unit with the mean of its weights."""

    def scores(self, units: Units) -> Tensor:
        return units.mean(Tensor.clone)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_score_that_is_not_finite_is_refused_with_the_name_of_the_parameter(scope: str, bad: float) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"scores must be finite, .*Given.*'1\.weight'") as caught:
        prune(model, 0.5, criterion=Given(**{"1_weight": bad}), scope=scope)
    assert "0.weight" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("granularity", [Weight(), Channel()])
@pytest.mark.parametrize("criterion", [Magnitude(), Signed()])
def test_one_bad_weight_among_many_is_found(bad: float, granularity: Granularity, criterion: Criterion) -> None:
    model = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50))
    model[1].weight.data[17, 3] = bad
    with pytest.raises(ValueError, match=rf"scores must be finite.*{type(criterion).__name__}.*'1\.weight'"):
        prune(model, 0.5, granularity=granularity, criterion=criterion, targets=("*",))


def test_a_nan_in_a_weight_that_is_no_target_does_not_matter() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight.data[0, 0] = torch.nan
    prune(model, 0.5, ignore=["1.*"])
    assert int((model[0].weight == 0).sum()) == 2


@pytest.mark.parametrize(
    "keep",
    [
        pytest.param({"0.weight": 2}, id="a target is missing"),
        pytest.param({"0.weight": 2, "1.weight": 2, "2.weight": 2}, id="a target too many"),
        pytest.param({"0.weight": 2, "1.wieght": 2}, id="a wrong name"),
        pytest.param({"0.weight": 2, "1.weight": 5}, id="more than there are"),
        pytest.param({"0.weight": -1, "1.weight": 4}, id="less than none"),
        pytest.param({"0.weight": 0.5, "1.weight": 0.5}, id="fractions"),
        pytest.param({"0.weight": float("nan"), "1.weight": 2}, id="no number"),
        pytest.param([2, 2], id="a list"),
        pytest.param(None, id="nothing"),
    ],
)
def test_a_scope_with_an_impossible_allocation_is_refused(keep: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match="scope must"):
        prune(model, 0.5, scope=lambda scores, sparsity: keep)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_criterion_with_scores_of_another_shape_is_refused() -> None:
    class PerWeight(Criterion):
        def scores(self, units: Units) -> Tensor:
            return units.weight().abs()

    with pytest.raises(ValueError, match=r"PerWeight.* one score for each of the 4 units of 'weight'"):
        prune(nn.Linear(4, 4), 0.5, criterion=PerWeight(), granularity=Channel())


# ------------------------------------------------------------------------------------------------ piece by piece


class Relative(Magnitude):
    """Looks at the other weights of the target, unlike what it is made from."""

    def scores(self, units: Units) -> Tensor:
        return units.mean(lambda weight: weight.abs() / weight.abs().sum())


@dataclass(frozen=True)
class Counting(Magnitude):
    """Notes how many weights it was asked for at a time."""

    elementwise: ClassVar[bool] = True

    asked: list[int] = field(default_factory=list)

    def scores(self, units: Units) -> Tensor:
        self.asked.append(units.parameter.numel())
        return super().scores(units)


@pytest.mark.parametrize("criterion", [Magnitude(), Sensitivity(window=1)])
@pytest.mark.parametrize("held", [False, True])
def test_scores_of_pieces_give_the_masks_of_whole_scores(criterion: Criterion, held: bool) -> None:
    model = nn.Sequential(nn.Linear(900, 700, bias=False), nn.Linear(700, 30, bias=False))
    masks = Masks({"0.weight": torch.rand(700, 900) > 0.3, "1.weight": torch.rand(30, 700) > 0.3}) if held else Masks()
    units = make_units(find(model), model, Weight())
    for unit in units:
        unit.statistic, unit.steps = torch.rand_like(unit.parameter), 1
    scores = torch.cat([criterion.scores(unit).detach().view(-1) for unit in units])
    if held:
        scores[~torch.cat([masks[unit.name].view(-1) for unit in units])] = -1.0
    expected = torch.ones(len(scores), dtype=torch.bool)
    expected[scores.argsort(stable=True)[: round(0.6 * len(scores))]] = False
    found = decide(units, criterion, lambda scores: scopes.global_(scores, 0.6), masks).masks
    assert torch.equal(torch.cat([mask.view(-1) for mask in found.values()]), expected)


def test_only_scores_that_say_so_are_asked_for_in_pieces() -> None:
    model, criterion = nn.Linear(1000, 600), Counting()
    new_masks(model, lambda scores: scopes.local(scores, 0.5), criterion=criterion)
    assert max(criterion.asked) < 600_000
    assert Magnitude.elementwise
    assert not Relative.elementwise
    found = new_masks(model, lambda scores: scopes.local(scores, 0.5), criterion=Relative())
    assert torch.equal(found["weight"], new_masks(model, lambda scores: scopes.local(scores, 0.5))["weight"])
    assert found.sparsity == 0.5
