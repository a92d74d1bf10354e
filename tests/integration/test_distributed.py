"""Several ranks: every one of them has the masks that a single process chooses, and sends no more than counters."""

import copy
import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import cycle, product
from pathlib import Path
from typing import Any, Literal
from unittest.mock import Mock

import pytest
import torch
from distributed import BATCH, Layout, Net, build, fit, rank, ranks, reshard, result
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from models import QUIET, GroupedAttention, Mean, On, Residual
from ranks import run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from variants import CRITERIA as VARIANTS
from variants import METHODS, OF_LAYERS, OF_STREAMS, SCOPES, label

from lightning_prune import (
    NM,
    BatchNormScale,
    Block,
    Channel,
    ConstantSparsity,
    Criterion,
    Entropy,
    EntropyPruning,
    Granularity,
    GraSP,
    Head,
    InputChannel,
    Layer,
    LearnedMasks,
    Magnitude,
    MagnitudePruning,
    MaskedAdapters,
    Pruning,
    PruningAtInit,
    Random,
    ResidualChannel,
    Sensitivity,
    SensitivityPruning,
    Wanda,
    Weight,
    prune,
    sparsity,
)
from lightning_prune.models.parameters import find
from lightning_prune.scopes import global_
from lightning_prune.units.finding import make_units
from lightning_prune.units.units import Units
from lightning_prune.updates.decision import decide

CRITERIA: dict[str, Criterion] = {
    "magnitude": Magnitude(),
    "random": Random(seed=3),
    "sensitivity": Sensitivity(window=2),
    "entropy-high": Entropy("high", bins=8, window=2),
    "entropy-low": Entropy("low", bins=8, window=2),
}
GRANULARITIES = {"weight": Weight(), "channel": Channel()}
OTHERS = {"nm": NM(2, 4), "block": Block(2, 3), "input": InputChannel()}
# what is pruned: by every criterion all layers together, and by the magnitude in every other way to share out
GOALS: dict[str, dict[str, Any]] = {
    **{name: {"sparsity": 0.6, "criterion": criterion} for name, criterion in CRITERIA.items()},
    "local": {"sparsity": 0.6, "scope": "local"},
    "erk": {"sparsity": 0.6, "scope": "erk"},
    "per-layer": {"sparsity": {"net.0.*": 0.3, "net.[2-6].*": 0.7}},
    "threshold": {"threshold": 0.25},
}
# those that came later are all trained in one test for each layout
KNOWN = {type(criterion) for criterion in CRITERIA.values()}
SHARED_OUT = {"global", "local", "erk", "per_layer"}  # by the goals above, the criteria's by "global"
LATER: dict[str, dict[str, Any]] = {
    **{label(variant): {"sparsity": 0.6, "criterion": variant} for variant in VARIANTS if type(variant) not in KNOWN},
    "Wanda-by-sum": {"sparsity": 0.6, "criterion": Wanda(window=2, by_row=False), "scope": "local"},
    "maximum": {"sparsity": 0.6, "criterion": Magnitude(math.inf)},
    "norm": {"sparsity": 0.6, "criterion": BatchNormScale(), "targets": ("net.3.weight",)},
    **{label(scope): {"sparsity": 0.6, "scope": scope} for scope in SCOPES if label(scope) not in SHARED_OUT},
    "min_density": {"sparsity": 0.6, "min_density": 0.35},
}
# two updates of five steps, each after a window of two
GRADUAL: dict[str, Any] = {"schedule": "linear", "start": 0, "end": 4, "frequency": 2}
STEPS = 5

distributed = pytest.mark.distributed


def pruning(goal: str, granularity: str) -> Pruning:
    axes: dict[str, Any] = {"targets": ("*",), **GRADUAL, **{**GOALS, **LATER}[goal]}  # the outputs, too
    return Pruning(**axes, granularity={**GRANULARITIES, **OTHERS}[granularity])


def outcome(model: Net, callback: Any) -> dict[str, Any]:
    """Weights and masks of all ranks, and how sparse this rank says that the model is."""
    return {**result(model, callback.masks), "sparsity": (callback.sparsity_now, sparsity(model, callback.targets))}


def train(layout: Layout, tensors: bool, cases: list[tuple[str, str]], **trainer_kwargs: Any) -> list[dict[str, Any]]:
    """Train once for each goal and granularity, every rank with random numbers of its own."""
    outcomes = []
    for case in cases:
        model, callback = Net(layout, tensors, STEPS * BATCH), pruning(*case)
        torch.manual_seed(100 + rank())
        fit(model, callback, **trainer_kwargs)
        outcomes.append(outcome(model, callback))
    return outcomes


@cache
def train_alone(tensors: bool, case: tuple[str, str], **trainer_kwargs: Any) -> dict[str, Any]:
    """Train once in this process: what every layout comes to."""
    return train("one", tensors, [case], **trainer_kwargs)[0]


def zeros(tensors: dict[str, Tensor]) -> int:
    return sum(int((tensor == 0).sum()) for tensor in tensors.values() if tensor.ndim >= 2)


def size(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values() if tensor.ndim >= 2)


def assert_masked_alike(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """All ranks have exactly these masks, zeros where they say so, and nearly these weights."""
    assert zeros(expected["masks"]) > 0
    for outcome in found:
        masks, weights = outcome["masks"], outcome["weights"]
        assert masks.keys() == expected["masks"].keys()
        for name, mask in expected["masks"].items():
            assert torch.equal(masks[name], mask), name
            assert not weights[name][~mask].any()
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5)
        assert outcome["sparsity"][0] == pytest.approx(zeros(masks) / size(masks))


def assert_same(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """All ranks have exactly these masks, zeros there and nowhere else, nearly these weights, and know how sparse."""
    assert_masked_alike(found, expected)
    for outcome in found:
        assert zeros(outcome["weights"]) == zeros(outcome["masks"])
        assert outcome["sparsity"][1] == pytest.approx(outcome["sparsity"][0])


def assert_like_alone(layout: Layout, ranks: int, cases: list[tuple[str, str]], **trainer_kwargs: Any) -> list[Any]:
    """All ranks end like one process that sees the batches of all of them; return what they came to."""
    tensors = "tp" in layout
    found = run(partial(train, **trainer_kwargs), ranks, layout, tensors, cases)
    for number, case in enumerate(cases):
        assert_same([outcomes[number] for outcomes in found], train_alone(tensors, case, **trainer_kwargs))
    return found


# ------------------------------------------------------------------------------------------------ DDP


class Deep(Net):
    """Five residual blocks over two tokens."""

    def configure_model(self) -> None:
        if self.net is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                blocks = [Residual(4, 2) for _ in range(5)]
                self.net = nn.Sequential(nn.Unflatten(1, (2, 4)), *blocks, nn.Flatten(), nn.Linear(8, 4))


def pruned(model: LightningModule, sparsity: float, criterion: Criterion, granularity: Granularity) -> dict[str, Any]:
    callback = Pruning(sparsity, criterion, granularity, **GRADUAL)
    fit(model, callback)
    return outcome(model, callback)


def train_deep(layout: Layout) -> list[dict[str, Any]]:
    return [pruned(Deep(layout), 0.6, criterion, Layer()) for criterion in OF_LAYERS]


@distributed
def test_with_ddp_layers_are_those_of_one_process() -> None:
    found, expected = run(train_deep, 2, "ddp"), train_deep("one")
    for number, one in enumerate(expected):
        assert sum(not mask.any() for name, mask in one["masks"].items() if name.endswith("up.weight")) == 3
        assert_masked_alike([outcomes[number] for outcomes in found], one)


class Narrow(Net):
    """Two residual blocks over two tokens, whose mean is classified."""

    def configure_model(self) -> None:
        if self.net is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                blocks = [Residual(4, 2) for _ in range(2)]
                first, last = nn.Linear(4, 4), [nn.LayerNorm(4), Mean(), nn.Linear(4, 4)]
                self.net = nn.Sequential(nn.Unflatten(1, (2, 4)), first, *blocks, *last)


def train_narrow(layout: Layout) -> list[dict[str, Any]]:
    return [pruned(Narrow(layout), 0.25, criterion, ResidualChannel()) for criterion in OF_STREAMS]


@distributed
def test_with_ddp_the_hidden_width_is_that_of_one_process() -> None:
    found, expected = run(train_narrow, 2, "ddp"), train_narrow("one")
    for number, one in enumerate(expected):
        assert one["masks"]["net.4.weight"].sum() == 3
        assert_masked_alike([outcomes[number] for outcomes in found], one)


class Sharing(Net):
    """Attention of 4 queries over two tokens, of which 2 each share keys and values."""

    def configure_model(self) -> None:
        if self.net is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                attention = GroupedAttention(4, 4, 2)
                self.net = nn.Sequential(nn.Unflatten(1, (2, 4)), attention, nn.Flatten(), nn.Linear(8, 4))


def train_sharing(layout: Layout) -> list[dict[str, Any]]:
    return [
        pruned(Sharing(layout), 0.5, criterion, Head(queries=True))
        for criterion in (Magnitude(), Sensitivity(window=2))
    ]


@distributed
def test_with_ddp_single_queries_are_those_of_one_process() -> None:
    found, expected = run(train_sharing, 2, "ddp"), train_sharing("one")
    for number, one in enumerate(expected):
        assert one["masks"]["net.1.q.weight"].any(1).view(2, 2).sum(1).tolist() == [1, 1]
        assert_masked_alike([outcomes[number] for outcomes in found], one)


@distributed
@pytest.mark.parametrize("criterion", CRITERIA)
def test_with_ddp_every_rank_has_the_masks_of_one_process(criterion: str) -> None:
    assert_like_alone("ddp", 2, [(criterion, granularity) for granularity in GRANULARITIES])


@distributed
def test_with_ddp_accumulated_gradients_are_those_of_one_process() -> None:
    cases = [("sensitivity", granularity) for granularity in GRANULARITIES]
    assert_like_alone("ddp", 2, cases, accumulate_grad_batches=2, max_epochs=2)


class Sequences(Net):
    """A convolution over 60 places, of which ``Entropy`` takes 16 in a step, and 3 linear neurons on each of 4 rows."""

    def configure_model(self) -> None:
        if self.net is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                convolution = [nn.Linear(8, 62), nn.Unflatten(1, (1, 62)), nn.Conv1d(1, 4, 3), nn.Tanh()]
                self.net = nn.Sequential(*convolution, nn.Linear(60, 3), nn.Flatten(), nn.Linear(12, 4))


def train_sequences(layout: Layout, direction: Literal["high", "low"]) -> dict[str, Any]:
    criterion = Entropy(direction, bins=8, window=3)
    callback = Pruning(0.5, criterion, Channel(), "local", "one_shot", start=4, targets=("net.[24].weight",))
    model = Sequences(layout)
    fit(model, callback)
    return outcome(model, callback)


@distributed
@pytest.mark.parametrize("direction", ["high", "low"])
def test_with_ddp_entropy_of_some_places_of_each_sample_is_that_of_one_process(
    direction: Literal["high", "low"],
) -> None:
    assert_same(run(train_sequences, 2, "ddp", direction), train_sequences("one", direction))


# ------------------------------------------------------------------------------------------------ shards


@distributed
@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("layout", ["fsdp", "tp"])
def test_with_shards_every_rank_has_its_pieces_of_the_masks_of_one_process(layout: Layout, goal: str) -> None:
    turn = (list(GOALS).index(goal) + (layout == "tp")) % 2  # in pairs: goals and granularities, each with both layouts
    granularity = list(GRANULARITIES)[turn]
    found = assert_like_alone(layout, 2, [(goal, granularity)])
    if goal in CRITERIA and granularity == "weight":
        masks = found[0][0]["masks"]
        assert zeros(masks) == round(0.6 * size(masks))


@distributed
@pytest.mark.parametrize("layout", ["ddp", "fsdp", "tp"])
def test_groups_and_blocks_are_those_of_one_process_wherever_ranks_cut_them(layout: Layout) -> None:
    cases = [(goal, "block") for goal in ("magnitude", "sensitivity", "local", "maximum")]
    cases += [("magnitude", "nm"), ("random", "nm")]
    cases += [("sensitivity", "input"), ("local", "input"), ("maximum", "channel")]
    assert_like_alone(layout, 2, cases)


@distributed
@pytest.mark.parametrize("layout", ["ddp", "fsdp", "tp"])
def test_every_criterion_and_scope_is_that_of_one_process(layout: Layout) -> None:
    granularities = cycle(GRANULARITIES if layout == "ddp" else ["weight"])  # of pieces, which cut rows, the weights
    goals = list(LATER)
    if layout != "ddp":  # by turns sharded along rows, or as told, where another layer has the norm behind it
        goals = [goal for turn, goal in enumerate(goals) if (turn % 2 == 0 or goal == "norm") == (layout == "fsdp")]
    assert_like_alone(layout, 2, list(zip(goals, granularities, strict=False)))


@distributed
def test_with_shards_in_two_dimensions_every_rank_has_its_pieces() -> None:
    # of each kind of criterion one granularity: with shards in one dimension, all meet
    assert_like_alone("fsdp+tp", 4, [("magnitude", "weight"), ("sensitivity", "weight"), ("entropy-low", "channel")])


def train_methods(layout: Layout, tensors: bool, names: list[str]) -> list[dict[str, Any]]:
    """Train nine steps by each method, every rank with random numbers of its own."""
    outcomes = []
    for name in names:
        model, callback = Net(layout, tensors, samples=3 * BATCH), METHODS[name]()
        torch.manual_seed(100 + rank())
        fit(model, callback, max_epochs=3)
        outcomes.append(outcome(model, callback))
    return outcomes


@distributed
@pytest.mark.parametrize("layout", ["ddp", "fsdp", "tp"])
def test_every_method_has_the_masks_of_one_process(layout: Layout) -> None:
    tensors, whole = layout == "tp", ("LotteryTicket", "PruningAtInit")  # these refuse shards
    names = [name for name in METHODS if layout == "ddp" or not name.startswith(whole)]
    if layout != "ddp":  # with two ways at least to run each class, every other one is sharded along rows, or as told
        names = names[layout == "tp" :: 2]
    found = run(train_methods, 2, layout, tensors, names)
    for number, expected in enumerate(train_methods("one", tensors, names)):
        assert_masked_alike([outcomes[number] for outcomes in found], expected)


def preserve_flow() -> dict[str, Any]:
    model, callback = Net("ddp"), PruningAtInit(0.5, GraSP())
    fit(model, callback)
    return outcome(model, callback)


@distributed
def test_what_multiplies_gradients_of_batches_multiplies_those_of_all_ranks() -> None:
    inputs, targets = next(iter(build("one").train_dataloader()))
    halves = [(inputs[rank::2], targets[rank::2]) for rank in range(2)]
    axes = {"criterion": GraSP(window=2), "loss": lambda model, batch: model.loss(batch)}
    masks = prune(build("one"), 0.5, data=halves, **axes)
    assert all(
        torch.equal(mask, masks[name])
        for name, mask in prune(build("one"), 0.5, data=[(inputs, targets)], **axes).items()
    )
    for found in run(preserve_flow, 2):
        assert found["masks"].keys() == masks.keys()
        assert all(torch.equal(found["masks"][name], mask) for name, mask in masks.items())
        assert found["sparsity"] == (pytest.approx(38 / 75), pytest.approx(38 / 75))


OWN = {"weights": Magnitude(), "gradients": Sensitivity(window=2), "forwards": Entropy("low", bins=8, window=2)}


def prune_together(kind: str) -> dict[str, Tensor]:
    """Prune with two batches, of which every rank has its part."""
    model = build("one")
    data = [(inputs, targets[:, :4]) for inputs, targets in model.train_dataloader()][:2]
    return dict(
        prune(model, 0.6, criterion=OWN[kind], granularity=Channel(), data=data, rounds=2, distributed=ranks() > 1)
    )


@distributed
@pytest.mark.parametrize("kind", OWN)
def test_without_a_trainer_ranks_prune_together_by_the_batches_of_all(kind: str) -> None:
    expected = prune_together(kind)
    for masks in run(prune_together, 2, kind):
        assert all(torch.equal(masks[name], mask) for name, mask in expected.items())


def prune_apart() -> dict[str, Tensor]:
    """Prune where one rank does not run a layer: its gradient counts as zero there."""
    model = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    for layer in model:
        layer.weight.data = torch.tensor([[4.0, 3.0], [2.0, 1.0]])

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return sum(layer(batch).sum() for layer in list(model)[rank() :])

    return dict(prune(model, 0.5, criterion=Sensitivity(), data=[torch.ones(1, 2)], loss=loss, distributed=True))


@distributed
def test_a_layer_that_one_rank_does_not_run_counts_there_as_nothing() -> None:
    for masks in run(prune_apart, 2):
        # gradients are 1/2 for the first layer, which one rank runs, and 1 for the second
        assert masks["0.weight"].tolist() == [[True, False], [False, False]]
        assert masks["1.weight"].tolist() == [[True, True], [True, False]]


def prune_in_pieces() -> str:
    with pytest.raises(ValueError, match="the model must have whole parameters, got sharded ones") as refused:
        fit(Net("fsdp"), PruningAtInit(0.5))
    return str(refused.value)


@distributed
def test_weights_in_pieces_are_not_pruned_at_initialisation() -> None:
    assert all("add ConstantSparsity()" in message for message in run(prune_in_pieces, 2))


def rewind_pieces() -> str:
    with pytest.raises(ValueError, match="must be whole on every rank to be rewound") as raised:
        fit(Net("fsdp"), METHODS["LotteryTicket"](), max_epochs=3)
    return str(raised.value)


@distributed
def test_weights_in_pieces_are_not_rewound() -> None:
    assert all("net.0.weight" in message for message in run(rewind_pieces, 2))


LEVELS = (0.01, 0.5, 0.77, 0.99)


def prune_often(layout: Layout, tensors: bool, dtype: torch.dtype, coarse: bool) -> list[dict[str, Tensor]]:
    """Prune new models to many levels; coarse weights are multiples of 1/4, so that most of them have equals."""
    torch.set_default_dtype(dtype)
    masks = []
    ways = list(product(GRANULARITIES.values(), ("global", "local")))
    cases = [(*ways[0], level) for level in LEVELS]  # every level, and for the other ways one of them
    cases += [(*way, level) for way, level in zip(ways[1:], LEVELS, strict=False)]
    for granularity, scope, level in cases:
        model = build(layout, tensors)
        for weight in model.parameters() if coarse else ():
            piece = weight.detach().to_local() if isinstance(weight, DTensor) else weight.detach()
            piece.mul_(4).round_().div_(4)
        pruned = prune(model, level, scope=scope, granularity=granularity)
        masks.append(result(model, pruned)["masks"])
    return masks


@distributed
@pytest.mark.parametrize(
    ("layout", "dtype", "coarse"),
    [
        ("fsdp", torch.float32, True),
        ("fsdp", torch.float64, False),
        ("fsdp", torch.bfloat16, True),
        ("tp", torch.float32, True),
        ("fsdp+tp", torch.float32, True),
    ],
)
def test_exactly_k_units_go_and_equal_ones_in_the_order_of_the_whole(
    layout: Layout, dtype: torch.dtype, coarse: bool
) -> None:
    tensors = "tp" in layout
    (expected,) = run(prune_often, 1, "one", tensors, dtype, coarse)
    assert [zeros(masks) for masks in expected[: len(LEVELS)]] == [round(level * size(expected[0])) for level in LEVELS]
    for found in run(prune_often, 4 if layout == "fsdp+tp" else 2, layout, tensors, dtype, coarse):
        for masks, others in zip(found, expected, strict=True):
            assert masks.keys() == others.keys()
            assert all(torch.equal(masks[name], mask) for name, mask in others.items())


def prune_equals(layout: Layout) -> dict[str, Any]:
    model = build(layout)
    for weight in model.parameters():
        nn.init.constant_(weight, 0.5)
    return outcome_of(model, prune(model, 0.6))


def outcome_of(model: nn.Module, masks: dict[str, Tensor]) -> dict[str, Any]:
    return {**result(model, masks), "sparsity": sparsity(model)}


@distributed
def test_of_equal_weights_on_all_ranks_the_first_go() -> None:
    for outcome in run(prune_equals, 2, "fsdp"):
        flat = torch.cat([weight.flatten() for weight in outcome["weights"].values() if weight.ndim >= 2])
        assert torch.equal(flat == 0, torch.arange(75) < 45)
        assert outcome["sparsity"] == pytest.approx(0.6)


def prune_part() -> dict[str, Any]:
    """Prune rows that lie on ranks 0 and 1, and once more on ranks 2 and 3, beside a weight that every rank has."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    weight = torch.arange(1.0, 17.0).view(4, 4)
    model[0].weight = nn.Parameter(distribute_tensor(weight, mesh["tensor"], [Shard(0)]))
    model[1].weight = nn.Parameter(weight + 0.5)
    outcomes = {}
    for name, granularity in GRANULARITIES.items():
        pruned = copy.deepcopy(model)
        outcomes[name] = outcome_of(pruned, prune(pruned, 0.5, granularity=granularity, targets=["*"]))
    return outcomes


@distributed
def test_weights_on_a_part_of_the_ranks_count_once() -> None:
    for outcomes in run(prune_part, 4):
        for outcome in outcomes.values():
            first, second = outcome["weights"].values()
            assert torch.equal(first == 0, torch.tensor([True, True, False, False])[:, None].expand(4, 4))
            assert torch.equal(second == 0, first == 0)
            assert outcome["sparsity"] == pytest.approx(0.5)


# ------------------------------------------------------------------------------------------------ between the steps


class Watch:
    """Counts the zeros that the forward passes of validation see in the weights of all layers.

    Attributes:
        seen: For each validation batch, the number of zeros, and the number that the callback's masks have.
    """

    def __init__(self, model: LightningModule, callback: Any) -> None:
        self.model = model
        self.callback = callback
        self.seen: list[tuple[int, int]] = []
        self._zeros = 0

    def on_validation_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self._zeros = 0

    def look(self, module: nn.Module, inputs: Any) -> None:
        self._zeros += int((module.weight == 0).sum())  # put together by FSDP2 before this hook

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.seen.append((self._zeros, round(self.callback.sparsity_now * 93)))


def validate_between(interval: str) -> list[dict[str, Any]]:
    # one group for all layers: that of the root is the one that stays whole after a forward without a backward
    model, start = Net("fsdp", tensors=True, samples=2 * BATCH), 0 if interval == "epoch" else 2
    callback = MagnitudePruning(0.6, schedule="linear", start=start, end=start + 4, frequency=1, interval=interval)
    watch = Watch(model, callback)

    def attach(*args: Any) -> None:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(watch.look)

    on = On(
        on_sanity_check_start=attach,
        on_validation_batch_start=watch.on_validation_batch_start,
        on_validation_batch_end=watch.on_validation_batch_end,
    )
    fit(model, callback, on, max_epochs=5, limit_val_batches=1, num_sanity_val_steps=1)
    return [outcome(model, callback), watch.seen]


@distributed
@pytest.mark.parametrize(("interval", "levels"), [("step", [0, 0, 28, 56, 56, 56]), ("epoch", [0, 0, 14, 28, 42, 56])])
def test_weights_that_validation_has_put_together_are_masked_too(interval: str, levels: list[int]) -> None:
    for outcome, seen in run(validate_between, 2, interval):
        assert seen == [(pruned, pruned) for pruned in levels]  # the first one in the sanity check
        assert zeros(outcome["weights"]) == 56
        assert outcome["sparsity"] == pytest.approx([56 / 93] * 2)


def keep_zeros(layout: Layout, tensors: bool) -> dict[str, Any]:
    model, callback = Net(layout, tensors), ConstantSparsity()
    model.configure_model = partial(_configure_sparse, model)
    fit(model, callback)
    return outcome(model, callback)


def _configure_sparse(model: Net) -> None:
    if model.net is None:
        Net.configure_model(model)
        prune(model, 0.6)


@distributed
@pytest.mark.parametrize(("layout", "size"), [("ddp", 2), ("fsdp", 2), ("tp", 2), ("fsdp+tp", 4)])
def test_zeros_that_are_there_stay_on_every_rank(layout: Layout, size: int) -> None:
    tensors = "tp" in layout
    expected = keep_zeros("one", tensors)
    assert zeros(expected["weights"]) == round(0.6 * sum(w.numel() for w in expected["weights"].values() if w.ndim > 1))
    assert_same(run(keep_zeros, size, layout, tensors), expected)


def adapt(layout: Layout) -> dict[str, Any]:
    model, callback = Net(layout), MaskedAdapters(2)
    model.configure_model = partial(_configure_sparse, model)
    torch.manual_seed(100 + rank())
    fit(model, callback)
    return outcome(model, callback)


@distributed
def test_adapters_are_the_same_on_every_rank() -> None:
    expected = adapt("one")
    assert zeros(expected["weights"]) == round(0.6 * sum(w.numel() for w in expected["weights"].values() if w.ndim > 1))
    assert_same(run(adapt, 2, "ddp"), expected)


def learn(layout: Layout) -> dict[str, Any]:
    model, callback = Net(layout), LearnedMasks(2, 4)
    torch.manual_seed(100 + rank())
    fit(model, callback)
    return outcome(model, callback)


@distributed
def test_learned_masks_are_the_same_on_every_rank() -> None:
    found, expected = run(learn, 2, "ddp"), learn("one")
    assert_same(found, expected)


def learn_pieces() -> str:
    with pytest.raises(ValueError, match="must be whole on every rank for LearnedMasks") as raised:
        learn("fsdp")
    return str(raised.value)


@distributed
def test_masks_of_weights_in_pieces_are_not_learned() -> None:
    assert all("net.0.weight" in message for message in run(learn_pieces, 2))


def adapt_pieces() -> str:
    with pytest.raises(ValueError, match="must be whole on every rank for MaskedAdapters") as raised:
        adapt("fsdp")
    return str(raised.value)


@distributed
def test_weights_in_pieces_are_not_adapted() -> None:
    assert all("net.0.weight" in message for message in run(adapt_pieces, 2))


# ------------------------------------------------------------------------------------------------ what is sent and held


class Sent(TorchDispatchMode):
    """While it is on, notes every collective operation: its name, and the number and kind of the numbers it sends."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, int, bool]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # what it does with its pieces is seen, too
        if function.namespace in ("c10d", "_c10d_functional"):
            tensors = _tensors(args)
            whole = not any(tensor.is_floating_point() for tensor in tensors)
            name = function.overloadpacket.__name__.rstrip("_")
            self.operations.append((name, max((tensor.numel() for tensor in tensors), default=0), whole))
        return function(*args, **(kwargs or {}))


def _tensors(args: Iterable[Any]) -> list[Tensor]:
    lists = (arg if isinstance(arg, list | tuple) else [arg] for arg in args)
    return [tensor for items in lists for item in items for tensor in _flat(item) if isinstance(tensor, Tensor)]


def _flat(item: Any) -> list[Any]:
    return list(item) if isinstance(item, list | tuple) else [item]


# of each goal what it is mostly used with
WATCHED = [
    *(("magnitude", "weight"), ("sensitivity", "channel"), ("entropy-low", "channel")),
    *(("local", "weight"), ("threshold", "channel")),
]


def update_watched(layout: Layout) -> dict[str, list[tuple[str, int, bool]]]:
    found = {}
    for goal, granularity in WATCHED:
        model, callback, sent = Net(layout, "tp" in layout, STEPS * BATCH), pruning(goal, granularity), Sent()
        update = callback.maybe_update

        def watched(*args: Any, update: Callable[..., None] = update, sent: Sent = sent) -> None:
            with sent:
                update(*args)

        callback.maybe_update = watched
        fit(model, callback)
        assert callback.sparsity_now > 0
        found[f"{goal} {granularity}"] = sent.operations
    with Sent() as sent:
        if isinstance(model.net[0].weight, DTensor):
            model.net[0].weight.full_tensor()
            found["gathered"] = sent.operations
    return found


@distributed
@pytest.mark.parametrize("layout", ["ddp", "fsdp", "tp"])
def test_no_rank_gathers_anything_to_choose_masks(layout: Layout) -> None:
    bins, channels = 8, 8
    for found in run(update_watched, 2, layout):
        if layout != "ddp":
            assert "all_gather_into_tensor" in {name for name, _, _ in found.pop("gathered")}  # it would be seen
        for case, operations in found.items():
            assert {name for name, _, _ in operations} <= {"allreduce"}, case
            counters = max((count for _, count, whole in operations if whole), default=0)
            if layout != "ddp":
                assert counters == 2**16, case
            else:  # whether anything was seen of each of the four layers
                assert counters == (4 if "entropy" in case else 0), case
            # other numbers: one for each channel, or for each bin of its histogram
            most = channels * bins if "entropy" in case else channels if "channel" in case else 0
            assert all(count <= most for _, count, whole in operations if not whole), case


class Held(TorchDispatchMode):
    """While it is on, counts the bytes of the tensors that come and go.

    Attributes:
        peak: The most bytes that there were at one time.
        largest: The most entries that one of the tensors had.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.largest = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        given = {tensor.untyped_storage()._cdata for tensor in _tensors([*args, *(kwargs or {}).values()])}
        results = function(*args, **(kwargs or {}))
        for tensor in _tensors([results]):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes() // tensor.element_size())
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return results


SIZES = ((2048, 1), (4096, 1), (2048, 3))  # rows of 1024 weights, and layers


def hold() -> list[tuple[int, int]]:
    """Return the most bytes held, and the entries of the largest tensor, in an update of models of several sizes."""
    mesh, found = init_device_mesh("cpu", (ranks(),)), []
    for rows, layers in SIZES:
        model = nn.Sequential(*(nn.Linear(1024, 1, bias=False) for _ in range(layers)))
        for layer in model:
            # all equal: to tell equal weights apart takes more than to compare others
            weight = torch.ones(rows, 1024)
            layer.weight = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None))
        units = make_units(find(model), model, Weight())
        held = decide(units, Magnitude(), partial(_allocate, 0.3), {}).masks
        with Held() as counter:
            decide(units, Magnitude(), partial(_allocate, 0.6), held)
        found.append((counter.peak, counter.largest))
    return found


def _allocate(level: float, scores: Any) -> Any:
    return global_(scores, level)


@distributed
def test_an_update_holds_a_constant_and_some_bytes_for_each_weight_of_the_own_piece() -> None:
    piece = 2048 * 1024 // 2  # weights
    found = run(hold, 2)
    small, large, many = (max(peaks) for peaks in zip(*([peak for peak, _ in sizes] for sizes in found), strict=True))
    assert large - small <= 28 * piece  # bytes for each weight of the largest layer
    assert many - small <= 3.01 * piece  # a byte for each weight of the two others, and of the one at hand
    assert small - (large - small) <= 2**25  # what does not grow
    assert [[largest for _, largest in sizes] for sizes in found] == [[piece, 2 * piece, piece]] * 2  # never the whole


# ------------------------------------------------------------------------------------------------ what one rank sees


class Broken(Criterion):
    """The scores of one layer are NaN, on the last rank only."""

    def scores(self, units: Units) -> Tensor:
        scores = units.mean(torch.abs)
        return scores * torch.nan if units.name == "net.3.weight" and rank() == ranks() - 1 else scores


def meet_nan(layout: Layout) -> dict[str, int]:
    for name, number in (("net.0.weight", 1), ("net.2.weight", 0)):  # the second is empty on rank 1
        for granularity in GRANULARITIES.values():
            model = build(layout)
            if rank() == number:
                model.get_parameter(name).detach().to_local()[0, 0] = torch.nan
            with pytest.raises(ValueError, match=f"scores must be finite.*{name}"):
                prune(model, 0.5, granularity=granularity)
    model, callback = Net(layout), Pruning(0.5, Broken(), schedule="one_shot", start=3)
    trainers: list[Trainer] = []
    with pytest.raises(ValueError, match=r"scores must be finite.*net\.3\.weight"):
        fit(model, callback, On(on_fit_start=lambda trainer, *args: trainers.append(trainer)))
    return {"step": trainers[0].global_step, "masks": len(callback.masks)}


@distributed
def test_a_score_that_is_nan_on_one_rank_stops_all_of_them() -> None:
    assert run(meet_nan, 2, "fsdp") == [{"step": 3, "masks": 0}] * 2


def overflow() -> dict[str, Any]:
    model = Net("fsdp")
    plain = model.training_step

    def training_step(batch: list[Tensor], batch_idx: int) -> Tensor:
        # an infinite gradient for the first row of the last layer, of which rank 1 has no part
        return plain(batch, batch_idx) + (model(batch[0])[:, 0].sum() * torch.inf if batch_idx == 3 else 0.0)

    model.training_step = training_step
    last = "net.6.weight"
    callback = SensitivityPruning(0.5, window=2, schedule="one_shot", start=5, targets=(last,), granularity=Weight())
    steps: list[int] = []
    on = On(on_train_batch_end=lambda *args: steps.append(int(callback.sparsity_now > 0)))
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    fit(model, callback, on, plugins=[plugin])
    return {**result(model, callback.masks), "steps": steps}


@distributed
def test_a_gradient_that_overflows_on_one_rank_is_left_out_by_all_of_them() -> None:
    for outcome in run(overflow, 2):
        assert zeros(outcome["masks"]) == zeros(outcome["weights"]) == 12
        assert outcome["steps"] == [0, 0, 0, 0, 0, 1, 1, 1]  # the step that was skipped does not fill the window


class Branch(Net):
    """Has a layer that only the first rank runs."""

    def configure_model(self) -> None:
        super().configure_model()
        if not hasattr(self, "branch"):
            self.branch = nn.Linear(8, 4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + (self.branch(batch[0]).square().mean() if rank() == 0 else 0.0)


def run_branch(targets: tuple[str, ...]) -> dict[str, Any]:
    model = Branch("ddp")
    callback = Pruning(0.5, Entropy(bins=8, window=2), Channel(), schedule="one_shot", start=4, targets=targets)
    fit(model, callback, strategy=DDPStrategy(process_group_backend="gloo", find_unused_parameters=True))
    return outcome(model, callback)


@distributed
@pytest.mark.parametrize("targets", [("*",), ("branch.weight",)], ids=["all", "branch"])
def test_a_layer_that_only_one_rank_runs_is_judged_by_what_that_rank_sees(targets: tuple[str, ...]) -> None:
    first, second = run(run_branch, 2, targets)
    assert_same([second], first)
    assert "branch.weight" in first["masks"]


def copy_alone() -> dict[str, Any]:
    model, callback = Net("ddp"), EntropyPruning(0.5, window=2, schedule="one_shot", start=4, targets=("*",))
    copies: list[EntropyPruning] = []

    def make_copy(trainer: Trainer, *args: Any) -> None:
        if rank() == 1 and trainer.global_step == 3:  # inside the window
            copies.append(copy.deepcopy(callback))

    fit(model, callback, On(on_train_batch_end=make_copy))
    assert len(copies) == rank()
    return outcome(model, callback)


@distributed
def test_a_copy_of_the_callback_asks_no_other_rank() -> None:
    first, second = run(copy_alone, 2)
    assert_same([second], first)


# ------------------------------------------------------------------------------------------------ strategies


def strategy_named(name: str, *bases: type) -> SingleDeviceStrategy:
    return type(name, (*bases, SingleDeviceStrategy), {})(device="cpu")


@pytest.mark.parametrize("callback", [MagnitudePruning(0.5), ConstantSparsity()])
@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "XLAStrategy"])
def test_strategies_that_flatten_parameters_are_refused(name: str, callback: Any) -> None:
    parent = type(strategy_named(name))
    for strategy in (strategy_named(name), type("Mine", (parent,), {})(device="cpu")):
        trainer = Trainer(**{**QUIET, "strategy": strategy, "devices": "auto"}, callbacks=[callback])
        with pytest.raises(ValueError, match=f"got {name}, which flattens.*ModelParallelStrategy.*fully_shard"):
            trainer.fit(Net())
        assert trainer.global_step == 0
        trainer.validate(Net(), verbose=False)  # there is nothing to prune in it


def test_the_name_that_is_refused_is_that_of_lightning() -> None:
    trainer = Mock(strategy=FSDPStrategy())  # a Trainer takes it on GPUs only
    with pytest.raises(ValueError, match="got FSDPStrategy, which flattens"):
        MagnitudePruning(0.5).setup(trainer, Net(), "fit")


# ------------------------------------------------------------------------------------------------ checkpoints

RESUMED: dict[str, dict[str, Any]] = {
    "sensitivity": {"criterion": Sensitivity(window=2)},
    "entropy": {"criterion": Entropy(bins=8, window=2), "granularity": Channel(), "targets": ("*",)},
    "entropy-epochs": {
        "criterion": Entropy(bins=8, window=2),
        "granularity": Channel(),
        "targets": ("*",),
        "interval": "epoch",
    },
}


def resumed(case: str) -> Pruning:
    """Return a callback with updates at the steps 2, 4, 6, 8 of 9, or before the epochs 1 and 2 of 3."""
    end, frequency = (2, 1) if RESUMED[case].get("interval") == "epoch" else (8, 2)
    axes = {"sparsity": 0.6, "schedule": "linear", "start": 0, "end": end, "frequency": frequency}
    return Pruning(**axes, **{"targets": ("*",), "scope": "global", **RESUMED[case]})


@cache
def train_through(tensors: bool) -> dict[str, dict[str, Tensor]]:
    """Train in this process, without an interruption."""
    return train_on("one", tensors, None, None)


def train_on(
    layout: Layout, tensors: bool, load: Path | None, save: Path | None, sharded: bool = True, cases: Any = RESUMED
) -> dict[str, dict[str, Any]]:
    """Train three epochs of three batches, from a checkpoint on, or only the first, and save one after it."""
    found = {}
    for case in cases:
        model, callback = Net(layout, tensors, samples=3 * BATCH), resumed(case)
        levels: list[float] = []

        def note(trainer: Trainer, *args: Any, model: Net = model, levels: list[float] = levels) -> None:
            reshard(model)
            levels.append(sparsity(model))

        def keep(trainer: Trainer, *args: Any, case: str = case) -> None:
            if save is not None:
                trainer.save_checkpoint(save / case)
                trainer.should_stop = True

        on = On(on_train_batch_start=note, on_train_epoch_end=keep)
        path = None if load is None else load / case
        fit(model, callback, on, max_epochs=3, ckpt_path=path, sharded=sharded)
        found[case] = {**outcome(model, callback), "levels": levels}
    return found


def assert_goes_on(found: list[dict[str, dict[str, Any]]], expected: dict[str, dict[str, Any]]) -> None:
    """All ranks have, from the fourth batch on, what one process has that was never interrupted."""
    for case in found[0]:
        assert_same([outcomes[case] for outcomes in found], expected[case])
        for outcomes in found:
            assert outcomes[case]["levels"] == pytest.approx(expected[case]["levels"][3:])


@distributed
@pytest.mark.parametrize(
    ("before", "after", "cases"),
    [
        ("ddp 2", ["ddp 2", "one 1", "ddp 4"], ["sensitivity", "entropy-epochs"]),
        ("fsdp 2", ["fsdp 2", "fsdp 1"], ["sensitivity", "entropy"]),
        ("fsdp 1", ["fsdp 2"], ["entropy-epochs"]),
        ("fsdp 2 full", ["fsdp 2", "one 1"], ["entropy"]),
        ("one 1", ["ddp 2", "fsdp 2"], ["sensitivity"]),
        ("tp 2", ["tp 2"], ["sensitivity", "entropy"]),
        ("tp 2 full", ["one 1"], ["entropy"]),
        ("one 1", ["tp 2"], ["entropy-epochs"]),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Pruning ended at a sparsity of")  # the runs that only save
def test_a_resumed_run_goes_on_whatever_the_number_of_ranks(
    before: str, after: list[str], cases: list[str], tmp_path: Path
) -> None:
    tensors = "tp" in before + after[0]
    expected = train_through(tensors)
    layout, number, *full = before.split()
    run(train_on, int(number), layout, tensors, None, tmp_path, not full, cases)
    for layout, number in map(str.split, after):
        assert_goes_on(run(train_on, int(number), layout, tensors, tmp_path, None, True, cases), expected)
