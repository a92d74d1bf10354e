"""Criteria: the scores of every criterion, worked out on paper."""

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Channel, Criterion, Entropy, Granularity, Magnitude, Random, Sensitivity, Weight, prune
from lightning_prune.criteria import histogram
from lightning_prune.criteria.activations import channel_values
from lightning_prune.models.parameters import find
from lightning_prune.tensors.selection import Scores
from lightning_prune.units.finding import make_units
from lightning_prune.units.units import Units
from lightning_prune.updates.statistics import Observation


def scores_of(
    model: nn.Module,
    criterion: Criterion,
    granularity: Granularity = Weight(),
    data: Iterable[Any] | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Return the scores of all units, seen through a scope that prunes nothing."""
    found: dict[str, Tensor] = {}

    def look(scores: Scores, sparsity: float) -> Mapping[str, int]:
        found.update(scores)
        return scores.sizes

    named = {"targets": ("*",)} if granularity.follows else {}  # neurons that are outputs, too
    prune(model, 0.0, criterion=criterion, granularity=granularity, scope=look, data=data, **{**named, **kwargs})
    return found


def linear(weight: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    layer.weight.data = torch.tensor(weight)
    if bias is not None:
        layer.bias.data = torch.tensor(bias)
    return layer


def units_of(layer: nn.Module) -> Units:
    return make_units(find(layer), layer, Channel())[0]


# ------------------------------------------------------------------------------------------------ magnitude


def test_magnitude_of_weights_is_their_absolute_value() -> None:
    scores = scores_of(linear([[1.0, -2.0], [-0.5, 0.0]]), Magnitude())
    assert scores["weight"].tolist() == [[1.0, 2.0], [0.5, 0.0]]


def test_magnitude_of_a_channel_is_the_mean_without_its_bias() -> None:
    scores = scores_of(linear([[1.0, -2.0, 3.0], [-0.5, 0.0, 0.5]], bias=[100.0, -100.0]), Magnitude(), Channel())
    assert scores["weight"].tolist() == pytest.approx([2.0, 1 / 3])


def test_magnitude_of_a_filter_is_the_mean_over_its_kernel() -> None:
    conv = nn.Conv2d(2, 2, 2, bias=False)
    conv.weight.data = torch.tensor([[1.0, -1.0, 2.0, -2.0, 0.0, 0.0, 1.0, 1.0], [4.0] * 8]).view(2, 2, 2, 2)
    assert scores_of(conv, Magnitude(), Channel())["weight"].tolist() == [1.0, 4.0]


def test_magnitude_of_a_transposed_filter_runs_over_its_output_channel() -> None:
    conv = nn.ConvTranspose1d(2, 3, 1, bias=False)
    conv.weight.data = torch.tensor([[1.0, 2.0, 3.0], [-3.0, 2.0, -5.0]]).view(2, 3, 1)
    assert scores_of(conv, Magnitude(), Channel())["weight"].tolist() == [2.0, 2.0, 4.0]


def test_a_mean_makes_layers_of_different_width_comparable() -> None:
    model = nn.Sequential(linear([[2.0]]), linear([[1.0], [1.0]]))
    scores = scores_of(model, Magnitude(), Channel())
    assert (scores["0.weight"].tolist(), scores["1.weight"].tolist()) == ([2.0], [1.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_magnitude_of_half_precision_weights_is_exact(dtype: torch.dtype) -> None:
    # summed in half precision, 1,024 times 1 is not 1,024 times the next number, and 1,024 times 4,096 is infinite
    step = torch.finfo(dtype).eps
    layer = nn.Linear(1024, 3, bias=False, dtype=dtype)
    layer.weight.data[:] = torch.tensor([[1.0 + step], [1.0], [4096.0]])
    scores = scores_of(layer, Magnitude(), Channel())["weight"]
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1.0 + step, 1.0, 4096.0]


def test_magnitude_of_double_weights_keeps_their_precision() -> None:
    layer = linear([[1.0, 1.0]]).double()
    layer.weight.data[0, 1] += 1e-12
    scores = scores_of(layer, Magnitude())["weight"]
    assert scores[0, 0] < scores[0, 1]
    assert prune(layer, 0.5)["weight"].tolist() == [[False, True]]


# ------------------------------------------------------------------------------------------------ random


@pytest.mark.parametrize("granularity", [Weight(), Channel()])
def test_random_scores_are_the_same_at_every_call(granularity: Granularity) -> None:
    first = scores_of(nn.Linear(6, 5), Random(3), granularity)["weight"]
    torch.manual_seed(99)
    second = scores_of(nn.Linear(6, 5), Random(3), granularity)["weight"]
    assert torch.equal(first, second)
    assert first.unique().numel() == first.numel()


def test_random_scores_differ_between_seeds_and_between_names() -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(20, 30))
    zero, one = scores_of(model, Random()), scores_of(model, Random(seed=1))
    assert len({tuple(s.flatten().tolist()) for s in (*zero.values(), *one.values())}) == 4
    correlation = torch.corrcoef(torch.stack([s.flatten() for s in (*zero.values(), *one.values())]))
    # of independent ones: sigma = 1 / sqrt(600) = 0.04
    assert (correlation - torch.eye(4)).abs().max() < 0.2


@pytest.mark.parametrize("seed", [0, 1, 12345, -7])
def test_random_scores_are_uniform(seed: int) -> None:
    scores = scores_of(nn.Linear(1000, 200, bias=False), Random(seed))["weight"].flatten()
    assert scores.min() >= 0.0
    assert scores.max() < 1.0
    counts = torch.histc(scores, 50, 0.0, 1.0)
    expected = scores.numel() / 50
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert 15 < chi_square < 110  # 49 degrees of freedom: mean 49, standard deviation 10
    assert torch.corrcoef(torch.stack([scores[:-1], scores[1:]]))[0, 1].abs() < 0.015  # sigma 0.0022


def test_random_scores_leave_the_global_generator_alone() -> None:
    layer = nn.Linear(50, 50)
    before = torch.get_rng_state()
    scores_of(layer, Random())
    assert torch.equal(torch.get_rng_state(), before)


def test_random_scores_do_not_depend_on_the_weights() -> None:
    layer = nn.Linear(4, 4)
    before = scores_of(layer, Random())["weight"]
    nn.init.zeros_(layer.weight)
    assert torch.equal(scores_of(layer, Random())["weight"], before)


# ------------------------------------------------------------------------------------------------ entropy

# Four inputs of two features: the first takes two values, half of the time each, the second four values.
INPUTS = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 2.0], [1.0, 3.0]])


def three_neurons() -> nn.Linear:
    """Return a layer of which the outputs are constant, 0 or 1, and 0, 1, 2 or 3."""
    return linear([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], bias=[5.0, 0.0, 0.0])


ENTROPIES = [0.0, math.log(2), math.log(4)]


def test_entropy_on_paper() -> None:
    scores = scores_of(three_neurons(), Entropy("low", bins=4), Channel(), data=[INPUTS])
    assert scores["weight"].tolist() == pytest.approx(ENTROPIES)


def test_entropy_pruned_from_above_is_negative() -> None:
    scores = scores_of(three_neurons(), Entropy("high", bins=4), Channel(), data=[INPUTS])
    assert scores["weight"].tolist() == pytest.approx([-h for h in ENTROPIES])


def test_high_entropy_goes_first_by_default() -> None:
    assert Entropy().prune == "high"


def test_entropy_of_single_weights_is_that_of_their_neuron() -> None:
    scores = scores_of(three_neurons(), Entropy("low", bins=4), Weight(), data=[INPUTS])
    assert scores["weight"].flatten().tolist() == pytest.approx([h for h in ENTROPIES for _ in range(2)])


def test_a_window_of_batches_makes_one_distribution() -> None:
    scores = scores_of(three_neurons(), Entropy("low", bins=4), Channel(), data=INPUTS.split([1, 2, 1]))
    assert scores["weight"].tolist() == pytest.approx(ENTROPIES)


def test_only_the_window_is_observed() -> None:
    far = torch.full((4, 2), 1e6)
    scores = scores_of(three_neurons(), Entropy("low", bins=4, window=2), Channel(), data=[*INPUTS.split(2), far])
    assert scores["weight"].tolist() == pytest.approx(ENTROPIES)


@pytest.mark.parametrize(
    ("bins", "expected"),
    # values 0, 1, 2, 3: bins of width 1.5 hold two each; of width 1: 0 | 1 | 2 and 3
    [(2, math.log(2)), (3, 0.5 * math.log(4) + 0.5 * math.log(2)), (100, math.log(4))],
)
def test_bins_decide_how_finely_values_are_told_apart(bins: int, expected: float) -> None:
    scores = scores_of(three_neurons(), Entropy("low", bins=bins), Channel(), data=[INPUTS])
    assert scores["weight"][2].item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("direction", "sparsity", "kept"),
    [
        ("high", 1 / 3, [True, True, False]),
        ("high", 2 / 3, [True, False, False]),
        ("low", 1 / 3, [False, True, True]),
        ("low", 2 / 3, [False, False, True]),
    ],
)
def test_neurons_pruned_by_entropy(direction: Literal["high", "low"], sparsity: float, kept: list[bool]) -> None:
    layer = three_neurons()
    masks = prune(layer, sparsity, criterion=Entropy(direction, bins=4), granularity=Channel(), data=[INPUTS])
    assert masks["bias"].tolist() == kept
    assert masks["weight"].tolist() == [[keep, keep] for keep in kept]
    assert layer.bias[0].item() == (5.0 if kept[0] else 0.0)


@pytest.mark.parametrize(
    ("direction", "nats", "kept"),
    # 0, log 2 = 0.693, log 4 = 1.386
    [
        ("high", 1.0, [True, True, False]),
        ("high", 0.5, [True, False, False]),
        ("high", 1.5, [True, True, True]),
        ("low", 1.0, [False, False, True]),
        ("low", 0.5, [False, True, True]),
        ("low", 0.0, [True, True, True]),
    ],
)
def test_threshold_on_entropy_is_in_nats(direction: Literal["high", "low"], nats: float, kept: list[bool]) -> None:
    criterion = Entropy(direction, bins=4)
    masks = prune(three_neurons(), criterion=criterion, granularity=Channel(), threshold=nats, data=[INPUTS])
    assert masks["bias"].tolist() == kept


def test_entropy_of_a_convolution_is_taken_over_batch_and_positions() -> None:
    conv = nn.Conv2d(1, 3, 1)
    conv.weight.data = torch.tensor([0.0, 1.0, -2.0]).view(3, 1, 1, 1)
    image = torch.tensor([[[[0.0, 1.0], [1.0, 1.0]]], [[[2.0, 3.0], [2.0, 0.0]]]])  # two of 0, three of 1, two of 2, 3
    scores = scores_of(conv, Entropy("low", bins=4), Channel(), data=[image])["weight"]
    mixed = -sum(p * math.log(p) for p in (2 / 8, 3 / 8, 2 / 8, 1 / 8))
    assert scores.tolist() == pytest.approx([0.0, mixed, mixed])


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        pytest.param(nn.Conv1d(1, 2, 1), torch.arange(4.0).view(1, 1, 4), id="Conv1d"),
        pytest.param(nn.Conv1d(1, 2, 1), torch.arange(4.0).view(1, 4), id="Conv1d without a batch"),
        pytest.param(nn.Conv3d(1, 2, 1), torch.arange(4.0).view(2, 1, 2, 1, 1), id="Conv3d"),
        pytest.param(nn.ConvTranspose2d(1, 2, 1), torch.arange(4.0).view(1, 1, 2, 2), id="ConvTranspose2d"),
        pytest.param(nn.Linear(1, 2), torch.arange(4.0).view(2, 2, 1), id="Linear on a sequence"),
        pytest.param(nn.Linear(1, 2), torch.arange(4.0).view(4, 1), id="Linear"),
    ],
)
def test_channels_are_found_in_every_output(layer: nn.Module, inputs: Tensor) -> None:
    weight = layer.get_parameter("weight")
    weight.data = torch.tensor([0.0, 1.0]).view(weight.shape)
    scores = scores_of(layer, Entropy("low", bins=4), Channel(), data=[inputs])["weight"]
    assert scores.tolist() == pytest.approx([0.0, math.log(4)])


@pytest.mark.parametrize("batch", [32, 100, 128, 256])
def test_entropy_of_a_convolution_samples_all_positions(batch: int) -> None:
    torch.manual_seed(0)
    images = torch.zeros(16, batch, 1, 8, 8)
    images[..., 1:-1, 1:-1] = torch.randint(0, 2, (16, batch, 1, 6, 6))  # as digits: nothing at the border
    conv = nn.Conv2d(1, 1, 1)
    conv.weight.data.fill_(1.0)
    scores = scores_of(conv, Entropy("low"), Channel(), data=list(images))["weight"]
    p = images.mean().item()  # about 0.28: 36 of 64 positions, half of the time
    assert scores.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), abs=0.05)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 18, 20, 31, 36, 49, 64, 100, 1000, 4096])
def test_positions_of_a_sequence_are_spread_evenly_and_all_come_in_turn(count: int) -> None:
    units = units_of(linear([[1.0]]))
    sequence = torch.arange(count, dtype=torch.float32).view(1, count, 1)
    turns = []
    for units.steps in range(-(-count // 16)):
        turns.append(channel_values(sequence, units, 16))
        kept = turns[-1].sort().values
        assert kept.unique().numel() == kept.numel() == min(count, 16)
        if count > 16:
            assert kept.diff(dim=1).max() < 2.5 * count / 16 + 1  # nowhere a large gap
    assert torch.cat(turns, 1).unique().numel() == count


def test_positions_of_a_sample_do_not_depend_on_the_rest_of_the_batch() -> None:
    units, sequences = units_of(linear([[1.0]])), torch.rand(6, 50, 1)
    both = [channel_values(part, units, 16) for part in sequences.split([1, 5])]
    assert torch.equal(torch.cat(both, 1), channel_values(sequences, units, 16))


def random_outputs(channels: int = 5) -> Tensor:
    """Return outputs (batch, channels) of many scales, with a constant channel, and one that is far from zero."""
    torch.manual_seed(0)
    values = torch.randn(300, channels) * torch.logspace(-3, 3, channels)
    values[:, 0], values[:, 1] = -7.25, values[:, 1] + 1000
    return values


def counted(parts: Sequence[Tensor], cells: int = 64) -> Tensor:
    found = histogram.empty(parts[0].shape[1], cells, torch.device("cpu"))
    for part in parts:
        found = histogram.count(found, part.T)
    return found


@pytest.mark.parametrize("cells", [8, 64, 2048])
@pytest.mark.parametrize("sizes", [[300], [1] * 300, [299, 1], [1, 299], [100, 0, 200]])
@pytest.mark.parametrize("asks", [True, False])
def test_a_histogram_is_the_same_in_whatever_order_and_parts_values_come(
    sizes: list[int], cells: int, asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(histogram, "_is_on_host", lambda counts: asks)  # as on a CPU, or on a GPU
    values = random_outputs()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    found = counted(values[order].split(sizes), cells)
    monkeypatch.undo()
    assert torch.equal(found, counted([values], cells))
    assert found[:, 2:].sum(1).tolist() == [300] * 5
    assert torch.equal(found[:, :2].T, torch.stack([values.amin(0), values.amax(0)]))


@pytest.mark.parametrize("sizes", [[150, 150], [1, 299], [100, 0, 200], [75, 75, 75, 75]])
def test_histograms_of_several_ranks_merge_to_that_of_one_process(sizes: list[int]) -> None:
    parts = [counted([part]) for part in random_outputs().split(sizes)]
    before = [part.clone() for part in parts]
    assert torch.equal(histogram.merge(parts), counted([random_outputs()]))
    assert all(torch.equal(part, held) for part, held in zip(parts, before, strict=True))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("offset", [0.0, 1.0, -1e6])
def test_a_cell_is_a_small_part_of_the_range(scale: float, offset: float) -> None:
    values = (torch.linspace(0, 1, 1001)[:, None] + offset) * scale
    counts = counted([values], 1024)[0, 2:]
    steps = values.unique().numel()  # as float32 tells them apart
    assert counts.count_nonzero() >= min(250, steps)
    assert counts.sum() == 1001


def test_counting_values_early_or_late_makes_no_difference() -> None:
    criterion, layer = Entropy("low"), linear(torch.eye(5).tolist())
    values = random_outputs().repeat(10, 1)
    scores = []
    for sizes in ([3000], [100] * 30, [2000, 1000], [2500, 500]):
        units = units_of(layer)
        for part in values.split(sizes):
            units.statistic = criterion.observe(units, (), part)
        units.statistic = criterion.finalize(units, lambda values, operation: values)
        scores.append(criterion.scores(units))
    assert all(torch.equal(found, scores[0]) for found in scores)


def test_defaults() -> None:
    assert Entropy() == Entropy(prune="high", bins=32, window=16, positions=16)
    assert Sensitivity() == Sensitivity(window=16)
    assert Random() == Random(seed=0)


def test_entropy_of_many_values_is_close() -> None:
    torch.manual_seed(0)
    inputs = torch.rand(20_000, 1)
    scores = scores_of(linear([[1.0]]), Entropy("low", bins=8, window=4), Channel(), data=inputs.split(5_000))
    assert scores["weight"].item() == pytest.approx(math.log(8), abs=0.01)


def entropies(values: Tensor, bins: int) -> list[float]:
    """Return the entropies of neurons that put out these values (neurons, values)."""
    neurons = len(values)
    layer = linear(torch.eye(neurons).tolist())
    criterion = Entropy("low", bins=bins, window=1)
    found: list[float] = scores_of(layer, criterion, Channel(), data=[values.T])["weight"].tolist()
    return found


def by_numpy(values: Tensor, bins: int) -> float:
    counts, _ = np.histogram(values.double().numpy(), bins=bins)
    p = counts[counts > 0] / values.numel()
    return float(-(p * np.log(p)).sum())


@pytest.mark.parametrize("bins", [2, 7, 32, 256])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e4])
def test_entropy_agrees_with_numpy_histogram(bins: int, spread: float) -> None:
    torch.manual_seed(bins)
    values = torch.randn(5, 999) * spread + torch.arange(5.0)[:, None]
    # a value within a cell, at most 1/512 of the range, of the border between two bins may fall on either side
    assert entropies(values, bins) == pytest.approx([by_numpy(row, bins) for row in values], abs=1e-2)


@pytest.mark.parametrize("bins", [2, 3, 4, 6, 8, 12])
def test_values_on_borders_of_bins_fall_as_in_numpy(bins: int) -> None:
    values = torch.tensor([[0, 0, 1, 2, 3, 3, 4, 6, 8, 9, 9, 12]], dtype=torch.float32)
    assert entropies(values, bins) == pytest.approx([by_numpy(values, bins)], rel=1e-6)


def test_entropy_does_not_change_with_scale_and_offset() -> None:
    values = torch.tensor([[0.0, 1.0, 1.0, 4.0, 8.0]])
    assert entropies(values, 8) == entropies(values * 1024 + 2.0**20, 8) == entropies(values / 1024, 8)


def test_a_window_is_concluded_over_the_batches_of_all_ranks() -> None:
    """Two ranks, each in a thread of its own, see one half of the inputs each; neither sees the whole range."""
    batches = INPUTS.split(2)
    barrier = threading.Barrier(2, timeout=20)
    slots: list[Tensor] = [torch.empty(0)] * 2

    def finalize(rank: int) -> list[float]:
        def over_ranks(values: Tensor, operation: str) -> Tensor:
            slots[rank] = values
            barrier.wait()
            both = torch.stack(slots)
            barrier.wait()
            return {"sum": both.sum(0), "min": both.amin(0), "max": both.amax(0)}[operation]

        criterion, units = Entropy("low", bins=4), units_of(three_neurons())
        units.statistic = criterion.observe(units, (), three_neurons()(batches[rank]).detach())
        units.statistic = criterion.finalize(units, over_ranks)
        found: list[float] = criterion.scores(units).tolist()
        return found

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(finalize, range(2)):
            assert found == pytest.approx(ENTROPIES)


def test_by_default_statistics_of_forward_passes_are_summed_over_ranks_and_those_of_gradients_are_not() -> None:
    def double(values: Tensor, operation: str) -> Tensor:
        assert operation == "sum"
        return 2 * values

    units = units_of(three_neurons())
    units.statistic = torch.tensor([1.0, 2.0, 3.0])
    assert Activation().finalize(units, double).tolist() == [2.0, 4.0, 6.0]
    assert Gradient().finalize(units, double).tolist() == [1.0, 2.0, 3.0]
    assert Sensitivity().finalize(units, double).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_entropy_of_values_that_are_not_finite_is_refused(bad: float) -> None:
    layer = three_neurons()
    inputs = INPUTS.clone()
    inputs[2, 1] = bad
    with pytest.raises(ValueError, match=r"finite.*Entropy.*'weight'"):
        prune(layer, 1 / 3, criterion=Entropy("low"), granularity=Channel(), data=[inputs])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_entropy_of_other_float_types(dtype: torch.dtype) -> None:
    scores = scores_of(three_neurons().to(dtype), Entropy("low", bins=4), Channel(), data=[INPUTS.to(dtype)])
    assert scores["weight"].tolist() == pytest.approx(ENTROPIES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prune": "both"}, r'prune must be "high" or "low", got \'both\''),
        ({"bins": 1}, "bins must be at least 2, got 1"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"positions": 0}, "positions must be at least 1, got 0"),
    ],
)
def test_entropy_with_an_argument_out_of_range_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Entropy(**arguments)


def test_entropy_of_a_module_that_has_no_output_per_channel_is_refused() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attention(x, x, x)[0]
            return out

    with pytest.raises(ValueError, match=r"attention\.in_proj_weight: its layer .* does not output a channel for each"):
        prune(Attention(), 0.5, criterion=Entropy(), granularity=Channel(), targets=["*"], data=[torch.rand(3, 1, 4)])


# ------------------------------------------------------------------------------------------------ sensitivity

# A network 2-2-1 without biases, W = [[1, -1], [2, 1]], V = [[3, 1]]; loss (y - t)^2.
#
# Batch 1: x = (1, 2), t = 0. h = W x = (-1, 4), y = V h = 1, dL/dy = 2 (y - t) = 2.
#   dL/dV = 2 h = (-2, 8); V * dL/dV = (-6, 8).
#   dL/dh = 2 V = (6, 2); dL/dW = [[6, 12], [2, 4]]; W * dL/dW = [[6, -12], [4, 4]], sums of rows -6 and 8.
# Batch 2: x = (2, 1), t = 9. h = (1, 5), y = 8, dL/dy = -2.
#   dL/dV = (-2, -10); V * dL/dV = (-6, -10).
#   dL/dh = (-6, -2); dL/dW = [[-12, -6], [-4, -2]]; W * dL/dW = [[-12, 6], [-8, -2]], sums of rows -6 and -10.
BATCHES = [(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0]])), (torch.tensor([[2.0, 1.0]]), torch.tensor([[9.0]]))]


def two_two_one() -> nn.Sequential:
    return nn.Sequential(linear([[1.0, -1.0], [2.0, 1.0]]), linear([[3.0, 1.0]]))


def test_sensitivity_of_neurons_on_paper() -> None:
    scores = scores_of(two_two_one(), Sensitivity(), Channel(), data=BATCHES)
    # the sum of a neuron is squared, then the mean over steps: (36 + 36) / 2, (64 + 100) / 2; (2^2 + 16^2) / 2
    assert scores["0.weight"].tolist() == [36.0, 82.0]
    assert scores["1.weight"].tolist() == [130.0]


def test_sensitivity_of_weights_on_paper() -> None:
    scores = scores_of(two_two_one(), Sensitivity(), Weight(), data=BATCHES)
    # (36 + 144) / 2, (144 + 36) / 2, (16 + 64) / 2, (16 + 4) / 2; (36 + 36) / 2, (64 + 100) / 2
    assert scores["0.weight"].tolist() == [[90.0, 90.0], [40.0, 10.0]]
    assert scores["1.weight"].tolist() == [[36.0, 82.0]]


def test_sensitivity_of_one_step_on_paper() -> None:
    scores = scores_of(two_two_one(), Sensitivity(window=1), Channel(), data=BATCHES)
    assert scores["0.weight"].tolist() == [36.0, 64.0]
    assert scores["1.weight"].tolist() == [4.0]


def test_sensitivity_of_one_batch_of_two_is_not_that_of_two_batches() -> None:
    # mean loss: (W * dL/dW) is the mean over the two: rows (-6 - 6) / 2 = -6 and (8 - 10) / 2 = -1, squared 36 and 1
    data = [(torch.cat([x for x, _ in BATCHES]), torch.cat([t for _, t in BATCHES]))]
    scores = scores_of(two_two_one(), Sensitivity(), Channel(), data=data)
    assert scores["0.weight"].tolist() == [36.0, 1.0]


def test_sensitivity_predicts_the_loss_without_a_neuron_to_first_order() -> None:
    model = nn.Sequential(linear([[1.0, -1.0], [2.0, 1.0]]), linear([[1e-3, 2e-3]]))
    x, t = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0]])
    scores = scores_of(model, Sensitivity(), Channel(), data=[(x, t)])["0.weight"]
    loss = nn.functional.mse_loss(model(x), t)
    for neuron in range(2):
        without = two_two_one()
        without.load_state_dict(model.state_dict())
        without[0].weight.data[neuron] = 0
        change = nn.functional.mse_loss(without(x), t) - loss
        assert scores[neuron].sqrt().item() == pytest.approx(abs(change.item()), rel=0.02)


def test_the_least_sensitive_neuron_is_pruned() -> None:
    model = two_two_one()
    masks = prune(model, 0.5, criterion=Sensitivity(), granularity=Channel(), targets=["0.*"], data=BATCHES)
    assert masks["0.weight"].tolist() == [[False, False], [True, True]]
    assert model[0].weight.tolist() == [[0.0, 0.0], [2.0, 1.0]]


@pytest.mark.parametrize(("threshold", "zeros"), [(10.0, 0), (10.5, 1), (40.0, 2), (41.0, 3), (90.5, 6)])
def test_threshold_on_sensitivity(threshold: float, zeros: int) -> None:
    # 10, 36, 40, 82, 90, 90
    masks = prune(two_two_one(), criterion=Sensitivity(), threshold=threshold, data=BATCHES)
    assert sum(int((~mask).sum()) for mask in masks.values()) == zeros


def test_sensitivity_of_half_precision_is_squared_in_single() -> None:
    # a gradient of 2^-20 is a subnormal float16, and its square is none
    units = units_of(linear([[1.0, 1.0]]).half())
    units.parameter.grad = torch.tensor([[2.0**-20, 0.0]], dtype=torch.float16)
    assert Sensitivity().observe(units).tolist() == [2.0**-40]


def test_sensitivity_undoes_the_scale_of_a_gradient_scaler() -> None:
    units = units_of(linear([[1.0, 3.0]]))
    units.parameter.grad = torch.tensor([[1024.0, 2048.0]])
    units.grad_scale = 1024.0
    assert Sensitivity().observe(units).tolist() == [49.0]  # (1 * 1 + 3 * 2)^2
    assert units.parameter.grad.tolist() == [[1024.0, 2048.0]]


def test_a_window_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        Sensitivity(window=0)


# ------------------------------------------------------------------------------------------------ one's own


class Largest(Criterion):
    def scores(self, units: Units) -> Tensor:
        return units.mean(lambda weight: -weight.abs())


def test_a_criterion_is_one_method() -> None:
    layer = linear([[1.0, -5.0], [2.0, 0.5]])
    prune(layer, 0.25, criterion=Largest())
    assert layer.weight.tolist() == [[1.0, 0.0], [2.0, 0.5]]
    layer = linear([[1.0, -5.0], [2.0, 0.5]])
    prune(layer, 0.5, criterion=Largest(), granularity=Channel())
    assert layer.weight.tolist() == [[0.0, 0.0], [2.0, 0.5]]


class Activation(Criterion):
    needs = "forwards"
    window = 2

    def observe(self, units: Units, inputs: tuple[Any, ...] = (), output: Any = None) -> Tensor:
        return units.add(output.abs().sum(0))

    def scores(self, units: Units) -> Tensor:
        assert units.statistic is not None
        return units.mean(lambda weight: units.spread(units.statistic))  # type: ignore[arg-type]


def test_a_criterion_of_ones_own_may_observe_forward_passes() -> None:
    # outputs 5 + 5, then 5 + 5; 0 + 1, 0 + 1; 0 + 1, 2 + 3
    scores = scores_of(three_neurons(), Activation(), Channel(), data=[*INPUTS.split(2), INPUTS])
    assert scores["weight"].tolist() == [20.0, 2.0, 6.0]


class Gradient(Criterion):
    needs = "gradients"
    window = 1

    def observe(self, units: Units, inputs: tuple[Any, ...] = (), output: Any = None) -> Tensor:
        return units.add(units.sum(lambda weight: weight.grad))  # type: ignore[arg-type, return-value]

    def scores(self, units: Units) -> Tensor:
        assert units.statistic is not None
        return units.statistic


def test_a_criterion_of_ones_own_may_observe_gradients() -> None:
    scores = scores_of(two_two_one(), Gradient(), Channel(), data=BATCHES)
    assert scores["0.weight"].tolist() == [18.0, 6.0]  # of batch 1: 6 + 12, 2 + 4
    assert scores["1.weight"].tolist() == [6.0]


@pytest.mark.parametrize("criterion", [Magnitude(), Random(4), Entropy("low", 8, 2, 100), Sensitivity(3)])
def test_criteria_compare_by_value_and_do_not_change(criterion: Criterion) -> None:
    assert criterion == eval(repr(criterion))
    with pytest.raises(AttributeError):
        criterion.window = 7  # type: ignore[misc]


def test_statistics_are_added_up_apart_from_the_state_that_they_were_loaded_from() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.grad = torch.ones(2, 2)
    units = make_units(find(layer), layer, Weight())
    state = {"steps": 1, "seen": [], "statistics": {"weight": [torch.ones(2, 2)]}}
    observation = Observation(Sensitivity(), units)
    observation.load_state_dict(state)
    observation.gradients({id(layer.weight)})
    assert torch.equal(state["statistics"]["weight"][0], torch.ones(2, 2))
    assert torch.allclose(units[0].statistic, 1 + layer.weight.detach().square())
