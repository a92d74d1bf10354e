"""Budgets: a goal in channels, parameters or FLOPs is met by the shrunk model, and by no more than a channel."""

from typing import Any

import pytest
import torch
from architectures import CASES, Case, build
from models import MLP, ConvNet, agrees, fit
from torch import Tensor, nn

from lightning_prune import NM, Block, Channel, Head, MagnitudePruning, Pruning, RandomPruning, prune, shrink
from lightning_prune.models.flops import dense_flops
from lightning_prune.models.parameters import find
from lightning_prune.updates.budget import make_budget

COUPLED = Channel(coupled=True)


def cost(model: nn.Module, of: str, inputs: Tensor) -> int:
    """What the model as it stands costs, counted from itself."""
    if of == "parameters":
        return sum(parameter.numel() for parameter in model.parameters())
    return sum(dense_flops(model, inputs).values())


@pytest.mark.parametrize(
    ("case", "of"),
    [(case, "flops") for case in CASES.values()] + [(CASES[name], "parameters") for name in ("densenet", "gpt", "vgg")],
    ids=[*CASES, "densenet", "gpt", "vgg"],
)
def test_the_shrunk_model_meets_the_goal_and_a_channel_more_would_not(case: Case, of: str) -> None:
    model, inputs = build(case)
    dense = cost(model, of, inputs)
    units, _ = COUPLED.find_units(find(model), model, inputs)
    budget = make_budget(of, units, model, inputs)
    goal = round(0.6 * budget.max_sparsity, 2)
    masks = prune(model, goal, granularity=COUPLED, of=of, example_inputs=inputs)
    keep = {unit.name: int(unit.kept(masks).sum()) for unit in units}
    left = cost(shrink(model, inputs), of, inputs) / dense
    assert left == pytest.approx(budget.left(keep), abs=1e-9)
    assert left <= 1 - goal
    assert any(budget.left({**keep, name: count + 1}) > 1 - goal for name, count in keep.items() if count), keep


@pytest.mark.parametrize("scope", ["local", "erk"])
def test_every_scope_meets_the_goal(scope: Any) -> None:
    model, inputs = build(CASES["mobilenet"])
    dense = cost(model, "flops", inputs)
    prune(model, 0.5, granularity=COUPLED, scope=scope, of="flops", example_inputs=inputs)
    assert 0.35 < cost(shrink(model, inputs), "flops", inputs) / dense <= 0.5


def test_heads_are_removed_until_the_goal_is_met() -> None:
    model, inputs = build(CASES["vit"])
    dense = cost(model, "flops", inputs)
    prune(model, 0.2, granularity=Head(), of="flops", example_inputs=inputs)
    assert 0.6 < cost(shrink(model, inputs), "flops", inputs) / dense <= 0.8


@pytest.mark.parametrize("of", ["units", "parameters", "flops"])
def test_multiples_of_eight_meet_the_goal(of: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 44), nn.ReLU(), nn.Linear(44, 2))
    inputs = torch.ones(1, 4)
    dense = cost(model, of, inputs)
    prune(model, 0.5, granularity=Channel(coupled=True, round_to=8), of=of, example_inputs=inputs)
    widths = [int(model[layer].weight.any(1).sum()) for layer in (0, 2)]
    assert widths[0] % 8 == 0
    assert widths[1] % 8 == 0 or widths[1] == 44
    small = shrink(model, inputs)
    assert [small[layer].out_features for layer in (0, 2)] == widths
    left = sum(widths) / 108 if of == "units" else cost(small, of, inputs) / dense
    assert 0.5 - 8 / 54 < left <= 0.5


@pytest.mark.parametrize("of", ["parameters", "flops"])
def test_single_weights_count_as_a_sparse_kernel_would(of: str) -> None:
    model = MLP()
    dense = cost(model, of, torch.zeros(1, 6))
    prune(model, 0.5, of=of, example_inputs=torch.zeros(1, 6))
    zeros = {name: int((parameter == 0).sum()) for name, parameter in model.named_parameters() if parameter.ndim > 1}
    left = dense - sum(zeros.values()) * (2 if of == "flops" else 1)
    assert left == dense // 2


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("of", ["parameters", "flops"])
@pytest.mark.parametrize("stated", [True, False], ids=["array", "batch"])
def test_training_meets_the_goal_at_its_end_and_a_part_of_it_before(of: Any, stated: bool) -> None:
    inputs = torch.zeros(8, 2, 6, 6)
    model = ConvNet()
    model.example_input_array = inputs if stated else None
    dense = cost(model, of, inputs)
    callback = Pruning(0.5, granularity=COUPLED, schedule="linear", start=0, end=6, frequency=3, of=of)
    fit(model, callback)
    assert agrees(model, callback.masks)
    small = cost(shrink(model, inputs), of, inputs) / dense
    assert 0.25 < small <= 0.5
    assert callback.of == of


def test_the_plan_says_what_the_goal_is_counted_in(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.lightning_prune"):
        fit(ConvNet(), Pruning(0.5, granularity=COUPLED, start=0, end=4, of="flops"))
    assert "Pruning to sparsity 0.5 of the flops: " in caplog.text


def test_presets_take_it_too() -> None:
    assert RandomPruning(0.5, of="flops").of == "flops"


# ------------------------------------------------------------------------------------------------ what cannot be


def test_a_goal_out_of_reach_is_refused_before_anything_changes() -> None:
    model, inputs = build(CASES["vit"])
    before = [parameter.clone() for parameter in model.parameters()]
    message = r"sparsity must be at most 0\.\d+ of the parameters, since Channel.* leaves some units .*, got 0.9"
    with pytest.raises(ValueError, match=message):
        prune(model, 0.9, granularity=COUPLED, of="parameters", example_inputs=inputs)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"sparsity must be at most 0\.\d+ of the units, since Channel.*round_to=8"):
        fit(ConvNet(), Pruning(0.9, granularity=Channel(coupled=True, round_to=8), schedule="one_shot", start=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"sparsity": 0.5, "of": "channels"},
            'of must be "units", "parameters", "flops" or "latency", got \'channels\'',
        ),
        ({"threshold": 0.1, "of": "flops"}, 'of must be "units" for a threshold or a sparsity per layer'),
        ({"sparsity": {"*": 0.5}, "of": "flops"}, 'of must be "units" for a threshold or a sparsity per layer'),
        ({"sparsity": 0.5, "granularity": NM(), "of": "flops"}, r'of must be "units" for NM\(n=2, m=4\)'),
        ({"sparsity": 0.5, "granularity": Block(), "of": "parameters"}, r'of must be "units" for Block'),
    ],
)
def test_what_cannot_be_counted_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pruning(**arguments)
    with pytest.raises(ValueError, match=message):
        prune(MLP(), **arguments)


def test_flops_need_an_example_and_something_to_count() -> None:
    with pytest.raises(ValueError, match='of="flops" needs example inputs'):
        prune(MLP(), 0.5, of="flops")
    with pytest.raises(ValueError, match="sparsity must be at most"):
        fit(MLP(), MagnitudePruning(0.99999, of="parameters", schedule="one_shot", start=0))
