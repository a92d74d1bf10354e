"""Parts: gradients are observed a few rows at a time, which changes nothing but the time it takes."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_prune import SNIP, Block, Channel, Criterion, Fisher, Granularity, Head, Movement, Sensitivity, Weight
from lightning_prune.models.parameters import find
from lightning_prune.units.units import Units
from lightning_prune.updates.statistics import Observation


class Net(nn.Sequential):
    """A convolution, a transposed one, and linear layers of which one has a single row."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2), nn.Flatten()),
            *(nn.Linear(4 * 5 * 5, 7), nn.ReLU(), nn.Linear(7, 1)),
        )


def observed(model: nn.Module, criterion: Criterion, granularity: Granularity) -> list[Units]:
    torch.manual_seed(1)
    units, _ = granularity.find_units(find(model), model, (torch.randn(3, 2, 6, 6),))
    observation = Observation(criterion, units)
    for _ in range(3):
        model.zero_grad()
        model(torch.randn(3, 2, 6, 6)).square().sum().backward()
        observation.gradients({id(parameter) for parameter in model.parameters()}, grad_scale=2.0)
        observation.step()
    return units


@pytest.mark.parametrize("rows", [1, 20, 60])
@pytest.mark.parametrize("granularity", [Weight(), Channel(coupled=False), Channel(), Block(2, 2)], ids=repr)
@pytest.mark.parametrize("criterion", [Sensitivity(), Movement(), SNIP(), Fisher()], ids=repr)
def test_parts_add_up_to_the_same_statistics_and_scores(
    criterion: Criterion, granularity: Granularity, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net()
    whole = observed(model, criterion, granularity)
    monkeypatch.setattr("lightning_prune.units.weights.PART", rows)
    parts = observed(copy.deepcopy(model), criterion, granularity)
    assert [unit.name for unit in whole] == [unit.name for unit in parts]
    for one, other in zip(whole, parts, strict=True):
        assert one.statistic is not None
        assert other.statistic is not None
        assert one.statistic.count_nonzero() > 0
        torch.testing.assert_close(one.statistic, other.statistic, rtol=1e-6, atol=0)
        torch.testing.assert_close(criterion.scores(one), criterion.scores(other), rtol=1e-6, atol=0)


@pytest.mark.parametrize("granularity", [Weight(), Channel(coupled=False)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parts_of_other_types_and_layouts(
    granularity: Granularity, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for most in (1, 1 << 18):
        monkeypatch.setattr("lightning_prune.units.weights.PART", most)
        model = Net().to(dtype)
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter).to(memory_format=torch.preserve_format)
        model[0].weight.data = model[0].weight.data.to(memory_format=torch.channels_last)
        units, _ = granularity.find_units(find(model), model)
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            for unit in units:
                unit.statistic = Sensitivity().observe(unit)
        found.append([unit.statistic for unit in units])
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert one.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def test_a_weight_is_taken_apart_between_rows_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_prune.units.weights.PART", 10)
    layer = nn.Linear(4, 5)
    units = Channel(coupled=False).find_units(find(layer), layer)[0][0]
    parts = list(units.parts())
    assert [part.size for part in parts] == [2, 2, 1]
    starts = [part.parameter.data_ptr() for part in parts]
    assert starts[0] == layer.weight.data_ptr()
    assert {after - before for before, after in pairwise(starts)} == {2 * 4 * 4}


def test_units_that_lie_across_rows_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_prune.units.weights.PART", 1)
    attention = nn.MultiheadAttention(4, 2)
    heads = Head().find_units(find(attention), attention)[0][0]
    layer = nn.Linear(4, 4)
    blocks = Block(2, 2).find_units(find(layer), layer)[0][0]
    assert list(heads.parts()) == [heads]
    assert list(blocks.parts()) == [blocks]
