"""Permuted models compute what they did, in groups of rows that keep more of the weights."""

import logging
from copy import deepcopy
from itertools import permutations

import pytest
import torch
from architectures import CASES, build
from models import Narrow, fit
from torch import Tensor, nn

from lightning_prune import Pruning, SharedFanIn, Wanda, permute_rows, prune
from lightning_prune.models.forward import difference, run
from lightning_prune.models.parameters import named_parameters
from lightning_prune.posttraining.row_order import best_order, kept_by_groups
from lightning_prune.structure.tracing import trace


class Hidden(nn.Sequential):
    """A layer of rows that need the first or the second half of the inputs, by turns, and one that reads them."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
        with torch.no_grad():
            for row, weight in enumerate(self[0].weight):
                weight[4 * (row % 2) :][:4] = 0.01


def magnitude(model: nn.Module, masks: dict[str, Tensor]) -> float:
    weights = named_parameters(model)
    return sum(float(weights[name].detach()[mask].abs().sum()) for name, mask in masks.items())


@pytest.mark.parametrize("name", CASES)
def test_the_outputs_stay_and_more_is_kept(name: str) -> None:
    model, inputs = build(CASES[name])
    model, inputs = model.double().eval(), inputs.double() if inputs.is_floating_point() else inputs
    before = deepcopy(model.state_dict())
    better = permute_rows(model, inputs, sparsity=0.5, rows=2)
    assert difference(run(model, inputs), run(better, inputs)) < 1e-12
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    changed = {key for key, value in better.state_dict().items() if not torch.equal(value, before[key])}
    groups = {m.name for group in trace(model, inputs).groups if not group.owners for m in group.members}
    assert changed <= groups
    for each in changed:  # the same numbers in another place
        assert better.state_dict()[each].flatten().sort()[0].equal(before[each].flatten().sort()[0])
    one, other = (prune(m, 0.5, granularity=SharedFanIn(2), scope="local") for m in (deepcopy(model), deepcopy(better)))
    assert bool(changed) == (magnitude(better, other) > magnitude(model, one))
    assert changed or name == "conv1d"  # whose channels go in pairs through a grouped convolution


def test_rows_that_need_the_same_inputs_come_together(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = Hidden(), torch.randn(4, 8)
    caplog.set_level(logging.INFO, "lightning_prune")
    better = permute_rows(model, inputs, sparsity=0.5, rows=3)
    masks = prune(better, 0.5, granularity=SharedFanIn(3), targets=["0.weight"])
    assert better[0].weight[masks["0.weight"]].numel() == 24
    assert not (better[0].weight[masks["0.weight"]] == 0.01).any()
    assert "0.weight keeps" in caplog.text
    worse = prune(deepcopy(model), 0.5, granularity=SharedFanIn(3), targets=["0.weight"])
    assert (model[0].weight[worse["0.weight"]] == 0.01).any()


@pytest.mark.parametrize("recurrent", [False, True])
def test_a_model_without_a_free_order_is_a_warning(recurrent: bool) -> None:
    torch.manual_seed(0)
    model = nn.LSTM(4, 8, batch_first=True) if recurrent else nn.Linear(4, 8)
    with pytest.warns(UserWarning, match="permute_rows leaves the model as it is: it has no linear layer"):
        same = permute_rows(model, torch.zeros(2, 3, 4), sparsity=0.5, rows=2)
    assert all(a.equal(b) for a, b in zip(same.state_dict().values(), model.state_dict().values(), strict=True))


def test_the_criterion_decides() -> None:
    model = Hidden()
    seen = torch.cat([torch.ones(4, 4), torch.full((4, 4), 1e-6)], 1)  # the last inputs hardly matter to Wanda
    by_magnitude = permute_rows(model, seen, sparsity=0.5, rows=3)
    by_wanda = permute_rows(model, seen, sparsity=0.5, rows=3, criterion=Wanda(), data=[seen])
    assert not by_magnitude[0].weight.equal(by_wanda[0].weight)
    with pytest.raises(ValueError, match="data must be given: Wanda needs forwards"):
        permute_rows(model, seen, sparsity=0.5, criterion=Wanda())


def test_in_place_the_parameters_stay_the_same_objects_and_it_trains() -> None:
    model = Narrow()
    parameters, expected = list(model.parameters()), model(model.example)
    dense = deepcopy(model.state_dict())
    assert permute_rows(model, model.example, sparsity=0.75, rows=2, inplace=True) is model
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert any(not value.equal(dense[name]) for name, value in model.state_dict().items())
    assert torch.allclose(model(model.example), expected, atol=1e-5)
    pruning = Pruning(0.75, granularity=SharedFanIn(2))
    fit(model, pruning, max_epochs=1)
    assert sum(int(mask.sum()) for mask in pruning.masks.values()) > 0


def test_what_was_random_is_random_still_and_two_calls_agree() -> None:
    model, inputs = build(CASES["vgg"])
    state = torch.get_rng_state()
    one = permute_rows(model, inputs, sparsity=0.5, rows=4)
    assert torch.get_rng_state().equal(state)
    other = permute_rows(model, inputs, sparsity=0.5, rows=4)
    assert all(a.equal(b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_small_layers_come_close_to_the_best_of_all_orders(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    found, best, given = [], [], []
    for _ in range(5):
        layers = [torch.rand(6, 5, generator=generator), torch.rand(6, 4, generator=generator)]
        keep = [2, 1]
        every = [kept_by_groups(layers, keep, torch.tensor(order), rows) for order in permutations(range(6))]
        found.append(kept_by_groups(layers, keep, best_order(layers, keep, rows), rows))
        best.append(max(every))
        given.append(every[0])
        assert given[-1] <= found[-1] <= best[-1] + 1e-5
    assert sum(found) > 0.98 * sum(best)
    assert sum(found) - sum(given) > 0.5 * (sum(best) - sum(given))


def test_one_row_a_group_and_one_group_change_nothing() -> None:
    scores = [torch.rand(6, 5)]
    for rows in (1, 6, 8):
        assert kept_by_groups(scores, [2], best_order(scores, [2], rows), rows) == pytest.approx(
            kept_by_groups(scores, [2], torch.arange(6), rows)
        )


@pytest.mark.parametrize(("name", "value"), [("sparsity", 90), ("sparsity", 1.0), ("rows", 0), ("inplace", 1)])
def test_bad_arguments_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises((ValueError, TypeError), match=f"{name} must be"):
        permute_rows(Hidden(), torch.randn(4, 8), **{"sparsity": 0.5, name: value})
