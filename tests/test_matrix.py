"""Every criterion x granularity x scope x schedule, through a real fit: the zeros are counted, not estimated."""

import math
from collections.abc import Callable
from itertools import combinations, cycle, pairwise, product

import pytest
import torch
from models import ConvNet, MaskRecorder, fit, size, weights, zeros
from variants import CRITERIA, GRANULARITIES, SCHEDULES, SCOPES, at_least, label

from lightning_prune import Channel, Criterion, Granularity, Pruning

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
        return {name: round((first if name == "net.0.weight" else others) * n) for name, n in sizes.items()}
    if scope == "local":
        return {name: round(SPARSITY * n) for name, n in sizes.items()}
    if scope is at_least:
        return {name: n - math.ceil((1 - SPARSITY) * n) for name, n in sizes.items()}
    return round(SPARSITY * sum(sizes.values()))


# criteria, granularities and scopes all meet; the schedules take turns, so that each meets every variant of these
CASES = [(*axes, schedule) for axes, schedule in zip(product(CRITERIA, GRANULARITIES, SCOPES), cycle(SCHEDULES))]


def test_every_pair_of_variants_is_tested() -> None:
    axes = (CRITERIA, GRANULARITIES, SCOPES, SCHEDULES)
    for (i, ones), (j, others) in combinations(enumerate(axes), 2):
        met = {(label(case[i]), label(case[j])) for case in CASES}
        assert met == {(label(one), label(other)) for one in ones for other in others}


@pytest.mark.parametrize(("criterion", "granularity", "scope", "schedule"), CASES, ids=label)
def test_every_combination_ends_with_exactly_the_zeros_asked_for(
    criterion: Criterion,
    granularity: Granularity,
    scope: str | dict[str, float] | Callable,
    schedule: str | Callable,
) -> None:
    axes = {"sparsity": scope} if isinstance(scope, dict) else {"sparsity": SPARSITY, "scope": scope}
    callback = Pruning(
        **axes, criterion=criterion, granularity=granularity, schedule=schedule, start=1, end=6, frequency=2
    )
    model, recorder = ConvNet(), MaskRecorder(callback)
    fit(model, callback, recorder, limit_val_batches=0)

    dead = {}
    for name, weight in weights(model).items():
        dead[name] = granularity.pool((weight != 0).float(), 0) == 0
        assert torch.equal(weight != 0, granularity.expand(~dead[name], weight.shape, 0)), f"half a unit of {name}"
        assert torch.equal(callback.masks[name], weight != 0)
    counts = {name: int(units.sum()) for name, units in dead.items()}
    due = expected(scope, {name: units.numel() for name, units in dead.items()})
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

    assert recorder.counts[0] == 0
    assert recorder.counts[-1] > 0
    for old, new in pairwise(recorder.masks):
        assert all(not (new[name] & ~mask).any() for name, mask in old.items()), "a pruned unit came back"

    assert model.state_dict().keys() == ConvNet().state_dict().keys()
    plain = ConvNet(seed=1)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert callback.sparsity_now == pytest.approx(zeros(plain) / size(plain), abs=1e-12)
