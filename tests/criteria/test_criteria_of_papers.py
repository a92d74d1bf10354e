"""Criteria from papers: each against an example worked out by hand, or by another way to compute the same."""

import math
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from models import MLP, Attention, MaskRecorder, On, agrees, fit
from test_criteria import linear, scores_of
from torch import Tensor, nn

from lightning_prune import (
    FPGM,
    LAMP,
    NM,
    SNIP,
    APoZ,
    BatchNormScale,
    Channel,
    Criterion,
    Fisher,
    GraSP,
    Head,
    Movement,
    Pruning,
    SynFlow,
    Wanda,
    Weight,
    prune,
)
from lightning_prune.tensors.selection import Scores


def half_square(model: nn.Module, batch: Tensor) -> Tensor:
    """A loss whose gradient by the output is the output."""
    loss: Tensor = model(batch).square().sum() / 2
    return loss


# y = w x with w = (1, -2) and x = (3, 1): y = 1, dL/dw = y x = (3, 1); with x = (0, 1): y = -2, dL/dw = (0, -2)
STEPS = [torch.tensor([[3.0, 1.0]]), torch.tensor([[0.0, 1.0]])]


class LastMovement(Movement):
    """The same, of the window before an update alone."""

    accumulates = False


@pytest.mark.parametrize(
    ("criterion", "weights", "unit"),
    [
        (Movement(window=2), [-(3 + 0) / 2, -(-2 + 4) / 2], (-1.5 - 1.0) / 2),
        (SNIP(window=2), [3 / 2, 2 / 2], abs(3 - 2 + 0 + 4) / 2),
        (Fisher(window=2), [9 / 2 / 2, (4 + 16) / 2 / 2], (9 + 4 + 16) / 2 / 2),
    ],
    ids=str,
)
def test_scores_of_gradients(criterion: Criterion, weights: list[float], unit: float) -> None:
    layer = linear([[1.0, -2.0]])
    assert scores_of(layer, criterion, data=STEPS, loss=half_square)["weight"].tolist() == [pytest.approx(weights)]
    assert scores_of(layer, criterion, Channel(), STEPS, loss=half_square)["weight"].tolist() == [pytest.approx(unit)]


def test_what_moves_towards_zero_goes_before_what_is_small() -> None:
    layer = linear([[1.0, 0.1]])
    prune(
        layer,
        0.5,
        criterion=Movement(window=1),
        data=[1],
        loss=lambda model, _: (model.weight * torch.tensor([[1.0, -1.0]])).sum(),
    )
    assert layer.weight.tolist() == [[0.0, pytest.approx(0.1)]]


@pytest.mark.parametrize(
    "criterion", [Movement(window=2), LastMovement(window=2)], ids=["all steps", "since the update"]
)
def test_movement_adds_up_over_updates_and_stops_at_the_last(criterion: Movement) -> None:
    moved: list[Tensor] = []  # by how much the weights of the middle layer grow, step by step

    def watch(trainer: Any, module: MLP, optimizer: Any) -> None:
        weight = module.net[4].weight
        moved.append(-(weight.detach() * weight.grad))

    options: dict[str, Any] = {"start": 4, "end": 8, "frequency": 4, "schedule": lambda progress: (1 + progress) / 2}
    pruning = Pruning(0.8, criterion=criterion, granularity=Weight(), targets=["net.4.*"], **options)
    recorder = MaskRecorder(pruning)
    model = MLP(optimizer="adam")
    fit(model, On(on_before_optimizer_step=watch), pruning, recorder, max_epochs=3)

    first, last = (recorder.masks[step]["net.4.weight"] for step in (4, 8))
    early = torch.stack(moved[2:4]).sum(0).flatten()
    assert set((~first).flatten().nonzero().flatten().tolist()) == set(early.argsort()[:32].tolist())
    seen = torch.stack(moved[2:8] if criterion.accumulates else moved[6:8]).sum(0)
    late = seen.masked_fill(~first, -math.inf).flatten()
    assert set((~last).flatten().nonzero().flatten().tolist()) == set(late.argsort()[:64].tolist())
    assert agrees(model, pruning.masks)
    assert not pruning.state_dict()["observed"]["statistics"]  # nothing is kept when nothing is to come


# ------------------------------------------------------------------------------------------------ before training


def test_grasp_is_the_weight_times_the_hessian_times_the_gradient() -> None:
    # L = (w x)^2 / 2 with x = (3, 1): H = x x^T, g = (3, 1) for w = (1, -2), H g = 10 x
    layer = linear([[1.0, -2.0]])
    scores = scores_of(layer, GraSP(), data=STEPS[:1], loss=half_square)["weight"]
    assert scores.tolist() == [pytest.approx([30.0, -20.0])]
    assert scores_of(layer, GraSP(), Channel(), STEPS[:1], loss=half_square)["weight"].tolist() == [pytest.approx(10.0)]


def test_grasp_says_how_the_norm_of_the_gradient_falls() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)

    def flow() -> float:
        gradients = torch.autograd.grad(half_square(model, x), [model[0].weight, model[2].weight])
        return float(sum(g.square().sum() for g in gradients))

    scores, before, small = scores_of(model, GraSP(), data=[x], loss=half_square), flow(), 1e-6
    for name, found in scores.items():
        weight = model.get_parameter(name)
        with torch.no_grad():
            weight[1, 2] *= 1 - small
        assert (before - flow()) / small / 2 == pytest.approx(float(found[1, 2]), rel=1e-4)
        with torch.no_grad():
            weight[1, 2] /= 1 - small


def test_flow_is_the_sum_over_paths() -> None:
    # R = |1 1| |2 -1; 3 0| 1 = (2 + 1) + (3 + 0) = 6, of which log R has w dR/dw / R
    model = nn.Sequential(linear([[2.0, -1.0], [3.0, 0.0]]), nn.ReLU(), linear([[1.0, -1.0]]))
    scores = scores_of(model, SynFlow(), data=[torch.zeros(7, 2)])
    torch.testing.assert_close(scores["0.weight"], torch.tensor([[2.0, 1.0], [3.0, 0.0]]) / 6)
    torch.testing.assert_close(scores["2.weight"], torch.tensor([[3.0, 3.0]]) / 6)


def test_flow_is_conserved_and_in_range_for_any_depth() -> None:
    torch.manual_seed(0)
    layers = [module for _ in range(60) for module in (nn.Linear(40, 40, bias=False), nn.ReLU())]
    for layer in layers[::2]:
        layer.weight.data *= 1e4
    scores = scores_of(nn.Sequential(*layers), SynFlow(), data=[torch.zeros(1, 40)])
    assert all(float(found.sum()) == pytest.approx(1.0, rel=1e-5) for found in scores.values())


@pytest.mark.slow
def test_many_rounds_keep_the_flow_where_one_loses_a_layer() -> None:
    """The paper's point: at a sparsity that leaves a few paths, no layer is lost."""

    def kept(rounds: int) -> list[int]:
        torch.manual_seed(1)
        sizes = [20, 100, 100, 100, 4]
        layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)]
        model = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())])
        prune(model, 0.9985, criterion=SynFlow(), data=[torch.zeros(1, 20)], rounds=rounds)
        return [int(layer.weight.count_nonzero()) for layer in layers]

    assert min(kept(rounds=100)) > 0
    assert sum(kept(rounds=100)) == sum(kept(rounds=1)) == 22400 - round(0.9985 * 22400)
    assert min(kept(rounds=1)) == 0


def test_flow_leaves_the_model_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = prune(model, 0.5, criterion=SynFlow(), data=[torch.zeros(2, 1, 4, 4)])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] * masks[name] if name in masks else before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([torch.zeros(2, 3, dtype=torch.long)], "which SynFlow fills with ones, got torch.int64"),
        ([{"x": 1}], "got dict"),
    ],
)
def test_flow_needs_an_input_that_can_be_filled_with_ones(data: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        prune(nn.Linear(3, 2), 0.5, criterion=SynFlow(), data=data)


@pytest.mark.parametrize("criterion", [GraSP(), SynFlow()], ids=str)
def test_what_needs_passes_of_its_own_is_refused_in_training(criterion: Criterion) -> None:
    name = type(criterion).__name__
    told = rf"training that is under way, got {name}.* use PruningAtInit\(\.\.\., criterion={name}\(\)\)"
    with pytest.raises(ValueError, match=told):
        Pruning(0.5, criterion=criterion)


# ------------------------------------------------------------------------------------------------ the weights alone


def test_lamp_is_the_share_of_what_is_no_less() -> None:
    scores = scores_of(nn.Sequential(linear([[1.0, -3.0], [2.0, 1.0]]), linear([[5.0, 0.0]])), LAMP())
    torch.testing.assert_close(scores["0.weight"], torch.tensor([[1 / 15, 1.0], [4 / 13, 1 / 15]]).double())
    assert scores["1.weight"].tolist() == [[1.0, 0.0]]


def test_lamp_of_nothing_but_zeros_is_zero() -> None:
    assert scores_of(linear([[0.0, 0.0]]), LAMP())["weight"].tolist() == [[0.0, 0.0]]


def test_lamp_leaves_every_layer_something() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20), nn.Linear(20, 2))
    model[1].weight.data *= 1e-3
    masks = prune(model, 0.99, criterion=LAMP())
    assert all(mask.any() for mask in masks.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.99 * 1240)


def test_the_geometric_median_goes_first() -> None:
    # distances: (0,0)-(3,4) 5, (0,0)-(0,1) 1, (3,4)-(0,1) 3 sqrt(2)
    layer = linear([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    far = math.sqrt(18)
    assert scores_of(layer, FPGM(), Channel())["weight"].tolist() == pytest.approx([6.0, 5 + far, 1 + far], rel=1e-6)
    assert scores_of(layer, FPGM())["weight"].shape == (3, 2)
    up = nn.ConvTranspose1d(2, 3, 1, bias=False)
    up.weight.data = layer.weight.data.T[..., None].clone()
    assert scores_of(up, FPGM(), Channel())["weight"].tolist() == pytest.approx([6.0, 5 + far, 1 + far], rel=1e-6)


@pytest.mark.parametrize("first", [0, 1])
def test_the_head_whose_queries_are_nearest_to_the_others_goes_first(first: int) -> None:
    layer = Attention(6, 3)
    rows = torch.arange(6.0)[:, None].expand(6, 6).clone()  # distances add up to most at the ends
    layer.q.weight.data = rows.roll(2 * (first - 1), 0)
    masks = prune(layer, 1 / 3, criterion=FPGM(), granularity=Head(), example_inputs=torch.randn(2, 4, 6))
    assert masks["q.weight"].any(1).view(3, 2).tolist() == [[head != first] * 2 for head in range(3)]


def test_the_factors_of_a_batch_norm_are_the_scores_of_the_channels_in_front() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU())
    model[1].weight.data = torch.tensor([0.5, -2.0, 0.1])
    assert scores_of(model, BatchNormScale(), Channel())["0.weight"].tolist() == pytest.approx([0.5, 2.0, 0.1])
    assert scores_of(model, BatchNormScale())["0.weight"][1].tolist() == [[[2.0, 2.0], [2.0, 2.0]]]


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
        nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)),
    ],
)
def test_a_layer_without_factors_behind_it_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"0\.weight: no norm with scales follows its layer"):
        prune(model, 0.5, criterion=BatchNormScale(), granularity=Channel())


# ------------------------------------------------------------------------------------------------ activations


def test_neurons_that_are_zero_most_go_first() -> None:
    layer = linear([[1.0], [-1.0], [0.0]], [0.0, 0.5, 0.0])
    data = [torch.tensor([[1.0], [2.0]]), torch.tensor([[-1.0], [0.0]])]  # 1 2 -1 0; -.5 -1.5 1.5 .5; 0 0 0 0
    assert scores_of(layer, APoZ(window=2), Channel(), data)["weight"].tolist() == [0.5, 0.5, 0.0]
    assert scores_of(layer, APoZ(window=1), Channel(), data)["weight"].tolist() == [1.0, 0.0, 0.0]


def wanda(model: nn.Module, data: Iterable[Any], name: str = "weight") -> Tensor:
    """The scores before they are compared within rows."""
    found: dict[str, Tensor] = {}

    def look(scores: Scores, sparsity: float) -> Mapping[str, int]:
        found[name] = scores.raw(name)
        return scores.sizes

    prune(model, 0.0, criterion=Wanda(window=99), data=data, targets=[name], scope=look)
    return found[name]


def test_wanda_is_the_weight_times_the_norm_of_its_input() -> None:
    layer = linear([[1.0, -2.0], [3.0, 0.5]])
    data = [torch.tensor([[[3.0, 1.0], [0.0, 1.0]]]), torch.tensor([[4.0, 1.0]])]
    norms = torch.tensor([5.0, math.sqrt(3)]) / math.sqrt(3)
    torch.testing.assert_close(wanda(layer, data), layer.weight.abs().detach() * norms)


def test_wanda_compares_within_rows_and_groups() -> None:
    layer = linear([[1.0, 2.0, 3.0, 4.0], [50.0, 60.0, 70.0, 80.0]])
    data = [torch.tensor([[8.0, 1.0, 1.0, 1.0]])]
    masks = prune(layer, 0.5, criterion=Wanda(), data=data)
    assert masks["weight"].tolist() == [[True, False, False, True], [True, False, False, True]]
    layer = linear([[1.0, 2.0, 3.0, 4.0], [50.0, 60.0, 70.0, 80.0]])
    masks = prune(layer, 0.5, criterion=Wanda(), data=data, granularity=NM(1, 2))
    assert masks["weight"].tolist() == [[True, False, False, True], [True, False, False, True]]


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), (5, 4, 7, 7)),
        (nn.Conv1d(4, 4, 3, stride=2, padding_mode="circular", padding=1), (5, 4, 9)),
    ],
    ids=str,
)
def test_wanda_of_a_convolution_is_that_of_its_unfolded_form(layer: nn.Module, size: tuple[int, ...]) -> None:
    x = torch.randn(size)
    scores = wanda(layer, [x])
    # an input that a weight meets is what its gradient would be, were that of a single output one
    with torch.enable_grad():
        out = layer(x)
        channel = out.flatten(2).movedim(1, 0).flatten(1)
        for row in range(len(channel)):
            met = torch.stack([torch.autograd.grad(y, layer.weight, retain_graph=True)[0][row] for y in channel[row]])
            norm = met.square().mean(0).sqrt()
            torch.testing.assert_close(scores[row], (layer.weight[row].abs() * norm).detach(), rtol=1e-4, atol=1e-5)


def test_wanda_of_a_transposed_convolution_takes_the_norm_of_the_channel() -> None:
    layer, x = nn.ConvTranspose2d(3, 4, 2), torch.randn(5, 3, 6, 6)
    norms = x.movedim(1, 0).flatten(1).square().mean(1).sqrt().view(3, 1, 1, 1)
    torch.testing.assert_close(wanda(layer, [x]), layer.weight.abs().detach() * norms)


@pytest.mark.parametrize("kdim", [None, 3])
def test_wanda_of_an_attention_sees_queries_keys_and_values(kdim: int | None) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, kdim=kdim, batch_first=True)

        def forward(self, x: list[Tensor]) -> Tensor:
            return self.attention(*x)[0]

    query, key, value = torch.randn(2, 5, 4), torch.randn(2, 6, kdim or 4), torch.randn(2, 6, 4)
    norms = [x.flatten(0, 1).square().mean(0).sqrt() for x in (query, key, value)]
    model, attribute = Attending(), "in_proj_weight" if kdim is None else "k_proj_weight"
    scores = wanda(model, [([query, key, value], None)], f"attention.{attribute}")
    expected = torch.stack(norms).repeat_interleave(4, 0) if kdim is None else norms[1].expand(4, 3)
    torch.testing.assert_close(scores, getattr(model.attention, attribute).abs().detach() * expected)


def test_wanda_of_tied_weights_takes_the_inputs_of_both_and_refuses_what_it_cannot_read() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    model[2].weight = model[0].weight
    x = torch.randn(4, 2)
    both = torch.cat([x, model[:2](x)]).square().mean(0).sqrt()
    torch.testing.assert_close(wanda(model, [x], "0.weight"), (model[0].weight.abs() * both).detach())
    with pytest.raises(ValueError, match=r"weight_ih_l0: its layer must be a linear one, .* got LSTM"):
        prune(nn.LSTM(2, 2), 0.5, criterion=Wanda(), data=[torch.zeros(3, 2)])


@pytest.mark.parametrize("kind", [Movement, SNIP, Fisher, GraSP, Wanda, APoZ])
def test_a_window_of_no_step_is_refused(kind: type) -> None:
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        kind(window=0)


def test_equal_weights_in_a_row_are_told_apart_by_their_inputs_alone() -> None:
    layer = nn.Linear(6, 5)
    nn.init.ones_(layer.weight)
    prune(layer, 0.5, criterion=Wanda(), granularity=Weight(), data=[torch.tensor([[6.0, 1.0, 5.0, 2.0, 4.0, 3.0]])])
    assert (layer.weight != 0).int().tolist() == [[1, 0, 1, 0, 1, 0]] * 5
