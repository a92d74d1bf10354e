"""Swaps: against brute force on tiny layers; counts and groups stay, and the error of a layer only falls."""

import copy
import re
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import (
    NM,
    Block,
    Channel,
    Criterion,
    Granularity,
    Magnitude,
    Random,
    Reconstruction,
    Sensitivity,
    SharedFanIn,
    Wanda,
    Weight,
    prune,
    sparsity,
)
from lightning_prune.posttraining import swaps
from lightning_prune.posttraining.swaps import refined

ENOUGH = 10_000


def correlated(count: int, size: int, seed: int = 0) -> Tensor:
    """Inputs of different scales that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator) * torch.rand(size, generator=generator).mul(2).exp()
    return (torch.randn(count, size, generator=generator) @ mixing).double()


def layer(rows: int, columns: int, kept: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, a mask of the largest of its scores in each row, and the moments of its inputs."""
    x = correlated(50, columns, seed)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).double()
    best = (weight.abs() * x.square().sum(0).sqrt()).topk(kept, 1).indices
    return weight, torch.zeros(rows, columns, dtype=torch.bool).scatter(1, best, True), x.T @ x


def errors(weight: Tensor, mask: Tensor, moments: Tensor) -> Tensor:
    """The squared error of each row's output."""
    gone = weight * ~mask
    return ((gone @ moments) * gone).sum(1)


def masks_of(columns: int, kept: int) -> Tensor:
    found = torch.zeros(0, columns, dtype=torch.bool)
    for chosen in combinations(range(columns), kept):
        row = torch.zeros(1, columns, dtype=torch.bool)
        row[0, list(chosen)] = True
        found = torch.cat([found, row])
    return found


def neighbours(mask: Tensor, group: int | None = None) -> Tensor:
    """All masks that differ from one of a row by a swap."""
    found = []
    for goes, comes in [(int(a), int(b)) for a in mask.nonzero() for b in (~mask).nonzero()]:
        if group is None or goes // group == comes // group:
            new = mask.clone()
            new[goes], new[comes] = False, True
            found.append(new)
    return torch.stack(found) if found else torch.zeros(0, len(mask), dtype=torch.bool)


# -------------------------------------------------------------------------------------------------------- brute force


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kept", [1, 4])
def test_with_one_weight_to_choose_it_is_the_best_of_all_masks(seed: int, kept: int) -> None:
    weight, mask, moments = layer(8, 5, kept, seed)
    new = refined(weight, mask, moments[None], Weight(), ENOUGH)
    for number, row in enumerate(weight):
        every = masks_of(5, kept)
        best = errors(row.expand(len(every), 5), every, moments).min()
        torch.testing.assert_close(errors(row[None], new[number, None], moments)[0], best)


@pytest.mark.parametrize("seed", range(5))
def test_no_swap_is_left_that_lowers_the_error(seed: int) -> None:
    weight, mask, moments = layer(6, 8, 4, seed)
    new = refined(weight, mask, moments[None], Weight(), ENOUGH)
    before, after = errors(weight, mask, moments), errors(weight, new, moments)
    assert (new.sum(1) == 4).all()
    assert (after <= before).all()
    best = []
    for number, row in enumerate(weight):
        near, every = neighbours(new[number]), masks_of(8, 4)
        assert (errors(row.expand(len(near), 8), near, moments) >= after[number] * (1 - 1e-9)).all()
        best.append(errors(row.expand(len(every), 8), every, moments).min())
    assert (after >= torch.stack(best) * (1 - 1e-9)).all()
    assert torch.isclose(after, torch.stack(best)).float().mean() >= 0.5  # the best of all masks in most rows


def test_each_swap_is_the_best_one_and_the_error_falls_with_every_further_swap() -> None:
    weight, mask, moments = layer(6, 8, 4)
    for most in range(4):
        old, new = (refined(weight, mask, moments[None], Weight(), count) for count in (most, most + 1))
        for number, row in enumerate(weight):
            near = torch.cat([neighbours(old[number]), old[number, None]])
            best = errors(row.expand(len(near), 8), near, moments).min()
            torch.testing.assert_close(errors(row[None], new[number, None], moments)[0], best)


@pytest.mark.parametrize("columns", [8, 10])
def test_weights_of_n_m_take_each_others_place_inside_their_group(columns: int) -> None:
    weight, _, moments = layer(6, columns, 2)
    mask = torch.zeros(6, columns, dtype=torch.bool)
    mask[:, [0, 1, 4, 5]] = True
    mask[:, 8:9] = True  # of a shorter last group
    new = refined(weight, mask, moments[None], NM(2, 4), ENOUGH)
    assert all((part.sum(1) == old.sum(1)).all() for part, old in zip(new.split(4, 1), mask.split(4, 1), strict=True))
    after = errors(weight, new, moments)
    assert (after < errors(weight, mask, moments)).any()
    for number, row in enumerate(weight):
        near = neighbours(new[number], 4)
        assert (errors(row.expand(len(near), columns), near, moments) >= after[number] * (1 - 1e-9)).all()


def test_rows_that_share_their_inputs_swap_together() -> None:
    weight, _, moments = layer(5, 6, 3)  # the last group has one row
    keep = torch.zeros(3, 6, dtype=torch.bool)
    keep[:, :3] = True
    mask = keep.repeat_interleave(2, 0)[:5]
    new = refined(weight, mask, moments[None], SharedFanIn(2), ENOUGH)
    assert torch.equal(new[0], new[1])
    assert torch.equal(new[2], new[3])
    assert (new.sum(1) == 3).all()
    every = masks_of(6, 3)
    for rows, own in ((weight[:2], new[0]), (weight[2:4], new[2]), (weight[4:], new[4])):
        total = sum(errors(row.expand(len(every), 6), every, moments) for row in rows)
        found = sum(errors(row[None], own[None], moments)[0] for row in rows)
        near = neighbours(own)
        assert (sum(errors(row.expand(len(near), 6), near, moments) for row in rows) >= found * (1 - 1e-9)).all()
        assert found <= total[every.tolist().index(keep[0].tolist())]


def test_a_short_list_ends_where_all_pairs_do(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, mask, moments = layer(12, 20, 10)
    monkeypatch.setattr(swaps, "_SHORT", 2)
    monkeypatch.setattr(swaps, "_CHUNK", 1000)
    new = refined(weight, mask, moments[None], Weight(), ENOUGH)
    after = errors(weight, new, moments)
    for number, row in enumerate(weight):
        near = neighbours(new[number])
        assert (errors(row.expand(len(near), 20), near, moments) >= after[number] * (1 - 1e-9)).all()


def test_zeros_do_not_come_back() -> None:
    weight, mask, moments = layer(6, 8, 4)
    weight[:, ::2], mask[:] = 0.0, torch.tensor([False, True] * 4)
    new = refined(weight, mask, moments[None], Weight(), ENOUGH)
    assert torch.equal(new, mask)


# ---------------------------------------------------------------------------------------------------------- in prune


class Transposed(nn.Linear):
    """A linear layer that holds its weight as (inputs, outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.fan_in_fan_out, self.weight = True, nn.Parameter(self.weight.detach().T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Net(nn.Module):
    """A stem and two blocks, with a convolution in groups, a layer that holds its weight transposed, and plain ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv1d(4, 8, 3, groups=2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2))
        self.blocks[1][2] = Transposed(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stem(x).movedim(1, 2)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 4, 10, generator=generator).cumsum(2) for _ in range(3)]


def layer_error(model: nn.Module, dense: nn.Module, name: str, data: list[Tensor]) -> float:
    """The error of one layer on the inputs that it has in a pruned model."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in data:
            model(batch)
        handle.remove()
        layers = [net.get_submodule(name) for net in (model, dense)]
        return float(sum((layers[0](x) - layers[1](x)).square().sum() for x in seen))


def net(granularity: Granularity | None = None) -> Net:
    model = Net()
    if isinstance(granularity, SharedFanIn):
        model.stem = nn.Conv1d(4, 8, 3)
    return model


@pytest.mark.parametrize("sequential", [None, "blocks"])
@pytest.mark.parametrize("granularity", [Weight(), NM(2, 4), SharedFanIn(3)])
@pytest.mark.parametrize("criterion", [Wanda(), Magnitude(), Random(), Sensitivity(window=3)])
def test_counts_stay_and_errors_fall(criterion: Criterion, granularity: Granularity, sequential: str | None) -> None:
    dense, data = net(granularity), batches()
    plain, model = copy.deepcopy(dense), copy.deepcopy(dense)
    common: dict[str, Any] = {"criterion": criterion, "granularity": granularity, "scope": "local", "data": data}
    if criterion.needs == "gradients":
        common["loss"] = lambda model, batch: model(batch).square().mean()
    expected = prune(plain, 0.5, **common, sequential=sequential if criterion.needs == "forwards" else None)
    masks = prune(model, 0.5, **common, sequential=sequential, refine=ENOUGH)
    assert sparsity(model) == sparsity(plain) == masks.sparsity
    changed = 0
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)
        assert torch.equal(model.get_parameter(name)[mask], dense.get_parameter(name)[mask])
        dim = 0 if name == "blocks.1.2.weight" else 1  # inputs
        rows = mask.movedim(dim, 0).flatten(1) if dim == 0 else mask.flatten(1).T
        if criterion.needs != "forwards":  # chosen by what no pruning changes
            other = expected[name].movedim(dim, 0).flatten(1) if dim == 0 else expected[name].flatten(1).T
            assert torch.equal(rows.sum(0), other.sum(0)), name
        if isinstance(granularity, NM) and name != "stem.weight":  # whose rows have two inputs
            assert (rows.unflatten(0, (-1, 4)).sum(1) == 2).all()
        changed += int((mask != expected[name]).sum())
    assert changed > 0
    first = "blocks.0.0" if sequential else "stem"
    assert layer_error(model, dense, first, data) < layer_error(plain, dense, first, data)


def test_what_is_left_is_fitted_after_the_swaps() -> None:
    dense, data = Net(), batches()
    refined_only, both = copy.deepcopy(dense), copy.deepcopy(dense)
    common: dict[str, Any] = {"criterion": Wanda(), "scope": "local", "data": data, "sequential": "blocks"}
    common["targets"] = ["blocks.*"]
    prune(refined_only, 0.5, **common, refine=5)
    masks = prune(both, 0.5, **common, refine=5, reconstruct=Reconstruction(steps=20, lr=1e-2))
    with torch.no_grad():
        error = [sum((model(x) - dense(x)).square().mean() for x in data) for model in (refined_only, both)]
    assert error[1] < 0.8 * error[0]
    assert all(torch.equal(both.get_parameter(name) != 0, mask) for name, mask in masks.items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"granularity": Block(2, 2)}, "granularity must be Weight(), NM(n, m) or SharedFanIn(rows) for masks to be"),
        ({"granularity": Channel()}, "granularity must be Weight(), NM(n, m) or SharedFanIn(rows) for masks to be"),
        ({"data": None}, "data must be given to refine masks or to reconstruct, got None"),
        (
            {"granularity": SharedFanIn(3)},
            "rows of SharedFanIn must divide the output channels of each group of a convolution for masks to be "
            "refined, got 3 for 4 of 'stem.weight'",
        ),
        ({"refine": -1}, "refine must be at least 0, got -1"),
        ({"model": nn.LSTM(4, 4)}, "targets must belong to linear layers and convolutions, got 'weight_ih_l0' of LSTM"),
    ],
)
def test_what_cannot_be_refined_is_refused(given: dict[str, Any], message: str) -> None:
    given = {"model": Net(), "data": batches(), "refine": 5, **given}
    with pytest.raises(ValueError, match=re.escape(message)):
        prune(given.pop("model"), 0.5, **given)
