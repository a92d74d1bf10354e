"""The Cubist Spiral, a four-layer MLP for it, and a training run, as in Zhang and Papyan (2024, arXiv:2407.04075)."""

import math
import time
from collections import OrderedDict
from functools import cache
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from tasks import QUIET, Batches
from torch import Tensor, nn

WIDTH, EPOCHS = 16, 50
CORNERS, GAP, SHARE = 17, 15.0, 25_000  # corners of an arm, its distance from the spiral between both, its points
DENSE = 2 * WIDTH + 2 * WIDTH * WIDTH + WIDTH  # weights, without biases
Widths, Row = tuple[int, ...], dict[str, Any]
RATE, RATE_BATCH = 0.05, 128  # a learning rate of the paper, and the batch that it is for


@cache
def points() -> tuple[Tensor, Tensor]:
    """Return the points (n x 2, standardised) and labels (n x 1) of two arms, straight between their corners.

    >>> points()[0].shape
    torch.Size([49982, 2])
    """
    arms = [arm(GAP), arm(-GAP)]
    x = torch.cat(arms)
    labels = torch.cat([torch.full((len(found), 1), float(label)) for label, found in enumerate(arms)])
    return ((x - x.mean(0)) / x.std(0)).float(), labels


def arm(offset: float) -> Tensor:
    """Return evenly spaced points on one arm: two turns through corners an eighth of a turn apart."""
    angle = torch.linspace(math.pi, 5 * math.pi, CORNERS, dtype=torch.float64) + 0.4 * math.pi
    radius = 10 * angle + math.pi + offset
    corners = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    begin, end = corners[:-1], corners[1:]
    length = (end - begin).norm(dim=1)
    counts = (length / length.sum() * SHARE).int().tolist()
    return torch.cat([end[i].lerp(begin[i], torch.linspace(0, 1, n).double()[:, None]) for i, n in enumerate(counts)])


def network(widths: Widths) -> nn.Sequential:
    """Return three hidden layers with ReLUs, and one logit."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = 2
    for number, width in enumerate(widths, 1):
        layers[f"hidden{number}"], layers[f"relu{number}"] = nn.Linear(inputs, width), nn.ReLU()
        inputs = width
    layers["head"] = nn.Linear(inputs, 1)
    return nn.Sequential(layers)


class Spiral(LightningModule):
    """A network with binary cross-entropy, SGD, and a learning rate that decays to zero along a cosine, every epoch."""

    def __init__(self, network: nn.Module, rate: float) -> None:
        super().__init__()
        self.network, self.rate = network, rate

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss of a batch."""
        return nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """Return what the paper's code trains with."""
        optimizer = torch.optim.SGD(self.parameters(), self.rate, momentum=0.9, weight_decay=5e-4)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


def fit(seed: int, batch: int, callback: Callback | None, widths: Widths = 3 * (WIDTH,), trainings: int = 1) -> Row:
    """Train a network, and return its accuracy in percent, its weights that are not zero, and those on a path."""
    seed_everything(seed, verbose=False)
    rate = RATE * math.sqrt(batch / RATE_BATCH)
    model, began = Spiral(network(widths), rate), time.process_time()
    trainer = Trainer(max_epochs=EPOCHS * trainings, callbacks=callback and [callback], **QUIET)
    trainer.fit(model, Batches(*points(), batch, seed))
    weights = [layer.weight.detach() for layer in model.network if isinstance(layer, nn.Linear)]
    return {
        "accuracy": round(accuracy(model.network), 2),
        "left": sum(int(weight.count_nonzero()) for weight in weights),
        **connected(weights),
        "seconds": round(time.process_time() - began, 1),
    }


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Return the accuracy on all points in percent; the paper, too, tests on what it trains on."""
    x, y = points()
    return 100 * float(((model(x) > 0).float() == y).float().mean())


def connected(weights: list[Tensor]) -> dict[str, int]:
    """Return how many weights lie on a path from an input to the output, and the same with biases.

    >>> weights = [torch.tensor([[1.0], [1.0], [0.0]]), torch.tensor([[1.0, 0.0, 1.0]])]
    >>> connected(weights)  # the second neuron leads nowhere, and nothing leads to the third
    {'connected': 2, 'with_biases': 4}
    """
    used = on_paths(weights)
    neurons = sum(int(mask.any(1).sum()) for mask in used)
    number = sum(int(mask.sum()) for mask in used)
    return {"connected": number, "with_biases": number + neurons}


def on_paths(weights: list[Tensor]) -> list[Tensor]:
    """Return which weights lie on a path from an input to an output."""
    kept = [weight != 0 for weight in weights]
    reached = [torch.ones(kept[0].shape[1], dtype=torch.bool)]
    for mask in kept:
        reached.append((mask & reached[-1]).any(1))
    leads, used = torch.ones(len(kept[-1]), dtype=torch.bool), list[Tensor]()
    for mask, source in zip(reversed(kept), reversed(reached[:-1]), strict=True):
        used.append(mask & source & leads[:, None])
        leads = (mask & leads[:, None]).any(0)
    return used[::-1]
