"""Defaults do not destroy: on real digits, no strategy as it comes ends far below the dense network."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from models import QUIET
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import (
    Channel,
    EntropyPruning,
    MagnitudePruning,
    MovementPruning,
    Pruning,
    RandomPruning,
    SensitivityPruning,
    SNIPPruning,
    WandaPruning,
)

CHANNELS = Channel()


def conv(before: int, after: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]


class CNN(LightningModule):
    """An ordinary network: three convolutions with batch norms, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*conv(1, 16), *conv(16, 32, 2), *conv(32, 64, 2))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


@cache
def digits() -> tuple[TensorDataset, tuple[Tensor, Tensor]]:
    images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    x, y = images.float().div(16).view(-1, 1, 8, 8), labels.long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return TensorDataset(x[order[:-500]], y[order[:-500]]), (x[order[-500:]], y[order[-500:]])


def train(model: CNN, epochs: int, *callbacks: Any) -> float:
    """Train, and return the accuracy in percent on held-out digits."""
    train, (images, labels) = digits()
    loader = DataLoader(train, 64, shuffle=True, generator=torch.Generator().manual_seed(0))
    Trainer(**{**QUIET, "max_epochs": epochs}, callbacks=list(callbacks)).fit(model.train(), loader)
    with torch.no_grad():
        return 100 * float((model.eval()(images).argmax(1) == labels).float().mean())


@cache
def dense() -> tuple[dict[str, Tensor], float]:
    torch.manual_seed(0)
    model = CNN()
    train(model, 5)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return weights, train(model, 5)


AS_THEY_COME: dict[str, Callable[[], Pruning]] = {
    "Pruning": lambda: Pruning(0.5),
    "Pruning, channels, FLOPs": lambda: Pruning(0.5, of="flops", granularity=CHANNELS, shrink_at_end=True),
    "Pruning, channels, 70 % of FLOPs": lambda: Pruning(0.7, of="flops", granularity=CHANNELS, shrink_at_end=True),
    "MagnitudePruning": lambda: MagnitudePruning(0.9),
    "MagnitudePruning, channels": lambda: MagnitudePruning(0.5, granularity=CHANNELS),
    "MovementPruning": lambda: MovementPruning(0.5),
    "WandaPruning": lambda: WandaPruning(0.5),
    "SNIPPruning": lambda: SNIPPruning(0.5),
    "RandomPruning": lambda: RandomPruning(0.5),
    "EntropyPruning": lambda: EntropyPruning(0.5),
    "EntropyPruning, low": lambda: EntropyPruning(0.5, prune="low"),
    "SensitivityPruning": lambda: SensitivityPruning(0.5),
}


@pytest.mark.parametrize("name", AS_THEY_COME)
def test_no_default_ends_far_below_dense(name: str) -> None:
    weights, accuracy = dense()
    model, callback = CNN(), AS_THEY_COME[name]()
    model.load_state_dict(weights)
    pruned = train(model, 5, callback)
    print(f"{name}: {pruned:.1f}, dense {accuracy:.1f}")
    assert pruned >= accuracy - 3
    assert callback.reached
