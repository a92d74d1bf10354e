"""Runs of which files that an earlier version wrote are kept in ``tests/data``, told in what both versions know."""

import lzma
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_prune import (
    ACDC,
    SET,
    SRSTE,
    Channel,
    ConstantSparsity,
    Distillation,
    Entropy,
    GuardedPruning,
    LotteryTicket,
    MagnitudePruning,
    Movement,
    Pruning,
    PruningAtInit,
    PruningReport,
    RigL,
    Sensitivity,
    Wanda,
    prune,
    sparsity,
)

DATA = Path(__file__).parents[1] / "data"
BATCHES, BATCH, EPOCHS = 4, 4, 4
# updates at the steps 3, 6, 9 and 12 of 16, each after a window of three steps
GRADUAL: dict[str, Any] = {"schedule": "linear", "start": 0, "end": 12, "frequency": 3}
WHERE = 5  # steps: two of three into a window, and inside an epoch
KEPT = {"LotteryTicket": 10, "GuardedPruning": 10, "ACDC": 6}

RUNS: dict[str, Callable[[], list[Callback]]] = {
    "Magnitude": lambda: [MagnitudePruning(0.6, **GRADUAL)],
    "Wanda": lambda: [Pruning(0.6, Wanda(window=3), scope="local", **GRADUAL)],
    "Entropy": lambda: [Pruning(0.6, Entropy(bins=8, window=3), Channel(), **GRADUAL)],
    "Movement": lambda: [Pruning(0.6, Movement(window=3), **GRADUAL)],
    "Sensitivity": lambda: [Pruning(0.6, Sensitivity(window=3), Channel(coupled=True), **GRADUAL)],
    "SET": lambda: [SET(0.6, frequency=3)],
    "RigL": lambda: [RigL(0.6, frequency=3, window=2)],
    "ACDC": lambda: [ACDC(0.6, start=1, end=12, frequency=3)],
    "SRSTE": lambda: [SRSTE(2, 4)],
    "LotteryTicket": lambda: [LotteryTicket(0.6, rounds=3, rewind_to=1, frequency=4, interval="step")],
    "GuardedPruning": lambda: [GuardedPruning("score", max_drop=0.01, patience=1, precision=0.1)],
    "PruningAtInit": lambda: [PruningAtInit(0.6)],
    "ConstantSparsity": lambda: [ConstantSparsity()],
    "Distillation": lambda: [MagnitudePruning(0.6, **GRADUAL), Distillation(weight=0.5)],
    "PruningReport": lambda: [MagnitudePruning(0.6, **GRADUAL), PruningReport("report.html")],
}


class Batches:
    """Batches from a place that is saved, so that a run resumes inside an epoch."""

    def __init__(self, size: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(7)
        self.inputs = torch.randn(BATCHES, BATCH, *size, generator=generator)
        self.labels = self.inputs.flatten(2)[..., :3].argmax(-1)
        self.place = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[list[Tensor]]:
        self.place %= BATCHES
        while self.place < BATCHES:
            self.place += 1
            yield [self.inputs[self.place - 1], self.labels[self.place - 1]]

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.place = state_dict["place"]


class Model(LightningModule):
    """A classifier with the same weights each time it is made."""

    size: tuple[int, ...] = (6,)

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = self.build()

    def build(self) -> nn.Sequential:
        hidden = [nn.Linear(8, 8), nn.ReLU()]
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), *hidden, nn.Linear(8, 4))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("score", 0.9 - max(0.0, sparsity(self) - 0.55))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    def train_dataloader(self) -> Batches:
        return Batches(self.size)

    def val_dataloader(self) -> Batches:
        return Batches(self.size)


class ConvNet(Model):
    """Two convolutions, of which channels can be cut out."""

    size = (2, 6, 6)

    def build(self) -> nn.Sequential:
        first = [nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
        return nn.Sequential(*first, nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))


class Save(Callback):
    """Saves a checkpoint after a step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def run(name: str, *others: Callback, ckpt_path: Path | None = None) -> tuple[Model, Any, Trainer]:
    """Train under a name of ``RUNS``, and return the model, what prunes it, and the trainer."""
    model = Model()
    if name == "ConstantSparsity":
        prune(model, 0.6)
    callbacks = RUNS[name]()
    trainer = fit(
        model, *callbacks, *others, ckpt_path=ckpt_path, max_epochs=30 if name == "GuardedPruning" else EPOCHS
    )
    return model, callbacks[0], trainer


def fit(model: Model, *callbacks: Callback, ckpt_path: Path | None = None, max_epochs: int = EPOCHS) -> Trainer:
    torch.manual_seed(0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    more = {"enable_model_summary": False, "num_sanity_val_steps": 0, "accelerator": "cpu", "devices": 1}
    trainer = Trainer(**quiet, **more, log_every_n_steps=1, max_epochs=max_epochs, callbacks=list(callbacks))
    trainer.fit(model, ckpt_path=None if ckpt_path is None else str(ckpt_path))
    return trainer


def end(model: nn.Module, callback: Any) -> dict[str, dict[str, Tensor]]:
    """Return all that a run ends with."""
    return {"weights": dict(model.state_dict()), "masks": dict(callback.masks)}


shrunk: Callable[..., Pruning] = partial(
    Pruning, 0.5, granularity=Channel(), schedule="one_shot", start=1, shrink_at_end=True
)


def probe(size: tuple[int, ...]) -> Tensor:
    """Return inputs of which outputs are compared."""
    return torch.linspace(-1, 1, 3 * torch.Size(size).numel()).view(3, *size)


def pack(path: Path, to: Path) -> None:
    """Keep a file, compressed."""
    to.write_bytes(lzma.compress(path.read_bytes(), preset=9 | lzma.PRESET_EXTREME))


def unpack(name: str, folder: Path) -> Path:
    """Return the path of a file that was kept, in a folder."""
    path = folder / name
    path.write_bytes(lzma.decompress((DATA / f"{name}.xz").read_bytes()))
    return path


def load(name: str) -> Any:
    """Return tensors that were kept."""
    return torch.load(BytesIO(lzma.decompress((DATA / f"{name}.xz").read_bytes())), weights_only=True)
