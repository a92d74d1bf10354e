"""Criteria, granularities, scopes and schedules in pairs, through a real fit: the zeros are counted, not estimated."""

import math
from collections.abc import Callable
from itertools import cycle, pairwise
from typing import Any

import pytest
import torch
from models import Attending, ConvNet, Deep, MaskRecorder, Narrow, Tiny, fit, size, weights, zeros
from pairwise import covering
from torch import Tensor
from variants import (
    COUPLED,
    CRITERIA,
    GRANULARITIES,
    OF_LAYERS,
    OF_STREAMS,
    SCHEDULES,
    SCOPES,
    at_least,
    label,
    square_root,
)

from lightning_prune import (
    FPGM,
    Channel,
    Criterion,
    Entropy,
    Granularity,
    Layer,
    Magnitude,
    Pruning,
    ResidualChannel,
    Sensitivity,
    SharedFanIn,
)
from lightning_prune.models.kept_norms import kept_channels

SPARSITY = 0.6
# bias and norm entries that die with a channel of the weight
FOLLOWERS = {
    "net.0.weight": ("net.1.weight", "net.1.bias"),
    "net.3.weight": ("net.3.bias", "net.4.weight", "net.4.bias"),
    "net.8.weight": ("net.8.bias",),
}


def expected(scope: str | dict[str, float] | Callable, sizes: dict[str, int]) -> dict[str, int] | int:
    """The units that have to be pruned: of each target where the scope says so, otherwise in total."""
    if isinstance(scope, dict):
        first, others = scope.values()
        return {name: round((first if name.startswith("net.0.") else others) * n) for name, n in sizes.items()}
    if scope == "local":
        return {name: round(SPARSITY * n) for name, n in sizes.items()}
    if scope is at_least:
        return {name: n - math.ceil((1 - SPARSITY) * n) for name, n in sizes.items()}
    return round(SPARSITY * sum(sizes.values()))


# what dies with each unit of a layer: the parameter, the dimension, and a row of places in it for each unit
Members = list[tuple[str, int, Tensor]]


def attention(name: str, heads: int) -> Members:
    rows = torch.arange(12).view(heads, -1)
    made = [(f"{name}.{layer}.{what}", 0, rows) for layer in "qkv" for what in ("weight", "bias")]
    return [*made, (f"{name}.o.weight", 1, rows)]


def one(units: int) -> Tensor:
    return torch.arange(units).view(-1, 1)


CHANNELS: dict[str, Members] = {
    "net.0.weight": [
        *(("net.0.weight", 0, one(6)), ("net.1.weight", 0, one(6)), ("net.1.bias", 0, one(6))),
        ("net.3.weight", 1, one(6)),
    ],
    "net.3.weight": [
        *(("net.3.weight", 0, one(4)), ("net.3.bias", 0, one(4))),
        *(("net.4.weight", 0, one(4)), ("net.4.bias", 0, one(4)), ("net.8.weight", 1, torch.arange(16).view(4, 4))),
    ],
}
HEADS = {"net.0.q.weight": attention("net.0", 6), "net.2.q.weight": attention("net.2", 2)}


SOME_CRITERIA = (Magnitude(), Entropy(bins=8, window=2), Sensitivity(window=2), FPGM())
SOME_SCHEDULES = ("one_shot", "linear", "cubic", square_root)


def cases(
    criteria: tuple[Criterion, ...],
    granularities: tuple[Granularity, ...],
    schedules: tuple[str | Callable, ...] = SCHEDULES,
) -> list[tuple[Any, ...]]:
    """Return combinations in which each variant of an axis meets each of every other."""
    axes = {"criterion": criteria, "granularity": granularities, "scope": SCOPES, "schedule": schedules}
    return [tuple(case.values()) for case in covering(axes)]


def by_turns(criteria: tuple[Criterion, ...]) -> list[tuple[Criterion, str | Callable]]:
    """Return each schedule with a criterion, by turns."""
    return list(zip(cycle(criteria), SCHEDULES, strict=False))


def trained(
    model: Tiny,
    criterion: Criterion,
    granularity: Granularity,
    scope: str | dict[str, float] | Callable,
    schedule: str | Callable,
) -> tuple[Tiny, Pruning, MaskRecorder]:
    axes = {"sparsity": scope} if isinstance(scope, dict) else {"sparsity": SPARSITY, "scope": scope}
    axes["targets"] = ("*",)  # neurons that are outputs, too
    callback = Pruning(
        **axes, criterion=criterion, granularity=granularity, schedule=schedule, start=1, end=6, frequency=2
    )
    recorder = MaskRecorder(callback)
    fit(model, callback, recorder, limit_val_batches=0)
    return model, callback, recorder


def assert_even(
    granularity: SharedFanIn, dead: dict[str, Tensor], shapes: dict[str, torch.Size], due: dict[str, int] | int
) -> None:
    """Every group of a layer has as many dead units, and a layer as many as whole inputs of all its groups allow."""
    groups = {name: granularity.groups(shape, 0) for name, shape in shapes.items()}
    for name, units in dead.items():
        assert len(set(units.view(groups[name], -1).sum(1).tolist())) == 1, f"groups of {name} differ"
    counts = {name: int(units.sum()) for name, units in dead.items()}
    if isinstance(due, dict):
        assert all(2 * abs(counts[name] - due[name]) <= groups[name] for name in counts), (counts, due)
    else:
        assert 2 * abs(sum(counts.values()) - due) <= sum(groups.values()), (counts, due)


def assert_only_fewer(recorder: MaskRecorder) -> None:
    assert recorder.counts[0] == 0
    assert recorder.counts[-1] > 0
    for old, new in pairwise(recorder.masks):
        assert all(not (new[name] & ~mask).any() for name, mask in old.items()), "a pruned unit came back"


@pytest.mark.parametrize(("criterion", "granularity", "scope", "schedule"), cases(CRITERIA, GRANULARITIES), ids=label)
def test_every_pair_of_variants_ends_with_exactly_the_zeros_asked_for(
    criterion: Criterion,
    granularity: Granularity,
    scope: str | dict[str, float] | Callable,
    schedule: str | Callable,
) -> None:
    model, callback, recorder = trained(ConvNet(), criterion, granularity, scope, schedule)
    dead = {}
    for name, weight in weights(model).items():
        dead[name] = granularity.pool((weight != 0).float(), 0) == 0
        assert torch.equal(weight != 0, granularity.expand(~dead[name], weight.shape, 0)), f"half a unit of {name}"
        assert torch.equal(callback.masks[name], weight != 0)
    counts = {name: int(units.sum()) for name, units in dead.items()}
    due = expected(scope, {name: units.numel() for name, units in dead.items()})
    if isinstance(granularity, SharedFanIn):
        assert_even(granularity, dead, {name: weight.shape for name, weight in weights(model).items()}, due)
    else:
        assert (counts if isinstance(due, dict) else sum(counts.values())) == due

    parameters = dict(model.named_parameters())
    if isinstance(granularity, Channel):
        for name, followers in FOLLOWERS.items():
            rows = weights(model)[name].flatten(1).any(1)
            assert torch.equal(rows, ~dead[name])
            for follower in followers:
                assert not parameters[follower][~rows].any()
                assert torch.equal(callback.masks[follower], rows)
    elif not granularity.follows:
        assert callback.masks.keys() == FOLLOWERS.keys()

    assert_only_fewer(recorder)
    assert model.state_dict().keys() == ConvNet().state_dict().keys()
    plain = ConvNet(seed=1)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert callback.sparsity_now == pytest.approx(zeros(plain) / size(plain), abs=1e-12)


@pytest.mark.parametrize(
    ("criterion", "granularity", "scope", "schedule"), cases(SOME_CRITERIA, COUPLED, SOME_SCHEDULES), ids=label
)
def test_coupled_units_die_with_all_that_belongs_to_them(
    criterion: Criterion,
    granularity: Granularity,
    scope: str | dict[str, float] | Callable,
    schedule: str | Callable,
) -> None:
    build, units = (ConvNet, CHANNELS) if isinstance(granularity, Channel) else (Attending, HEADS)
    model, callback, recorder = trained(build(), criterion, granularity, scope, schedule)
    parameters = dict(model.named_parameters())

    touched = {name for members in units.values() for name, *_ in members}
    masks = {name: torch.ones_like(parameters[name], dtype=torch.bool) for name in touched}
    dead = {}
    for name, members in units.items():
        rows = members[0][2]
        dead[name] = ~callback.masks[name].movedim(members[0][1], 0)[rows].flatten(1).any(1)
        for member, dim, places in members:
            masks[member].index_fill_(dim, places[dead[name]].flatten(), False)
    assert callback.masks.keys() == masks.keys()
    for name, mask in masks.items():
        assert torch.equal(callback.masks[name], mask), name
        assert not parameters[name][~mask].any()
        assert parameters[name][mask].all() or parameters[name].ndim < 2

    counts = {name: int(units.sum()) for name, units in dead.items()}
    due = expected(scope, {name: units.numel() for name, units in dead.items()})
    found = counts if isinstance(due, dict) else sum(counts.values())
    # scopes that rank by scores of their own do not know that a unit has to stay
    full = any(count == units.numel() - 1 for count, units in zip(counts.values(), dead.values(), strict=True))
    assert found == due or (label(scope) in ("lamp", "OWL") and full and found == due - 1)
    assert all(count < dead[name].numel() for name, count in counts.items()), "a layer has no unit left"

    assert_only_fewer(recorder)
    weights = [mask for name, mask in masks.items() if parameters[name].ndim >= 2]
    zeros = sum(int((~mask).sum()) for mask in weights)
    assert callback.sparsity_now == pytest.approx(zeros / sum(mask.numel() for mask in weights), abs=1e-12)


@pytest.mark.parametrize(("criterion", "schedule"), by_turns(OF_STREAMS), ids=label)
def test_the_hidden_width_shrinks_by_whole_channels(criterion: Criterion, schedule: str | Callable) -> None:
    model, callback, recorder = trained(Narrow(), criterion, ResidualChannel(), "global", schedule)
    kept = callback.masks["net.4.weight"]
    assert int((~kept).sum()) == round(SPARSITY * 8)
    assert kept_channels(model)["net.4.weight"].equal(kept)
    for name, mask in callback.masks.items():
        ways = [mask.movedim(dim, 0).reshape(8, -1).any(1) for dim, length in enumerate(mask.shape) if length == 8]
        assert any(way.equal(kept) for way in ways), name
    assert_only_fewer(recorder)
    assert callback.sparsity_now == round(SPARSITY * 8) / 8


@pytest.mark.parametrize(("criterion", "schedule"), by_turns(OF_LAYERS), ids=label)
def test_layers_die_as_a_whole(criterion: Criterion, schedule: str | Callable) -> None:
    model, callback, recorder = trained(Deep(), criterion, Layer(), "global", schedule)
    dead = [number for number, block in enumerate(model.net[2]) if not any(own.any() for own in block.parameters())]
    assert len(dead) == round(SPARSITY * 6)
    names = [name for name, _ in model.named_parameters() if name.startswith("net.2.")]
    assert list(callback.masks) == names
    for name, mask in callback.masks.items():
        assert mask.any() == mask.all() == (int(name.split(".")[2]) not in dead), name
    assert_only_fewer(recorder)
    assert callback.sparsity_now == len(dead) / 6
