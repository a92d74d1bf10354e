"""The models of the benchmarks: an MLP, networks like ResNet-18 and MobileNet-v2, a small transformer."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention


class Residual(nn.Module):
    """Two convolutions and a skip connection, as in ResNet-18."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.skip = nn.Identity() if before == after else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (inner + self.skip(x)).relu()


def cnn() -> nn.Module:
    """Return a network the size of ResNet-18: 11.3 M weights in 20 convolutions and a linear layer."""
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    stem = [nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    blocks = [Residual(before, after) for before, after in itertools.pairwise(widths)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 200))


class Inverted(nn.Module):
    """An expanding, a depthwise and a projecting convolution, and a skip connection, as in MobileNet-v2."""

    def __init__(self, before: int, after: int, stride: int, times: int) -> None:
        super().__init__()
        inner, self.adds = before * times, before == after and stride == 1
        self.widen, self.norm1 = nn.Conv2d(before, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.narrow, self.norm3 = nn.Conv2d(inner, after, 1, bias=False), nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.depthwise(self.norm1(self.widen(x)).clamp(0, 6))).clamp(0, 6)
        narrow = self.norm3(self.narrow(inner))
        return x + narrow if self.adds else narrow


def mobilenet() -> nn.Module:
    """Return a network like MobileNet-v2: 2.5 M weights, most of them in 1 x 1 convolutions."""
    stages = [(16, 1, 1, 1), (24, 2, 2, 6), (32, 3, 2, 6), (64, 4, 2, 6), (96, 3, 1, 6), (160, 3, 2, 6), (320, 1, 1, 6)]
    blocks: list[nn.Module] = []
    before = 32
    for after, count, stride, times in stages:
        for place in range(count):
            blocks.append(Inverted(before, after, 1 if place else stride, times))
            before = after
    stem = [nn.Conv2d(3, 32, 3, 2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
    end = [nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*stem, *blocks, *end, nn.Linear(1280, 200))


def mlp(width: int = 2048) -> nn.Module:
    """Return an MLP of three layers: by default 5.8 M weights."""
    return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


class Block(nn.Module):
    """One layer of a causal transformer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A language model of four layers: 3.4 M weights and an embedding."""

    def __init__(self, words: int = 1000, width: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.blocks = nn.Sequential(*[Block(width, 4) for _ in range(4)])
        self.head = nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(tokens)))


@dataclass(frozen=True)
class Task:
    """A model with a batch to train it on; the data are random, since only the time matters."""

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    labels: Callable[[], Tensor]

    def batch(self) -> tuple[Tensor, Tensor]:
        return self.inputs(), self.labels()

    @staticmethod
    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(outputs.flatten(0, -2), labels.flatten())


MODELS = {
    task.name: task
    for task in (
        Task("mlp", mlp, lambda: torch.randn(64, 784), lambda: torch.randint(10, (64,))),
        Task("cnn", cnn, lambda: torch.randn(16, 3, 64, 64), lambda: torch.randint(200, (16,))),
        Task(
            "transformer",
            Transformer,
            lambda: torch.randint(1000, (8, 64)),
            lambda: torch.randint(1000, (8, 64)),
        ),
    )
}


class Module(LightningModule):
    """A typical LightningModule: it logs the loss and uses fused AdamW."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model, self.loss = task.model(), task.loss

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        loss = self.loss(self.model(inputs), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)
