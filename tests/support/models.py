"""Tiny LightningModules with their own deterministic data, and a quiet Trainer: what every test trains."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BATCHES = 4  # training batches an epoch
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 2,
    "limit_val_batches": 1,  # a fourth of what validation takes, a third of the time of a run
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
}


class Tiny(LightningModule):
    """A classifier of 8 x 4 fixed samples. The same seed gives the same weights, and no global generator is touched."""

    size: tuple[int, ...] = (6,)
    logs_loss = False

    def __init__(
        self,
        lr: float = 0.1,
        optimizer: Literal["sgd", "adam", "lbfgs"] = "sgd",
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.lr = lr
        self.optimizer = optimizer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = self.build(dropout)

    def build(self, dropout: float) -> nn.Sequential:
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        if self.trainer.loggers or self.logs_loss:  # which takes an eighth of a short run
            self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return torch.optim.AdamW(self.parameters(), self.lr / 10)
        if self.optimizer == "lbfgs":
            return torch.optim.LBFGS(self.parameters(), self.lr, max_iter=3)
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=1e-3)

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(7)
        inputs = torch.randn(8 * BATCHES, *self.size, generator=generator)
        labels = inputs.flatten(1)[:, :3].argmax(1)
        return DataLoader(TensorDataset(inputs, labels), batch_size=8)

    def val_dataloader(self) -> DataLoader:
        return self.train_dataloader()


class MLP(Tiny):
    """Linear layers of 48, 80 and 30 weights, a batch norm behind the first."""

    def build(self, dropout: float) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(6, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(8, 10),
            nn.ReLU(),
            nn.Linear(10, 3),
        )


class ConvNet(Tiny):
    """Convolutions of 108 (no bias) and 216 weights, each with a batch norm behind it, and a linear layer of 48."""

    size = (2, 6, 6)

    def build(self, dropout: float) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(2, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(16, 3),
        )


class Attention(nn.Module):
    """Self-attention with a linear layer for each of queries, keys and values, as its users write it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GroupedAttention(nn.Module):
    """Self-attention whose queries share keys and values, as its users write it."""

    def __init__(self, width: int, queries: int, keys: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.size = queries, keys, width // queries
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = (nn.Linear(width, keys * self.size) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (shared.repeat_interleave(self.num_heads // self.num_kv_heads, 1) for shared in (k, v))
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Attending(Tiny):
    """Two attentions of 6 and 2 heads over sequences of 3 tokens, and a linear layer."""

    size = (3, 12)

    def build(self, dropout: float) -> nn.Sequential:
        return nn.Sequential(Attention(12, 6), nn.Tanh(), Attention(12, 2), nn.Flatten(), nn.Linear(36, 3))


class Residual(nn.Module):
    """A layer of a transformer with norms inside its branches."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.second, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


class Deep(Tiny):
    """Six residual blocks over sequences of 3 tokens, between two linear layers."""

    size = (3, 8)

    def build(self, dropout: float) -> nn.Sequential:
        blocks = nn.Sequential(*(Residual(8, 2) for _ in range(6)))
        return nn.Sequential(
            nn.Linear(8, 8), nn.Dropout(dropout), blocks, nn.LayerNorm(8), nn.Flatten(), nn.Linear(24, 3)
        )


class Mean(nn.Module):
    """The mean over the positions of a sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Narrow(Tiny):
    """Two residual blocks over sequences of 3 tokens, whose mean is classified."""

    size = (3, 8)

    def build(self, dropout: float) -> nn.Sequential:
        blocks = (Residual(8, 2) for _ in range(2))
        return nn.Sequential(nn.Linear(8, 8), nn.Dropout(dropout), *blocks, nn.LayerNorm(8), Mean(), nn.Linear(8, 3))

    @property
    def example(self) -> Tensor:
        """A batch of inputs."""
        return next(iter(self.train_dataloader()))[0]


class TwoOptimizers(MLP):
    """Manual optimization: one optimizer for the first layers, one for the last, both stepped in every batch."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.log("loss", loss)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        layers = list(self.net)
        first, last = nn.ModuleList(layers[:4]), nn.ModuleList(layers[4:])
        return [torch.optim.Adam(first.parameters(), 0.01), torch.optim.SGD(last.parameters(), 0.1, momentum=0.9)]


def fit(model: LightningModule, *callbacks: Callback, ckpt_path: str | None = None, **trainer_kwargs: Any) -> Trainer:
    """Fit on the CPU without logger, checkpoints, progress bar or summary, unless the arguments say otherwise."""
    trainer = Trainer(**{**QUIET, **trainer_kwargs}, callbacks=list(callbacks))
    trainer.fit(model, ckpt_path=ckpt_path)
    return trainer


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the parameters that are pruned by default: those with two or more dimensions."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim >= 2}


def zeros(model: nn.Module) -> int:
    """Count the zeros among the weights."""
    return sum(int((weight == 0).sum()) for weight in weights(model).values())


def size(model: nn.Module) -> int:
    """Count the weights."""
    return sum(weight.numel() for weight in weights(model).values())


class MaskRecorder(Callback):
    """Copies the masks of a pruning callback at the start of every training batch, and once more at the end."""

    def __init__(self, pruning: Any) -> None:
        self.pruning = pruning
        self.masks: list[dict[str, Tensor]] = []

    def record(self) -> None:
        self.masks.append({name: mask.clone() for name, mask in self.pruning.masks.items()})

    def on_train_batch_start(self, *args: Any) -> None:
        self.record()

    def on_train_end(self, *args: Any) -> None:
        self.record()

    @property
    def counts(self) -> list[int]:
        """The number of pruned weights at the start of each batch, and at the end."""
        return [sum(int((~m).sum()) for m in masks.values() if m.ndim >= 2) for masks in self.masks]

    @property
    def changes(self) -> list[int]:
        """The batches before which the number of pruned weights changed; the end counts as one more batch."""
        counts = [0, *self.counts]
        return [batch for batch, (old, new) in enumerate(pairwise(counts)) if old != new]


class On(Callback):
    """Calls functions at hooks: ``On(on_train_end=function)``."""

    def __init__(self, **functions: Callable[..., Any]) -> None:
        for hook, function in functions.items():
            assert hasattr(Callback, hook), f"Lightning has no hook {hook}"
            setattr(self, hook, function)


def agrees(model: nn.Module, masks: Mapping[str, Tensor]) -> bool:
    """Whether every pruned entry is zero."""
    parameters = dict(model.named_parameters())
    return all(not parameters[name][~mask].any() for name, mask in masks.items())
