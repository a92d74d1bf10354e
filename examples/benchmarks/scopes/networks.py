"""The networks and the data of the comparison of scopes: small enough for a CPU core."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from fashion_mnist import read_fashion
from models import Inverted, Residual
from sklearn.datasets import load_digits
from torch import Tensor, nn


def conv(before: int, after: int, stride: int = 1) -> list[nn.Module]:
    """Return a convolution with a batch norm and a ReLU."""
    return [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]


def cnn() -> nn.Module:
    """Return three convolutions with batch norms and two linear layers: 28 thousand weights."""
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(*conv(1, 16), *conv(16, 32, 2), *conv(32, 64, 2), *head)


def resnet() -> nn.Module:
    """Return a stem, three residual blocks and a linear layer: 75 thousand weights."""
    blocks = [Residual(16, 16), Residual(16, 32), Residual(32, 64)]
    return nn.Sequential(*conv(1, 16), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mobilenet() -> nn.Module:
    """Return a stem, four inverted residual blocks and a linear layer, as in MobileNet-v2: 27 thousand weights."""
    shapes = [(16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 32, 2)]
    blocks = [Inverted(before, after, stride, 4) for before, after, stride in shapes]
    end = [nn.Conv2d(32, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*conv(1, 16), *blocks, *end, nn.Linear(64, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"CNN": cnn, "ResNet": resnet, "MobileNet": mobilenet}


class Data(NamedTuple):
    """Images and labels, and how long a network is trained on them."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    epochs: int
    fine_tuning: int


@cache
def digits() -> Data:
    """Return the 1,797 digits of scikit-learn, 8 x 8 pixels: 1,297 for training and 500 for testing."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(images).float().div(16).view(-1, 1, 8, 8)[order]
    y = torch.from_numpy(labels).long()[order]
    return Data((x[:-500], y[:-500]), (x[-500:], y[-500:]), 12, 4)


@cache
def fashion() -> Data:
    """Return 5,000 images of Fashion-MNIST for training and 2,000 for testing, averaged to 14 x 14 pixels."""
    return Data(_halved("train", 5000), _halved("t10k", 2000), 4, 2)


def _halved(part: str, count: int) -> tuple[Tensor, Tensor]:
    images, labels = (values[:count] for values in read_fashion(part))
    return nn.functional.avg_pool2d(images, 2), labels


DATA: dict[str, Callable[[], Data]] = {"digits": digits, "Fashion-MNIST": fashion}


def fit(model: nn.Module, data: Data, epochs: int, seed: int) -> None:
    """Train with Adam at a learning rate of 1e-3."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for part in torch.randperm(len(data.train[1]), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.train[0][part]), data.train[1][part]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Return the test accuracy in percent."""
    model.eval()
    hits = [(model(x).argmax(1) == y).sum() for x, y in zip(*(part.split(500) for part in data.test), strict=True)]
    return round(100 * float(sum(hits)) / len(data.test[1]), 2)
