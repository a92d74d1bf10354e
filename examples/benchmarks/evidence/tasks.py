"""The tasks: a network, its data, optimizer and training budget, small enough for a CPU."""

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from math import cos, pi
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
from fashion_mnist import read_fashion
from mnist5k import MNIST5k

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def lenet() -> nn.Module:
    """Return LeNet-300-100: 266,200 weights."""
    sizes = {"hidden1": (784, 300), "hidden2": (300, 100), "head": (100, 10)}
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for name, (inputs, outputs) in sizes.items():
        layers[name] = nn.Linear(inputs, outputs)
        if name != "head":
            layers[f"{name}_relu"] = nn.ReLU()
    return nn.Sequential(layers)


def small_cnn(width: int = 16) -> nn.Module:
    """Return five convolutions with batch norms and a linear head: 70 thousand weights."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = 1
    for i, (outputs, stride) in enumerate(zip((1, 2, 2, 4, 4), (1, 2, 1, 2, 1), strict=True)):
        layers[f"conv{i}"] = nn.Conv2d(inputs, outputs * width, 3, stride, padding=1, bias=False)
        layers[f"norm{i}"], layers[f"relu{i}"] = nn.BatchNorm2d(outputs * width), nn.ReLU()
        inputs = outputs * width
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "head": nn.Linear(inputs, 10)}
    return nn.Sequential(layers)


class Batches:
    """Batches cut from whole tensors, reshuffled every epoch: faster than a DataLoader of single images."""

    def __init__(self, images: Tensor, labels: Tensor, size: int, seed: int | None) -> None:
        self.images, self.labels, self.size = images, labels, size
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.labels) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        number = len(self.labels)
        order = torch.arange(number) if self.generator is None else torch.randperm(number, generator=self.generator)
        for part in order.split(self.size):
            yield self.images[part], self.labels[part]


class FashionMNIST(LightningDataModule):
    """60,000 images of clothes for training and 10,000 for testing (Xiao et al., 2017, arXiv:1708.07747)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def train_dataloader(self) -> Batches:
        return Batches(*read_fashion("train"), 128, self.seed)

    def val_dataloader(self) -> Batches:
        return Batches(*read_fashion("t10k"), 1000, None)


class Classifier(LightningModule):
    """A network with cross-entropy and an optimizer.

    Args:
        network: Maps images to ten logits.
        optimizer: Makes an optimizer from parameters.
        rate: Maps progress through a training, 0 to 1 and beyond, to a factor of the learning rate.
        trainings: How many trainings a run is divided into.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer],
        rate: Callable[[float], float],
        trainings: int = 1,
    ) -> None:
        super().__init__()
        self.network, self.optimizer, self.rate, self.trainings = network, optimizer, rate, trainings

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        length = self.trainer.estimated_stepping_batches / self.trainings
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.rate(step / length))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def cosine(progress: float) -> float:
    """Return a factor of the learning rate that decays to zero."""
    return (1 + cos(pi * progress)) / 2


def steps(progress: float) -> float:
    """Return a factor of the learning rate that falls to a hundredth in two steps and stays there."""
    return 1.0 if progress < 0.6 else 0.1 if progress < 0.85 else 0.01


def constant(progress: float) -> float:
    """Return a constant factor of the learning rate."""
    return 1.0


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-4)
ADAM = partial(torch.optim.Adam, lr=1e-3)


@dataclass(frozen=True)
class Task:
    """A network to train and prune for some epochs.

    Args:
        title: For tables and plots.
        data: Makes the training and test data from a seed.
        network: Makes a new network.
        epochs: The budget of a run.
        optimizer: Makes an optimizer from parameters.
        rate: The learning-rate schedule; see ``Classifier``.
        trainings: How many trainings a run is divided into.
        before: What the network is pretrained on (data and epochs); None trains from scratch.
    """

    title: str
    data: Callable[[int], LightningDataModule]
    network: Callable[[], nn.Module]
    epochs: int
    optimizer: Callable[..., torch.optim.Optimizer] = SGD
    rate: Callable[[float], float] = cosine
    trainings: int = 1
    before: tuple[Callable[[int], LightningDataModule], int] | None = None

    def model(self, seed: int) -> Classifier:
        """Return a model to train, pretrained if the task says so."""
        if self.before is not None:
            return copy.deepcopy(pretrained(self, seed))
        seed_everything(seed, verbose=False)
        return Classifier(self.network(), self.optimizer, self.rate, self.trainings)


@cache
def pretrained(task: Task, seed: int) -> Classifier:
    """Return the pretrained network of a task; copy it before use, since it is cached."""
    assert task.before is not None
    seed_everything(seed, verbose=False)
    data, epochs = task.before
    model = Classifier(task.network(), task.optimizer, task.rate)
    Trainer(max_epochs=epochs, limit_val_batches=0, **QUIET).fit(model, datamodule=data(seed))
    return Classifier(model.network, task.optimizer, task.rate)  # not attached to a Trainer


class Digits(MNIST5k):
    """The digits that all examples use, in batches cut from whole tensors."""

    def train_dataloader(self) -> Batches:
        return Batches(*self.train.tensors, self.batch_size, self.seed)


def mnist(seed: int, digits: range = range(10)) -> LightningDataModule:
    """Return the digits, shuffled by the seed."""
    return Digits(seed=seed, digits=digits)


TASKS = {
    "mnist": Task("MNIST-5k, LeNet-300-100, 20 epochs from scratch", mnist, lenet, 20),
    "rounds": Task("MNIST-5k, LeNet-300-100, 6 x 5 epochs", mnist, lenet, 30, rate=steps, trainings=6),
    "transfer": Task(
        "MNIST-5k, LeNet-300-100, from digits 0-4 to 5-9, 20 epochs",
        partial(mnist, digits=range(5, 10)),
        lenet,
        20,
        ADAM,
        constant,
        before=(partial(mnist, digits=range(5)), 10),
    ),
    "fashion-10": Task("Fashion-MNIST, LeNet-300-100, 10 epochs from scratch", FashionMNIST, lenet, 10),
    "fashion": Task(
        "Fashion-MNIST, LeNet-300-100, 3 epochs dense, then 1 pruned",
        FashionMNIST,
        lenet,
        1,
        ADAM,
        constant,
        before=(FashionMNIST, 3),
    ),
    "cnn": Task(
        "Fashion-MNIST, CNN of 70 k weights, 3 epochs dense, then 1 pruned",
        FashionMNIST,
        small_cnn,
        1,
        ADAM,
        constant,
        before=(FashionMNIST, 3),
    ),
}
