"""Comparison in groups: ranks by hand, pieces as the whole, and N:M masks as a stable sort of all scores has them."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune import NM, Magnitude, Masks, Wanda, prune, scopes
from lightning_prune.tensors import boolean as flags
from lightning_prune.tensors import streaming
from lightning_prune.tensors.ranking import part_within, rank_within, tail_share
from lightning_prune.units.finding import make_units
from lightning_prune.updates import decision
from lightning_prune.updates.decision import decide
from lightning_prune.updates.target_sparsity import SparsityTarget

deterministic = settings(derandomize=True, database=None, deadline=None, max_examples=100)


@given(st.integers(1, 80), st.integers(1, 170), st.integers(0, 99))
@deterministic
def test_a_rank_is_the_place_in_a_stable_sort_of_the_group(size: int, length: int, seed: int) -> None:
    scores = torch.randint(-3, 4, (2, length), generator=torch.Generator().manual_seed(seed)).float()
    found = rank_within(scores, size)
    for row, ranked in zip(scores.tolist(), found, strict=True):
        for begin in range(0, length, size):
            group = row[begin : begin + size]
            order = sorted(range(len(group)), key=lambda place, group=group: group[place])
            places = [(order.index(place) + 0.5) / len(group) for place in range(len(group))]
            among = ranked[begin : begin + size] - torch.tensor(places, dtype=torch.float64)
            assert bool((among >= 0).all())
            assert bool((among < 2.0**-29).all())


@given(st.integers(2, 9), st.sampled_from([1, 3]), st.integers(1, 9), st.booleans(), st.integers(0, 99))
@deterministic
def test_some_units_rank_as_all_of_them_do(size: int, stride: int, blocks: int, double: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (blocks, size, stride)
    scores = torch.randint(-2, 3, shape, generator=generator).to(torch.float64 if double else torch.float32) / 8
    if double:
        scores += torch.rand(shape, generator=generator) * 1e-12  # what float32 cannot tell apart
    kept = torch.rand(shape, generator=generator) < 0.7
    lowered = scores.masked_fill(~kept, -torch.inf)
    whole = rank_within(lowered.movedim(1, -1), size).movedim(-1, 1).reshape(-1)
    part = part_within(scores, scores.view(-1).__getitem__, size, stride, kept)
    total = scores.numel()
    begin, end = sorted(torch.randint(0, total + 1, (2,), generator=generator).tolist())
    for at in (
        slice(0, total, 1),
        slice(begin, end, 1),
        slice(begin, end, 5),
        torch.randint(0, total, (7,), generator=generator),
    ):
        stays = kept.view(-1)[at]  # the score of what is pruned is not looked at
        assert torch.equal(part(at)[stays], whole[at][stays])


def expected(weights: dict[str, Tensor], held: dict[str, Tensor], k: int, size: int) -> dict[str, Tensor]:
    """Return masks without the k that come first: pruned ones, then by place in the group, then by magnitude."""
    scores = {}
    for name, weight in weights.items():
        axis = 0 if name.startswith("transposed") else 1  # the inputs
        magnitude = weight.abs() if name not in held else weight.abs().masked_fill(~held[name], -torch.inf)
        ranked = rank_within(magnitude.movedim(axis, -1).contiguous(), size).movedim(-1, axis)
        scores[name] = ranked if name not in held else ranked.masked_fill(~held[name], -torch.inf)
    order = torch.cat([score.reshape(-1) for score in scores.values()]).argsort(stable=True)
    keep = torch.ones(len(order), dtype=torch.bool).index_fill_(0, order[:k], False)
    parts = keep.split([score.numel() for score in scores.values()])
    return {name: part.view(weights[name].shape) for name, part in zip(weights, parts, strict=True)}


@pytest.mark.parametrize("ragged", [False, True])
def test_masks_on_the_way_to_n_of_m_are_those_of_a_stable_sort(ragged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags, "_CHUNK", 50)  # pieces cut groups
    monkeypatch.setattr(decision, "HELD", 0)
    monkeypatch.setattr(streaming, "_FEW", 64)  # a sample is looked at first
    torch.manual_seed(0)
    inputs = 10 if ragged else 12
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(inputs, 9),
            "convolution": nn.Conv2d(inputs, 5, 3),
            "transposed": nn.ConvTranspose2d(inputs, 6, (1, 3)),
        }
    )
    for parameter in model.parameters():
        parameter.data = torch.randint(-4, 5, parameter.shape).float()  # many are equal
    found = SparsityTarget(0.5).find(model)
    units, criterion = make_units(found, model, NM(2, 4)), Magnitude()
    weights = {target.name: target.parameter.detach() for target in found}
    total = sum(weight.numel() for weight in weights.values())
    held = Masks()
    for due in (0.1, 0.37, 0.6, 1.0):
        allocate = partial(
            SparsityTarget(0.5).allocate, found=found, criterion=criterion, scope=scopes.resolve("global"), due=due
        )
        wanted = expected(weights, held, round(0.5 * due * total), 4)
        held = decide(units, criterion, allocate, held).masks
        for name, mask in held.items():
            assert torch.equal(mask, wanted[name]), (name, due)
        held.apply(model)
    if not ragged:
        assert {int(row.sum()) for row in held["linear.weight"].view(-1, 4)} == {2}


def test_a_criterion_without_parts_ranks_in_pieces_too() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 6)
    data = torch.randn(20, 8)
    scores = model.weight.detach().abs() * data.square().mean(0).sqrt()
    mask = prune(model, 0.5, criterion=Wanda(), granularity=NM(2, 4), data=[data])["weight"]
    assert torch.equal(mask, rank_within(scores, 4) > 0.5)


def test_shares_of_many_scores_are_those_of_a_sort_in_float64() -> None:
    # more than one piece, with equal scores across their borders
    scores = torch.randn(700_001, generator=torch.Generator().manual_seed(0)).mul(1000).round().div(1000)
    ordered, order = scores.double().clamp(min=0.0).sort(descending=True)
    total = ordered.square().cumsum(0)
    last = torch.searchsorted(ordered.neg(), ordered.neg(), right=True) - 1
    shares = torch.where(ordered > 0, ordered.square() / total[last].clamp(min=1e-300), 0.0)
    assert torch.equal(tail_share(scores)[order], shares)
