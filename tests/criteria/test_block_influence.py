"""Block influence: one minus the cosine similarity of what enters a block and what leaves it."""

import math

import pytest
import torch
from models import Deep, Residual
from torch import Tensor, nn

from lightning_prune import BlockInfluence, Channel, Entropy, Layer, Wanda, prune
from lightning_prune.models.parameters import find
from lightning_prune.posttraining.observing import observed_units


class Turn(nn.Linear):
    """Adds a multiple of what enters, turned by 90 degrees."""

    def __init__(self, factor: float) -> None:
        super().__init__(2, 2, bias=False)
        self.weight = nn.Parameter(factor * torch.tensor([[0.0, -1.0], [1.0, 0.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def scores(model: nn.Module, data: list[Tensor]) -> list[float]:
    model.example_input_array = data[0]
    (units,) = observed_units(model, find(model), BlockInfluence(), Layer(), data, None)
    return BlockInfluence().scores(units).tolist()


def test_the_score_is_that_of_the_paper() -> None:
    factors = [0.5, 0.0, 3.0]
    model = nn.Sequential(*map(Turn, factors))
    found = scores(model, [torch.randn(2, 5, 2), torch.randn(1, 3, 2)])
    # what turns by an angle whose tangent is the factor
    assert found == pytest.approx([1 - 1 / math.sqrt(1 + factor**2) for factor in factors], abs=1e-6)
    masks = prune(model, 0.3, criterion=BlockInfluence(), granularity=Layer(), data=[torch.randn(2, 5, 2)])
    assert [bool(mask.any()) for mask in masks.values()] == [True, False, True]


def test_the_mean_is_over_tokens() -> None:
    model = Deep().net[2]
    data = [torch.randn(2, 5, 8), torch.randn(3, 4, 8)]
    similar: list[list[Tensor]] = [[] for _ in model]
    for batch in data:
        stream = batch
        for number, block in enumerate(model):
            left = block(stream)
            similar[number].append(nn.functional.cosine_similarity(stream, left, dim=-1).flatten())
            stream = left
    expected = [1 - float(torch.cat(values).mean().detach()) for values in similar]
    assert scores(model, data) == pytest.approx(expected, rel=1e-4)


class Convolving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


def test_the_features_of_a_map_are_its_channels() -> None:
    model, images = nn.Sequential(Convolving(), Convolving()), torch.randn(2, 4, 4, 4)
    left = model[0](images)
    expected = 1 - float(nn.functional.cosine_similarity(images, left, dim=1).mean().detach())
    assert scores(model, [images])[0] == pytest.approx(expected, rel=1e-4)


def test_units_that_are_no_blocks_are_refused() -> None:
    model, data = Deep().net, [torch.randn(2, 3, 8)]
    with pytest.raises(ValueError, match=r"it is no block: use granularity=Layer\(\)"):
        prune(model, 0.5, criterion=BlockInfluence(), granularity=Channel(), data=data)
    with pytest.raises(ValueError, match="granularity must have units of output channels"):
        prune(model, 0.5, criterion=Entropy(), granularity=Layer(), data=data, example_inputs=data[0])
    with pytest.raises(ValueError, match="its layer must be a linear one"):
        prune(model, 0.5, criterion=Wanda(), granularity=Layer(), data=data, example_inputs=data[0])
    given = {"criterion": BlockInfluence(), "granularity": Layer(), "data": data, "example_inputs": data[0]}
    with pytest.raises(ValueError, match=r"sequential must be None for Layer\(minimum=1\)"):
        prune(model, 0.5, sequential="2", **given)


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual(8, 2) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x=x)
        return x


def test_a_block_that_is_called_by_keyword_is_an_error() -> None:
    data = [torch.randn(2, 3, 8)]
    with pytest.raises(ValueError, match="must be called with the hidden states as a positional argument"):
        prune(ByKeyword(), 0.5, criterion=BlockInfluence(), granularity=Layer(), data=data, example_inputs=data[0])
    assert len(prune(ByKeyword(), 0.5, granularity=Layer(), example_inputs=data[0])) > 0
