"""The four strategies inside a real fit, against scores worked out by hand on one linear layer that does not move."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from models import MLP, fit
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune import (
    Channel,
    Criterion,
    EntropyPruning,
    MagnitudePruning,
    Pruning,
    RandomPruning,
    SensitivityPruning,
    Weight,
)
from lightning_prune.units.units import Units


class Still(LightningModule):
    """Trains one layer with learning rate 0 on given batches; its loss is a weighted sum of the mean outputs."""

    def __init__(self, layer: nn.Module, batches: list[Tensor], factors: list[float] | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.batches = batches
        self.factors = torch.tensor(factors) if factors else None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        mean = self.layer(batch).mean(0)
        return mean.sum() if self.factors is None else (mean * self.factors).sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.layer(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(3)
        return DataLoader([100 * torch.randn(self.batches[0].shape, generator=generator)], batch_size=None)


def linear(rows: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rows))
        if bias is not None:
            layer.bias.copy_(torch.tensor(bias))
    return layer


def alive(layer: nn.Module) -> list[bool]:
    """Which neurons have a weight left."""
    return layer.weight.flatten(1).any(1).tolist()


# ---------------------------------------------------------------------------------------------------- magnitude

ROWS = [[0.1, -0.9, 0.3], [-0.2, 0.8, 0.4], [0.5, -0.6, -0.7]]


@pytest.mark.parametrize(
    ("goal", "kept"),
    [
        ({"sparsity": 1 / 3}, [[0, 1, 0], [0, 1, 1], [1, 1, 1]]),
        ({"sparsity": 0.5}, [[0, 1, 0], [0, 1, 0], [1, 1, 1]]),  # round(4.5) is 4
        ({"sparsity": 0.8}, [[0, 1, 0], [0, 1, 0], [0, 0, 0]]),
        ({"threshold": 0.45}, [[0, 1, 0], [0, 1, 0], [1, 1, 1]]),
        # means of the rows: 0.433, 0.467, 0.6
        ({"sparsity": 1 / 3, "granularity": Channel()}, [[0, 0, 0], [1, 1, 1], [1, 1, 1]]),
        ({"threshold": 0.5, "granularity": Channel()}, [[0, 0, 0], [0, 0, 0], [1, 1, 1]]),
    ],
)
def test_magnitude_prunes_the_smallest_absolute_values(goal: dict[str, Any], kept: list[list[int]]) -> None:
    model = Still(linear(ROWS), [torch.ones(2, 3)])
    callback = MagnitudePruning(**goal, schedule="one_shot", start=0)
    fit(model, callback, max_epochs=1)
    assert callback.masks["layer.weight"].int().tolist() == kept
    assert torch.equal(model.layer.weight, torch.tensor(ROWS) * torch.tensor(kept))


# ---------------------------------------------------------------------------------------------------- random


def random_masks(seed: int, start: int = 0, **arguments: Any) -> dict[str, Tensor]:
    torch.manual_seed(start)  # neither the generator nor the weights have a say
    callback = RandomPruning(0.5, seed=seed, schedule="one_shot", start=0, **arguments)
    fit(MLP(seed=start), callback, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    return callback.masks


@pytest.mark.parametrize("arguments", [{}, {"granularity": Weight()}], ids=["neuron", "weight"])
def test_the_seed_alone_decides_what_random_pruning_takes(arguments: dict[str, Any]) -> None:
    first, again, other = (
        random_masks(**at, **arguments) for at in ({"seed": 0}, {"seed": 0, "start": 1}, {"seed": 1})
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_random_pruning_takes_whole_neurons_anywhere() -> None:
    taken = torch.zeros(8)
    for seed in range(20):
        mask = random_masks(seed, scope="local")["net.0.weight"]
        assert torch.equal(mask.all(1), mask.any(1))
        assert int(mask.any(1).sum()) == 4
        taken += ~mask.any(1)
    # each neuron goes in half of the draws: fewer than 3 or more than 17 of 20 has a chance of 1 in 2,500
    assert taken.min() >= 3
    assert taken.max() <= 17


def test_random_pruning_draws_anew_for_each_layer() -> None:
    model = Still(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)), [torch.ones(2, 12)])
    callback = RandomPruning(0.5, targets=["layer.*"], schedule="one_shot", start=0)
    fit(model, callback, max_epochs=1)
    assert not torch.equal(callback.masks["layer.0.weight"], callback.masks["layer.1.weight"])


def test_a_random_threshold_takes_about_that_share() -> None:
    model = Still(linear(torch.ones(200, 2).tolist()), [torch.ones(2, 2)])
    fit(model, RandomPruning(threshold=0.3, schedule="one_shot", start=0), max_epochs=1)
    assert 0.2 < alive(model.layer).count(False) / 200 < 0.4


# ---------------------------------------------------------------------------------------------------- entropy

# What the four neurons put out in the two steps of the window, by feature. With four bins:
# 0 is constant: H = 0; 1 takes two values, one in each step: ln 2; 2 is at 0 in three cases of four: 0.5623;
# 3 takes four values: ln 4
FIRST = [[5.0, 0.0, 0.0, 0.0], [5.0, 0.0, 0.0, 1.0]]
SECOND = [[5.0, 1.0, 0.0, 2.0], [5.0, 1.0, 1.0, 3.0]]
BEFORE = [[-9.0, 3.0, 3.0, 3.0], [7.0, 3.0, 3.0, 3.0]]  # outside the window, and quite different


# weights without a zero that put out exactly what they are made to: applied twice they give 2 (or 4) times the input
MIX = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
MIX4 = torch.kron(MIX, MIX)


def entropy_model(*outputs: list[list[float]]) -> Still:
    return Still(linear(MIX4.tolist(), [0.5] * 4), [torch.tensor(output) @ MIX4 / 4 for output in outputs])


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ({"sparsity": 0.25, "prune": "high"}, [1, 1, 1, 0]),
        ({"sparsity": 0.5, "prune": "high"}, [1, 0, 1, 0]),
        ({"sparsity": 0.75, "prune": "high"}, [1, 0, 0, 0]),
        ({"sparsity": 0.25, "prune": "low"}, [0, 1, 1, 1]),
        ({"sparsity": 0.5, "prune": "low"}, [0, 1, 0, 1]),
        ({"sparsity": 0.75, "prune": "low"}, [0, 0, 0, 1]),
        ({"threshold": 0.56, "prune": "high"}, [1, 0, 0, 0]),
        ({"threshold": 0.57, "prune": "high"}, [1, 0, 1, 0]),
        ({"threshold": 0.70, "prune": "high"}, [1, 1, 1, 0]),
        ({"threshold": 1.39, "prune": "high"}, [1, 1, 1, 1]),  # ln 4 is 1.386
        ({"threshold": 0.57, "prune": "low"}, [0, 1, 0, 1]),
        ({"threshold": 0.70, "prune": "low"}, [0, 0, 0, 1]),
        ({"sparsity": 0.5}, [1, 0, 1, 0]),  # high is the default
    ],
)
@pytest.mark.parametrize("late", [False, True], ids=["from_the_start", "after_two_steps"])
def test_entropy_of_the_outputs_over_the_window_decides(arguments: dict[str, Any], kept: list[int], late: bool) -> None:
    batches = [BEFORE, BEFORE, FIRST, SECOND] if late else [FIRST, SECOND]
    model = entropy_model(*batches, FIRST)
    callback = EntropyPruning(**arguments, bins=4, window=2, schedule="one_shot", start=len(batches))
    fit(model, callback, max_epochs=1, val_check_interval=1)  # validations between the steps must not count
    assert alive(model.layer) == [bool(k) for k in kept]
    assert model.layer.bias.tolist() == [0.5 * k for k in kept]


@pytest.mark.parametrize(("bins", "pruned"), [(2, 1), (4, 0)])
def test_bins_are_equal_parts_between_smallest_and_largest_output(bins: int, pruned: int) -> None:
    # neuron 0 outputs 0, 1, 1.25, 3: two bins hold 3 and 1 of them (H = 0.562), four hold 1, 2, 0 and 1 (1.040);
    # neuron 1 has two values, half each (0.693) in both cases
    outputs = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.25, 3.0], [3.0, 3.0]])
    model = Still(linear(MIX.tolist()), [outputs @ MIX / 2])
    fit(model, EntropyPruning(0.5, bins=bins, window=1, schedule="one_shot", start=0), max_epochs=1)
    assert alive(model.layer).index(False) == pruned


def test_positions_of_a_feature_map_are_values_of_its_channel() -> None:
    layer = nn.Conv2d(2, 2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(MIX.view(2, 2, 1, 1))
    maps = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 3.0]])
    model = Still(layer, [(MIX @ maps / 2).view(1, 2, 2, 2)])
    fit(model, EntropyPruning(threshold=0.6, bins=4, window=1, schedule="one_shot", start=0), max_epochs=1)
    assert alive(layer) == [False, True]  # ln 4 against 0.562


def test_each_update_of_entropy_looks_at_its_own_window() -> None:
    # at first neuron 3 has the highest entropy, later neuron 0
    later = [[0.0, 1.0, 1.0, 2.0], [1.0, 1.0, 1.0, 2.0]], [[2.0, 1.0, 1.0, 2.0], [3.0, 1.0, 1.0, 2.0]]
    model = entropy_model(FIRST, SECOND, *later, FIRST)
    callback = EntropyPruning(0.5, bins=4, window=2, schedule=lambda p: 0.5 + 0.5 * p, start=2, end=4, frequency=2)
    fit(model, callback, max_epochs=1)
    assert alive(model.layer) == [False, True, True, False]


# ---------------------------------------------------------------------------------------------------- sensitivity

# The gradient of row i is factor i times the mean input x. With x = (2, 1, 2) and then (-2, 1, 2):
#   sum w dL/dw:   0: 2, -2    1: -1.5, -0.5    2: 3, -1    3: 0, -2    4: 0.25, -0.25
#   mean square:   0: 4        1: 1.25          2: 5        3: 2        4: 0.0625
# (the square of the mean would put 0 with 4 in front of 1; the sum of squares would put 4 behind 0 and 3)
NEURONS = [[1.0, 1.0, -0.5], [0.25, 3.0, -1.0], [1.0, 2.0, -0.5], [0.5, 1.0, -1.0], [0.125, 2.0, -1.0]]
FACTORS = [1.0, -1.0, 1.0, 1.0, 1.0]
X1 = [[3.0, 2.0, 2.0], [1.0, 0.0, 2.0]]
X2 = [[-1.0, 1.0, 4.0], [-3.0, 1.0, 0.0]]
JUNK = [[0.0, -8.0, 9.0], [0.0, -8.0, 9.0]]
HALVES = [[[4.0, 2.0, 0.0]], [[0.0, 0.0, 4.0]], [[-2.0, 2.0, 2.0]], [[-2.0, 0.0, 2.0]]]  # in pairs the means of X1, X2


@pytest.mark.parametrize(
    ("batches", "trainer", "start"),
    [([X1, X2, JUNK], {}, 0), ([JUNK, X1, X2, JUNK], {}, 3), (HALVES, {"accumulate_grad_batches": 2}, 0)],
    ids=["from_the_start", "after_one_step", "accumulated"],
)
@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ({"sparsity": 0.2}, [1, 1, 1, 1, 0]),
        ({"sparsity": 0.4}, [1, 0, 1, 1, 0]),
        ({"sparsity": 0.6}, [1, 0, 1, 0, 0]),
        ({"sparsity": 0.8}, [0, 0, 1, 0, 0]),
        ({"threshold": 0.9}, [1, 1, 1, 1, 0]),
        ({"threshold": 2.1}, [1, 0, 1, 0, 0]),
        ({"threshold": 4.0}, [1, 0, 1, 0, 0]),  # not below it
    ],
)
def test_the_mean_squared_taylor_term_of_a_neuron_decides(
    batches: list[list[list[float]]],
    trainer: dict[str, Any],
    start: int,
    arguments: dict[str, Any],
    kept: list[int],
) -> None:
    model = Still(linear(NEURONS), [torch.tensor(batch) for batch in batches], FACTORS)
    callback = SensitivityPruning(**arguments, window=2, schedule="one_shot", start=start)
    fit(model, callback, max_epochs=1, **trainer)
    assert alive(model.layer) == [bool(k) for k in kept]


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        # (w x)^2: 4 1 1 | 1/16 * 4 9 4 | 4 4 1 | 1 1 4 | 1/64 * 4 4 4
        ({"threshold": 2.0}, [[1, 0, 0], [0, 1, 1], [1, 1, 0], [0, 0, 1], [0, 1, 1]]),
        ({"sparsity": 7 / 15}, [[1, 0, 0], [0, 1, 1], [1, 1, 0], [0, 0, 1], [0, 1, 1]]),
        ({"sparsity": 2 / 15}, [[1, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1], [0, 1, 1]]),
        ({"sparsity": 14 / 15}, [[0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]),
    ],
)
def test_sensitivity_of_single_weights(arguments: dict[str, Any], kept: list[list[int]]) -> None:
    model = Still(linear(NEURONS), [torch.tensor(X1), torch.tensor(X2)], FACTORS)
    callback = SensitivityPruning(**arguments, window=2, granularity=Weight(), schedule="one_shot", start=0)
    fit(model, callback, max_epochs=1)
    assert callback.masks["layer.weight"].int().tolist() == kept


def test_sensitivity_looks_at_the_gradient_before_it_is_clipped() -> None:
    model = Still(linear([[1.0, 0.1], [0.1, 1.0]]), [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 30.0]])])
    callback = SensitivityPruning(threshold=100.0, window=2, schedule="one_shot", start=0)
    fit(model, callback, max_epochs=1, gradient_clip_val=0.1)
    assert alive(model.layer) == [False, True]  # (1 + 9) / 2 and (0.01 + 900) / 2; clipped, both would be far below 1


# ---------------------------------------------------------------------------------------------------- one's own


class Largest(Criterion):
    """A user's criterion: the largest weights go first."""

    def scores(self, units: Units) -> Tensor:
        return -units.mean(torch.abs)


def test_a_criterion_of_the_user_is_one_method() -> None:
    model = Still(linear(ROWS), [torch.ones(2, 3)])
    callback = Pruning(1 / 3, criterion=Largest(), schedule="one_shot", start=0)
    fit(model, callback, max_epochs=1)
    assert callback.masks["layer.weight"].int().tolist() == [[1, 0, 1], [1, 0, 1], [1, 1, 0]]


@pytest.mark.parametrize("strategy", [EntropyPruning, SensitivityPruning])
def test_the_strategies_differ_from_chance_on_a_net_that_learns(strategy: type[Pruning]) -> None:
    model, callback = MLP(), strategy(0.5, window=4, schedule="one_shot", start=4)
    fit(model, callback)
    chance = RandomPruning(0.5, schedule="one_shot", start=4)
    fit(MLP(), chance)
    assert not all(torch.equal(mask, chance.masks[name]) for name, mask in callback.masks.items())
    assert sum(int(mask.any(1).sum()) for mask in callback.masks.values() if mask.ndim > 1) == 18 - 9
