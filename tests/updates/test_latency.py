"""Latency: a sparsity of the time of a forward pass, counted in tables made by hand, so that no clock decides."""

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import distributed
import pytest
import torch
from architectures import CASES, build
from lightning.pytorch import Callback
from models import MLP, ConvNet, Deep, Tiny, fit
from ranks import run
from torch import Tensor, nn

from lightning_prune import (
    NM,
    Block,
    Channel,
    Granularity,
    Head,
    Knapsack,
    LatencyTable,
    Layer,
    Pruning,
    ResidualChannel,
    SharedFanIn,
    Weight,
    measure_latency,
    prune,
    shrink,
)
from lightning_prune.export.shared_fan_in import SharedFanInLinear
from lightning_prune.export.sparse_layers import CSRLinear
from lightning_prune.models.parameters import find
from lightning_prune.training import observed
from lightning_prune.updates import latency_measuring, onnx_timing, smaller_copies
from lightning_prune.updates.latency import LayerTime
from lightning_prune.updates.latency_measuring import latency_table
from lightning_prune.updates.timed_layers import Sample, Spot, at_least_zero, fitted, in_levels

CHANNELS = Channel(coupled=True)
NONE = (0.0, 0.0, 0.0, 0.0)
LEVELS = ((0.0, 0.0), (0.5, 1.0), (1.0, 1.0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3))


def table(first: float = 1.0, **changes: Any) -> LatencyTable:
    """Return a table of that network in which the first layer takes so many milliseconds, and all the rest 3."""
    layers = (
        LayerTime("0.weight", (0, None), (0.1 * first, 0.9 * first, 0.0, 0.0), 160),
        LayerTime("2.weight", (0, 1), (0.0, 0.25, 0.25, 1.0), 240),
        LayerTime("4.weight", (None, 1), (0.0, 0.0, 0.5, 0.0), 24),
    )
    return replace(LatencyTable(layers, (0.5, 0.5), 3.0 + first, "Channel"), **changes)


def by_hand(first: float, widths: tuple[int, int]) -> float:
    """Return the fraction of the time that such a network takes with these widths."""
    one, two = widths[0] / 20, widths[1] / 30
    layers = first * (0.1 + 0.9 * one) + 0.25 * two + 0.25 * one + one * two + 0.5 * two
    return (layers + 0.5 + 0.5 * (160 * one + 240 * two + 24) / 424) / (3.0 + first)


def widths(model: nn.Module) -> tuple[int, int]:
    return int(model[0].weight.any(1).sum()), int(model[2].weight.any(1).sum())


@pytest.mark.parametrize("scope", ["local", "global", "erk", "lamp"])
@pytest.mark.parametrize("first", [0.01, 1.0, 100.0])
def test_the_goal_is_met_in_the_times_of_the_table_and_a_channel_more_would_not(scope: Any, first: float) -> None:
    model = network()
    prune(model, 0.4, granularity=CHANNELS, of=table(first), scope=scope, example_inputs=torch.zeros(8, 6))
    one, two = widths(model)
    assert by_hand(first, (one, two)) <= 0.6
    assert by_hand(first, (one + 1, two)) > 0.6 or by_hand(first, (one, two + 1)) > 0.6
    small = shrink(model, torch.zeros(8, 6))
    assert (small[0].out_features, small[2].out_features) == (one, two)


def test_less_never_takes_longer() -> None:
    source = torch.Generator().manual_seed(0)
    for _ in range(50):
        layers = [LayerTime(n, (0, 1), tuple(torch.rand(4, generator=source).tolist()), 8) for n in ("a", "b")]
        known = LatencyTable(tuple(layers), tuple(torch.rand(2, generator=source).tolist()), 1.0, "Channel")
        more = {(n, d): float(torch.rand(1, generator=source)) for n in ("a", "b") for d in (0, 1)}
        less = {place: part * float(torch.rand(1, generator=source)) for place, part in more.items()}
        assert known.time(less) <= known.time(more) <= known.time({})
        assert 0 <= known.left(less) <= known.left(more) <= known.left({}) <= 1


def test_multiples_and_floors_hold() -> None:
    model = network()
    given: dict[str, Any] = {"granularity": Channel(coupled=True, round_to=4), "example_inputs": torch.zeros(8, 6)}
    prune(model, 0.4, of=table(), min_density=0.5, **given)
    one, two = widths(model)
    assert one % 4 == 0
    assert one >= 10
    assert two >= 15
    assert by_hand(1.0, (one, two)) <= 0.6
    with pytest.raises(ValueError, match=r"sparsity must be at most 0\.\d+ of the latency, .* with min_density=0\.5"):
        prune(network(), 0.5, of=table(), min_density=0.5, **given)


def test_rounds_end_at_the_goal() -> None:
    model = network()
    prune(model, 0.4, granularity=CHANNELS, of=table(), rounds=3, example_inputs=torch.zeros(8, 6))
    assert 0.5 < by_hand(1.0, widths(model)) <= 0.6


# ------------------------------------------------------------------------------------------------ files


def test_a_table_is_the_same_again_from_its_file(tmp_path: Path) -> None:
    known = table(inputs="8 x 6", threads=3)
    known.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == known
    assert LatencyTable.from_dict(known.to_dict()) == known
    assert repr(known) == "LatencyTable(3 layers, 4 ms in torch for 8 x 6, 3 threads)"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda values: values.pop("rest"), r"\['rest'\] in 'table'"),
        (lambda values: values.update(dense="fast"), "a number in 'table.dense', got 'fast'"),
        (lambda values: values.update(dense=0), "dense must be above 0, got 0"),
        (lambda values: values.update(rest=[0.0, -1.0]), r"rest must be numbers in \[0, inf\), got -1.0"),
        (lambda values: values["layers"][0].update(ms=[1.0]), r"a list of 4 in 'table.layers\[0\].ms'"),
        (lambda values: values["layers"][0].update(dims=[-1, None]), r"a whole number .* in 'table.layers\[0\].dims"),
    ],
)
def test_a_damaged_file_is_refused(damage: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    values = table().to_dict()
    damage(values)
    (tmp_path / "table.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"path must be a file that LatencyTable.save wrote, .*{message}"):
        LatencyTable.load(tmp_path / "table.json")


# ------------------------------------------------------------------------------------------------ what cannot be


@pytest.mark.parametrize("granularity", [Weight(), Block(4, 4), Channel(coupled=False)])
@pytest.mark.parametrize("of", ["latency", table()], ids=["latency", "table"])
def test_units_that_make_no_model_smaller_are_refused(granularity: Granularity, of: Any) -> None:
    with pytest.raises(ValueError, match=r"(granularity must be Channel.* with of=|of must be \"units\" for )"):
        Pruning(0.5, granularity=granularity, of=of)
    with pytest.raises(ValueError, match=r"(granularity must be Channel.* with of=|of must be \"units\" for )"):
        prune(network(), 0.5, granularity=granularity, of=of, example_inputs=torch.zeros(8, 6))


def test_what_keeps_its_shape_saves_time_alone() -> None:
    with pytest.raises(ValueError, match=r'of must be "units" or "latency" for SharedFanIn\(rows=16\), got .flops.'):
        Pruning(0.5, granularity=SharedFanIn(), of="flops")
    with pytest.raises(ValueError, match=r"of must be a latency table for SharedFanIn\(rows=16\), got one for Channel"):
        Pruning(0.5, granularity=SharedFanIn(), of=table())


def test_a_threshold_or_a_sparsity_per_layer_is_none_of_the_latency() -> None:
    for goal in ({"threshold": 0.1}, {"sparsity": {"*": 0.5}}):
        with pytest.raises(ValueError, match='of must be "units" for a threshold or a sparsity per layer'):
            Pruning(**goal, granularity=Channel(), of="latency")


def test_a_table_of_other_units_or_another_model_is_refused() -> None:
    given: dict[str, Any] = {"granularity": CHANNELS, "example_inputs": torch.zeros(8, 6)}
    with pytest.raises(ValueError, match=r"of must be a latency table for Channel\(.*, got one for Head\(\)"):
        prune(network(), 0.4, of=table(granularity="Head"), **given)
    other = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
    with pytest.raises(ValueError, match=r"of must be a latency table of this model, got one with '4.weight'"):
        prune(other, 0.4, of=table(), **given)
    with pytest.raises(ValueError, match=r"of must be a latency table that says what the units of '2.weight' cost"):
        prune(network(), 0.4, of=table(layers=table().layers[:1]), **given)
    with pytest.raises(
        ValueError, match=r"of must be a latency table and Channel\(coupled=True\), got '0.weight' with"
    ):
        prune(network(), 0.4, of=table(), granularity=Channel())


def test_measuring_needs_example_inputs_and_a_cpu() -> None:
    with pytest.raises(ValueError, match=r"latency. needs example inputs"):
        prune(network(), 0.4, granularity=Channel(), of="latency")
    with pytest.raises(ValueError, match="the model must be on the CPU to be timed, got meta"):
        latency_table([], Channel(), nn.Linear(2, 2, device="meta"), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"granularity must be Channel.* with measure_latency"):
        measure_latency(network(), torch.zeros(8, 6), Weight())
    with pytest.raises(ValueError, match=r"granularity must be Channel.* or SharedFanIn\(\) .* got NM"):
        measure_latency(network(), torch.zeros(8, 6), NM(), "onnxruntime")
    with pytest.raises(TypeError, match="granularity must be a Granularity"):
        measure_latency(network(), torch.zeros(8, 6), "channel")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ training


def of_convolutions(first: float, second: float) -> LatencyTable:
    """Return a table of the convolutions of ``ConvNet``."""
    layers = [LayerTime(f"net.{n}.weight", (0, None), (0.0, ms, 0.0, 0.0)) for n, ms in ((0, first), (3, second))]
    return LatencyTable(tuple(layers), (0.1, 0.0), first + second + 0.1, "Channel")


def callback() -> Pruning:
    return Pruning(0.5, granularity=CHANNELS, scope="global", schedule="linear", start=0, end=6, of="latency")


@pytest.fixture
def clock() -> Iterator[Any]:
    """Every time it is measured, another layer is the slow one."""
    tables = [of_convolutions(8.0, 1.0), of_convolutions(1.0, 8.0)]
    with patch.object(observed, "latency_table", side_effect=tables) as measured:
        yield measured


class Saver(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, model: Any, outputs: Any, batch: Any, index: int) -> None:
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_resumed_run_goes_on_by_the_kept_table(clock: Any, tmp_path: Path) -> None:
    model, whole = ConvNet(), callback()
    model.example_input_array = torch.zeros(8, 2, 6, 6)
    fit(model, whole, Saver(tmp_path / "kept.ckpt"))
    assert clock.call_count == 1
    again, resumed = ConvNet(), callback()
    again.example_input_array = model.example_input_array
    fit(again, resumed, ckpt_path=str(tmp_path / "kept.ckpt"))
    assert clock.call_count == 1
    assert resumed.state.latency == whole.state.latency == of_convolutions(8.0, 1.0)
    assert resumed.masks.keys() == whole.masks.keys()
    assert all(torch.equal(resumed.masks[name], mask) for name, mask in whole.masks.items())
    other = ConvNet()
    other.example_input_array = model.example_input_array
    masks = callback()
    fit(other, masks)  # by the other clock
    assert any(not torch.equal(masks.masks[name], mask) for name, mask in whole.masks.items())


@pytest.mark.parametrize("stated", [True, False], ids=["array", "batch"])
def test_training_meets_the_goal(stated: bool, clock: Any) -> None:
    model, pruning = ConvNet(), callback()
    model.example_input_array = torch.zeros(8, 2, 6, 6) if stated else None
    fit(model, pruning)
    kept = [int(pruning.masks[f"net.{n}.weight"].flatten(1).any(1).sum()) for n in (0, 3)]
    assert 8.0 * kept[0] / 6 + kept[1] / 4 + 0.1 <= 0.5 * 9.1
    assert "sparsity 0.5 of the latency" in pruning.explain()


def test_another_measure_is_measured_again(clock: Any, tmp_path: Path) -> None:
    model, first = ConvNet(), callback()
    model.example_input_array = torch.zeros(8, 2, 6, 6)
    fit(model, first, Saver(tmp_path / "kept.ckpt"))
    again, given = ConvNet(), callback()
    again.example_input_array = model.example_input_array
    given.granularity = Channel(coupled=True, minimum=2)
    with pytest.warns(UserWarning, match="its updates are planned again"):
        fit(again, given, ckpt_path=str(tmp_path / "kept.ckpt"))
    assert clock.call_count == 2
    assert given.state.latency == of_convolutions(1.0, 8.0)


def masks_of_rank(
    build: Callable[[], Tiny], inputs: Tensor, make: Callable[[], Pruning], *clocks: LatencyTable
) -> dict[str, Tensor]:
    """Return the masks of a rank whose own clock says that another layer is the slow one."""
    model, pruning = build(), make()
    model.example_input_array, model.layout = inputs, "ddp"
    with patch.object(latency_measuring, "_measured", return_value=clocks[distributed.rank()]):
        distributed.fit(model, pruning, max_epochs=2)
    return dict(pruning.masks)


def masks_of_ranks(*given: Any) -> dict[str, Tensor]:
    """Return the masks that two ranks agree on."""
    first, second = run(masks_of_rank, 2, *given)
    assert first.keys() == second.keys()
    assert all(torch.equal(mask, second[name]) for name, mask in first.items())
    return first


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:It is recommended to use")
def test_ranks_with_other_clocks_have_the_masks_of_the_first() -> None:
    clocks = of_convolutions(8.0, 1.0), of_convolutions(1.0, 8.0)
    first = masks_of_ranks(ConvNet, torch.zeros(8, 2, 6, 6), callback, *clocks)
    kept = [int(first[f"net.{n}.weight"].flatten(1).any(1).sum()) for n in (0, 3)]
    assert 8.0 * kept[0] / 6 + kept[1] / 4 + 0.1 <= 0.5 * 9.1


def fails_on_the_first(_: Any) -> str:
    model = network()
    with patch.object(latency_measuring, "_measured", side_effect=ValueError("no clock")):
        try:
            prune(model, 0.4, granularity=CHANNELS, of="latency", example_inputs=torch.zeros(8, 6), distributed=True)
        except ValueError as error:
            return str(error)
    return ""


@pytest.mark.distributed
def test_ranks_fail_together() -> None:
    assert run(fails_on_the_first, 2, None) == ["no clock", "no clock"]


# ------------------------------------------------------------------------------------------------ measuring


def test_times_that_were_samples_of_a_size_are_found_again() -> None:
    source = torch.Generator().manual_seed(0)
    known = LayerTime("a", (0, 1), (0.5, 1.0, 0.25, 2.0), 8)
    samples = []
    for outputs, inputs in torch.rand(12, 2, generator=source).tolist():
        parts = {("a", 0): outputs, ("a", 1): inputs}
        samples.append(Sample(parts, known.time(parts) / 10.0))
    found = fitted(Spot("a", (0, 1)), 8, 10.0, samples)
    assert found.ms == pytest.approx(known.ms, abs=1e-6)


def test_no_factor_is_below_zero() -> None:
    columns = torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]], dtype=torch.float64)
    assert at_least_zero(columns, [3.0, 2.0, 1.0]) == pytest.approx([2.0, 0.0])
    assert at_least_zero(columns, [-1.0, -1.0, -1.0]) == [0.0, 0.0]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure less than usual: what comes out has the same form."""
    monkeypatch.setattr(latency_measuring, "_RANDOM", {"torch": 2, "onnxruntime": 1})
    monkeypatch.setattr(latency_measuring, "_MOST", 5)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("case", "granularity"),
    [("resnet_basic", CHANNELS), ("mobilenet", Channel(coupled=True, round_to=2)), ("vit", Head()), ("gpt", CHANNELS)],
    ids=["resnet", "mobilenet", "vit", "gpt"],
)
def test_a_measured_table_says_what_every_layer_takes(case: str, granularity: Granularity) -> None:
    model, inputs = build(CASES[case])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    known = measure_latency(model, inputs, granularity)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    units, _ = granularity.find_units(find(model), model, inputs)
    assert known.granularity == type(granularity).__name__
    assert known.threads == torch.get_num_threads()
    parameters = dict(model.named_parameters())
    assert {layer.weight for layer in known.layers} <= parameters.keys()
    assert {unit.name for unit in units} <= {layer.weight for layer in known.layers if layer.dims[0] is not None}
    assert all(min(layer.ms) >= 0 and layer.values > 0 for layer in known.layers)
    assert LatencyTable.from_dict(known.to_dict()) == known
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("granularity", [Layer(), ResidualChannel()], ids=["layers", "width"])
def test_blocks_and_the_hidden_width_are_measured_too(granularity: Granularity) -> None:
    model = Deep()
    inputs = next(iter(model.train_dataloader()))[0]
    if isinstance(granularity, ResidualChannel):
        with pytest.raises(ValueError, match="ResidualChannel"):
            measure_latency(model, inputs, granularity)
        return
    known = measure_latency(model, inputs, granularity)
    assert len(known.layers) == 6
    assert all(layer.dims == (0, None) and layer.ms[2:] == (0.0, 0.0) for layer in known.layers)
    blocks = tuple(replace(layer, ms=(0.0, 1.0, 0.0, 0.0)) for layer in known.layers)
    given = replace(known, layers=blocks, rest=(1.0, 0.0), dense=7.0)
    prune(model, 0.5, granularity=granularity, of=given, example_inputs=inputs)
    dead = sum(not block.up.weight.any() for block in model.modules() if hasattr(block, "up"))
    assert dead == 4  # 3 of 7 milliseconds would leave more than half


# ------------------------------------------------------------------------------------------------ shared fan-in


def in_groups(dense: float) -> LatencyTable:
    """Return a table in which two layers are faster in groups, the first of them slow, and a third one is not."""
    layers = (
        LayerTime("0.weight", (0, None), NONE, levels=((0.0, 1.0), (0.45, dense), (1.0, dense))),
        LayerTime("2.weight", (0, None), NONE, levels=((0.0, 0.1), (0.45, 1.0), (1.0, 1.0))),
        LayerTime("4.weight", (0, None), NONE, levels=((0.0, 1.0), (1.0, 1.0))),
    )
    return LatencyTable(layers, (1.0, 0.0), dense + 3.0, "SharedFanIn")


def wide() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))


def density(model: nn.Sequential) -> list[float]:
    return [float((layer.weight != 0).float().mean()) for layer in model if isinstance(layer, nn.Linear)]


def test_a_layer_takes_what_was_measured_at_its_level() -> None:
    layer = in_groups(10.0).layers[0]
    taken = [layer.time({("0.weight", 0): left}) for left in (1.0, 0.9, 0.45, 0.4, 0.1)]
    assert taken == pytest.approx([10.0, 10.0, 10.0, 9.0, 3.0])
    lefts = (0.3, 0.45, 1.0, 0.0, 0.3)  # few units are rounded to the same number at different levels
    samples = []
    for left in lefts:
        parts, dense = {("0.weight", 0): left}, {"0.weight"} if left >= 0.45 else set()
        samples.append(Sample(parts, layer.time(parts) / 13, dense))
    found = in_levels(Spot("0.weight", (0, None), keeps_shape=True), 13.0, samples)
    assert [left for left, _ in found.levels] == pytest.approx([0.0, 0.3, 0.3, 0.45, 1.0], abs=1e-5)
    assert [ms for _, ms in found.levels] == pytest.approx([1.0, 7.0, 10.0, 10.0, 10.0])
    assert LatencyTable((found,), (0.0, 0.0), 13.0, "SharedFanIn").layers == (found,)


def test_no_noise_makes_a_dense_layer_faster() -> None:
    times = ((1.0, 0.5), (0.4, 0.45), (0.2, 0.49), (0.1, 0.52))
    samples = [Sample({("a", 0): left}, part, {"a"}) for left, part in times]
    found = in_levels(Spot("a", (0, None), keeps_shape=True), 10.0, samples)
    assert {ms for _, ms in found.levels} == {4.95}


@pytest.mark.parametrize(
    "levels",
    [((1.0, 1.0), (0.1, 0.2)), ((0.1, 1.0), (0.1, 2.0)), ((0.1, 2.0), (1.0, 1.0)), ((0.5, -1.0),), ((0.5, math.nan),)],
    ids=["unsorted", "twice", "slower with fewer", "negative", "nan"],
)
def test_levels_ascend(levels: Any) -> None:
    with pytest.raises(ValueError, match=r"levels of 'a' must ascend, from a time of at least 0, got"):
        LatencyTable((LayerTime("a", (0, None), NONE, levels=levels),), (0.0, 0.0), 1.0, "SharedFanIn")


@pytest.mark.parametrize("levels", [((-3.0, 1.0), (1.0, 2.0)), ((1, 2, 3),), 0.5, [(True, 1.0)]])
def test_levels_are_pairs_of_a_fraction_and_a_time(levels: Any) -> None:
    with pytest.raises(ValueError, match=r"in .levels of 'a'"):
        LatencyTable((LayerTime("a", (0, None), NONE, levels=levels),), (0.0, 0.0), 1.0, "SharedFanIn")


@pytest.mark.parametrize("scope", ["local", "global", Knapsack()])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.6])
def test_groups_of_rows_take_the_time_that_is_asked_for(scope: Any, sparsity: float) -> None:
    model, known = wide(), in_groups(10.0)
    given: dict[str, Any] = {"granularity": SharedFanIn(2), "example_inputs": torch.zeros(8, 40), "scope": scope}
    prune(model, sparsity, of=known, **given)
    first, second, _ = density(model)
    time = min(10.0, 1.0 + 20.0 * first) + min(1.0, 0.1 + 2.0 * second) + 1.0 + 1.0
    assert 1.0 - sparsity - 0.1 < time / 13.0 <= 1.0 - sparsity + 1e-6


def test_the_knapsack_leaves_what_saves_nothing() -> None:
    model = wide()
    for layer in (model[0], model[2], model[4]):
        nn.init.ones_(layer.weight)
    given: dict[str, Any] = {"granularity": SharedFanIn(2), "example_inputs": torch.zeros(8, 40)}
    prune(model, 0.4, of=in_groups(10.0), scope=Knapsack(), **given)
    first, *others = density(model)
    assert 0.4 * 13.0 <= 10.0 - (1.0 + 20.0 * first) < 0.4 * 13.0 + 2 * 20.0 / 16  # hardly a step more than it takes
    assert others == [1.0, 1.0]


def test_a_table_of_an_earlier_release_is_read() -> None:
    values = table().to_dict()
    for layer in values["layers"]:
        del layer["levels"]
    assert LatencyTable.from_dict(values) == table()
    values["layers"][0]["levels"] = [[0.5, "fast"]]
    with pytest.raises(ValueError, match=r"must have a number in 'table.layers\[0\].levels\[0\]\[1\]', got 'fast'"):
        LatencyTable.from_dict(values)


@pytest.mark.usefixtures("few")
def test_groups_of_rows_are_measured_in_the_form_that_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_measuring, "_SPARSE", (0.5, 0.25))
    ticks = itertools.count().__next__  # a clock by which all takes as long, whatever else runs
    monkeypatch.setattr(latency_measuring, "time", SimpleNamespace(process_time=ticks, perf_counter=ticks))
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.Flatten()]
    model, inputs = nn.Sequential(*convolutions, nn.Linear(64, 4)), torch.randn(2, 3, 4, 4)
    before = copy.deepcopy(model.state_dict())
    read = []

    def slow_linear(model: nn.Sequential, inputs: Tensor) -> tuple[nn.Module, tuple[()]]:
        """Take the linear layer apart, and make it slow."""
        read.append(float((model[5].weight != 0).float().mean()))
        model[5] = Slow(model[5])
        return model, ()

    with patch.object(smaller_copies, "in_fastest_forms", slow_linear):
        known = measure_latency(model, inputs, SharedFanIn(4))
    assert read == [0.5, 0.25]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    layers = {layer.weight: layer for layer in known.layers}
    assert layers.keys() == {"0.weight", "1.weight", "3.weight", "5.weight"}
    assert layers["1.weight"].levels == ()
    assert all(len({ms for _, ms in layers[name].levels}) == 1 for name in ("0.weight", "3.weight"))
    assert [left for left, _ in layers["5.weight"].levels] == [0.25, 0.5, 1.0]
    assert known.granularity == "SharedFanIn"
    assert LatencyTable.from_dict(known.to_dict()) == known


class Slow(nn.Module):
    """Another form of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_narrow_layers_are_measured_as_well(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)).to(dtype)
    known = measure_latency(model, torch.zeros(2, 8, dtype=dtype), SharedFanIn(4))
    assert all(0.0 < left <= 1.0 for layer in known.layers for left, _ in layer.levels)
    assert known.time({("0.weight", 0): 0.125, ("2.weight", 0): 0.1}) <= known.time({})


def test_what_no_form_makes_faster_is_refused_before_it_is_measured() -> None:
    convolution = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())
    with pytest.raises(ValueError, match=r"targets must hold linear layers or 1 x 1 convolutions.*got \['0.weight'\]"):
        measure_latency(convolution, torch.zeros(1, 3, 4, 4), SharedFanIn(4))

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.lstm(inputs)[0])

    given: dict[str, Any] = {"granularity": SharedFanIn(4), "of": "latency", "example_inputs": torch.zeros(1, 3, 4)}
    with pytest.raises(
        ValueError, match=r"targets must be one for each layer for of=.latency., got \['lstm.weight_\w+'\]"
    ):
        prune(Reader(), 0.1, **given)


def of_rows(*slow: float) -> LatencyTable:
    """Return a table of the layers of ``MLP``, each of which is faster from half of its zeros on."""
    layers = [
        LayerTime(f"net.{n}.weight", (0, None), NONE, levels=((0.0, 0.0), (0.5, ms), (1.0, ms)))
        for n, ms in zip((0, 4, 6), slow, strict=True)
    ]
    return LatencyTable(tuple(layers), (0.0, 0.0), sum(slow), "SharedFanIn")


def in_rows() -> Pruning:
    window: dict[str, Any] = {"schedule": "linear", "start": 0, "end": 6}
    return Pruning(0.5, granularity=SharedFanIn(2), of="latency", scope=Knapsack(), **window)


def time_of(masks: Any, *slow: float) -> float:
    """Return what such masks leave of the time in that table."""
    return sum(ms * min(1.0, 2.0 * float(mask.double().mean())) for mask, ms in zip(masks.values(), slow, strict=True))


def test_a_run_prunes_groups_of_rows_by_its_table() -> None:
    model, pruning = MLP(), in_rows()
    with patch.object(observed, "latency_table", return_value=of_rows(8.0, 1.0, 1.0)):
        fit(model, pruning)
    assert pruning.state.latency == of_rows(8.0, 1.0, 1.0)
    assert 5.0 - 1.0 < time_of(pruning.masks, 8.0, 1.0, 1.0) <= 5.0 + 1e-6


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:It is recommended to use")
def test_ranks_prune_groups_of_rows_by_the_clock_of_the_first() -> None:
    first = masks_of_ranks(MLP, torch.zeros(8, 6), in_rows, of_rows(8.0, 1.0, 1.0), of_rows(1.0, 1.0, 8.0))
    assert time_of(first, 8.0, 1.0, 1.0) <= 5.0 + 1e-6 < time_of(first, 1.0, 1.0, 8.0)


# ------------------------------------------------------------------------------------------------ ONNX Runtime


def cost(model: nn.Module) -> float:
    """Return made-up seconds of a model: a product in a convolution takes twice as long as one in a linear layer."""
    seconds = 1e-3
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            seconds += 2e-6 * layer.weight.numel() * 16  # for each of 4 x 4 pixels
        if isinstance(layer, nn.Linear):
            seconds += 1e-6 * layer.weight.numel()
    return seconds


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(384, 40), nn.ReLU(), nn.Linear(40, 3))


def test_times_of_whole_models_are_explained_by_what_their_layers_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_timing, "session", lambda model, inputs: model)
    monkeypatch.setattr(onnx_timing, "in_turns", lambda first, second, clock: (cost(first), cost(second)))
    model, inputs = convolutions(), torch.zeros(1, 3, 4, 4)
    known = measure_latency(model, inputs, CHANNELS, "onnxruntime")
    assert known.runtime == "onnxruntime"
    assert known.dense == pytest.approx(1e3 * cost(model))
    assert known.time({}) == pytest.approx(known.dense)
    narrow = {("0.weight", 0): 0.5, ("2.weight", 1): 0.5, ("5.weight", 0): 0.25, ("7.weight", 1): 0.25}
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 24, 3), nn.Linear(384, 10), nn.Linear(10, 3))
    assert known.time(narrow) == pytest.approx(1e3 * cost(small))
    prune(model, 0.5, granularity=CHANNELS, of=known, example_inputs=inputs)
    assert 0.45 < cost(shrink(model, inputs)) / cost(convolutions()) <= 0.5


def test_many_kinds_of_layers_share_a_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_timing, "session", lambda model, inputs: model)
    monkeypatch.setattr(onnx_timing, "in_turns", lambda first, second, clock: (cost(first), cost(second)))
    kernels = [nn.Conv2d(4, 4, size, padding=size // 2) for size in (1, 3, 5, 7, 9, 11, 13)]
    known = measure_latency(nn.Sequential(*kernels), torch.zeros(1, 4, 4, 4), CHANNELS, "onnxruntime")
    assert len(known.layers) == 7
    assert all(min(layer.ms) >= 0 for layer in known.layers)


@pytest.mark.slow
@pytest.mark.usefixtures("few")
def test_a_table_of_onnx_runtime_is_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(latency_measuring, "_ALIKE", (0.5,))
    model, inputs = network(), torch.zeros(8, 6)
    before = copy.deepcopy(model.state_dict())
    known = measure_latency(model, inputs, CHANNELS, "onnxruntime")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "in onnxruntime for 8 x 6" in repr(known)
    assert [layer.dims for layer in known.layers] == [(0, None), (0, 1), (None, 1)]
    assert LatencyTable.from_dict(known.to_dict()) == known
    assert all(min(layer.ms) >= 0 and layer.values > 0 for layer in known.layers)


def cost_of_rows(model: nn.Module) -> float:
    """Return made-up seconds of a model: groups of rows take what they read, twice as slowly as dense layers."""
    seconds = 1e-3
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            seconds += 1e-6 * layer.weight.numel()
        if isinstance(layer, SharedFanInLinear):
            seconds += 2e-6 * layer.values.numel()
    return seconds


def in_groups_if_faster(model: nn.Sequential, inputs: Tensor) -> tuple[nn.Module, tuple[()]]:
    """Put the layers with more than half of zeros in groups of 2 rows."""
    for n, layer in enumerate(model):
        if isinstance(layer, nn.Linear) and float((layer.weight != 0).float().mean()) < 0.5:
            model[n] = SharedFanInLinear.of(layer, 2, by_column=True)
    return model, ()


@pytest.mark.parametrize(("scope", "sparsity"), [("local", 0.3), ("local", 0.5), (Knapsack(), 0.3), (Knapsack(), 0.5)])
def test_groups_of_rows_take_the_time_that_is_asked_for_in_onnx_runtime(
    scope: Any, sparsity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_timing, "session", lambda model, inputs: model)
    monkeypatch.setattr(onnx_timing, "in_turns", lambda first, second, clock: (cost(first), cost_of_rows(second)))
    model, inputs = wide(), torch.zeros(8, 40)
    with patch.object(smaller_copies, "in_fastest_forms", in_groups_if_faster):
        known = measure_latency(model, inputs, SharedFanIn(2), "onnxruntime")
    assert known.runtime == "onnxruntime"
    assert known.time({}) == pytest.approx(known.dense) == pytest.approx(1e3 * cost(model))
    assert all(layer.levels[0][1] == 0.0 for layer in known.layers)  # what no zeros save is in the rest
    prune(model, sparsity, granularity=SharedFanIn(2), of=known, scope=scope, example_inputs=inputs)
    took = cost_of_rows(in_groups_if_faster(model, inputs)[0]) / cost(wide())
    assert 1.0 - sparsity - 0.1 < took <= 1.0 - sparsity + 0.02  # widths of 20 and 30 leave little choice


def explained(
    flops: dict[str, float], found: Sequence[tuple[float, float, set[str]]]
) -> tuple[dict[str, LayerTime], tuple[float, float]]:
    """Explain 10 milliseconds by layers with so many FLOPs, from what is left of all, times and which are dense."""
    spots = {name: Spot(name, (0, None), keeps_shape=True) for name in flops}
    uses = [*flops, next(iter(flops))]  # the first weight is tied
    works = [onnx_timing.Work(spots[name], "Linear", flops[name], 0) for name in uses]
    works.append(onnx_timing.Work(Spot("other", (None, None)), "Conv2d", 40.0, 0))
    samples = [Sample({(name, 0): left for name in flops}, part, dense) for left, part, dense in found]
    layers, rest = onnx_timing.by_level(works, 10.0, samples)
    assert [layer.weight for layer in layers] == list(flops)
    return {layer.weight: layer for layer in layers}, rest


def test_what_stays_dense_saves_nothing_in_onnx_runtime() -> None:
    found = [(1.0, 1.0, {"a", "b", "c"}), (0.4, 0.9, {"b", "c"}), (0.2, 1.1, {"c"}), (0.1, 0.5, {"a", "c"})]
    layers, rest = explained({"a": 30.0, "b": 10.0, "c": 20.0}, found)
    times = {name: [layer.time({(name, 0): left}) for left, _, _ in found] for name, layer in layers.items()}
    assert times == {"a": pytest.approx([1.0, 0.0, 0.0, 0.0]), "b": pytest.approx([4.0, 4.0, 4.0, 0.0]), "c": [0.0] * 4}
    assert rest == (5.0, 0.0)


def test_a_layer_that_is_sparse_late_saves_what_it_skips_by_then() -> None:
    def part(left: float) -> float:
        """Return the time if each of two layers takes 4 of 10 milliseconds, the second dense down to 10 %."""
        return (2.0 + 4.0 * left + 4.0 * (left if left < 0.1 else 1.0)) / 10

    found = [
        (1.0, 1.0, {"a", "b"}),
        *((left, part(left), {"b"}) for left in (0.4, 0.2, 0.1)),
        (0.05, part(0.05), set()),
    ]
    layers, (rest, _) = explained({"a": 20.0, "b": 20.0}, found)
    assert [rest + sum(layer.time({}) for layer in layers.values())] == pytest.approx([10.0])
    for name, layer in layers.items():
        assert layer.time({}) - layer.time({(name, 0): 0.05}) == pytest.approx(4.0 * 0.95)


def test_sparse_rows_that_are_dense_in_onnx_runtime_save_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_sparse_rows(model: nn.Sequential, inputs: Tensor) -> tuple[nn.Module, tuple[()]]:
        for n in (0, 2):
            model[n] = CSRLinear(model[n])
        return model, ()

    monkeypatch.setattr(latency_measuring, "_SPARSE", (0.4, 0.03))
    monkeypatch.setattr(onnx_timing, "session", lambda model, inputs: model)
    monkeypatch.setattr(onnx_timing, "in_turns", lambda first, second, clock: (1.0, 0.5))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    with patch.object(smaller_copies, "in_fastest_forms", in_sparse_rows):
        known = measure_latency(model, torch.zeros(8, 64), SharedFanIn(16), "onnxruntime")
    first, last = known.layers
    assert first.time({}) == first.time({("0.weight", 0): 0.4}) > first.time({("0.weight", 0): 0.03})  # then in groups
    assert len({ms for _, ms in last.levels}) == 1  # too few rows for groups


@pytest.mark.slow
def test_a_table_of_groups_of_rows_in_onnx_runtime_is_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(latency_measuring, "_SPARSE", (0.2, 0.05))
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128)), torch.randn(4, 64)
    with patch.object(smaller_copies, "in_fastest_forms", in_groups_if_faster):
        known = measure_latency(model, inputs, SharedFanIn(2), "onnxruntime")
    assert "in onnxruntime for 4 x 64" in repr(known)
    assert [layer.weight for layer in known.layers] == ["0.weight", "2.weight"]
    assert known.time({}) == pytest.approx(known.dense)
    assert LatencyTable.from_dict(known.to_dict()) == known


def test_another_runtime_is_refused() -> None:
    with pytest.raises(ValueError, match=r'runtime must be "torch" or "onnxruntime", got .tensorrt.'):
        measure_latency(network(), torch.zeros(8, 6), runtime="tensorrt")  # type: ignore[arg-type]
