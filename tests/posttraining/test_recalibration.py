"""Recalibration: batch norms see what the pruned layers put out, and nothing else changes."""

from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from architectures import CASES, build
from models import ConvNet
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_prune import Channel, prune, recalibrate

BATCHES = [torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def test_statistics_are_the_averages_over_the_batches() -> None:
    model = ConvNet(dropout=0.5).net.train()
    model[1].momentum = 0.3
    before = deepcopy(model)
    recalibrate(model, BATCHES)
    seen = torch.stack([before[0](batch).mean((0, 2, 3)) for batch in BATCHES]).mean(0)
    spread = torch.stack([before[0](batch).var((0, 2, 3)) for batch in BATCHES]).mean(0)
    assert torch.allclose(model[1].running_mean, seen, atol=1e-6)
    assert torch.allclose(model[1].running_var, spread, atol=1e-6)
    assert int(model[1].num_batches_tracked) == 3
    assert (model[1].momentum, model[4].momentum) == (0.3, 0.1)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_the_eval_mode_comes_close_to_the_train_mode_again() -> None:
    model, _ = build(CASES["resnet_basic"])
    loader = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    prune(model, 0.6, granularity=Channel(coupled=True), example_inputs=loader[0])

    def gap() -> float:
        with torch.no_grad():
            return float((deepcopy(model).eval()(loader[0]) - deepcopy(model).train()(loader[0])).abs().mean())

    before = gap()
    recalibrate(model.eval(), loader)
    assert gap() < 0.5 * before
    assert not model.training


def test_a_loader_of_pairs_and_a_number_of_batches() -> None:
    loader = DataLoader(TensorDataset(torch.cat(BATCHES), torch.zeros(24)), batch_size=8)
    one, other = ConvNet(), ConvNet()
    recalibrate(one, loader, batches=2)
    recalibrate(other, BATCHES[:2])
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), other.buffers(), strict=True))


class Stream(IterableDataset):
    """Batches without an end that is known."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(BATCHES)


def test_prune_recalibrates_with_its_data() -> None:
    one, other, loader = ConvNet(), ConvNet(), DataLoader(Stream(), batch_size=None)
    prune(one, 0.5, granularity=Channel(coupled=True), example_inputs=BATCHES[0], data=loader, recalibrate=2)
    prune(other, 0.5, granularity=Channel(coupled=True), example_inputs=BATCHES[0])
    assert not torch.equal(one.net[1].running_mean, other.net[1].running_mean)
    recalibrate(other, BATCHES, 2)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_what_cannot_be_measured_is_refused_or_left() -> None:
    with pytest.raises(ValueError, match="loader must yield at least one batch, got none"):
        recalibrate(ConvNet(), [])
    with pytest.raises(ValueError, match="data must be given to recalibrate batch norms, got recalibrate=2"):
        prune(ConvNet(), 0.5, recalibrate=2)
    plain = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    recalibrate(plain, [])
    assert plain[1].running_mean is None
