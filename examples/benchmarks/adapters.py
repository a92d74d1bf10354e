"""What is left to train after one-shot pruning: all weights, biases alone, or adapters with and without masks.

`python examples/benchmarks/adapters.py`, 90 seconds on an idle core. LeNet-300-100 learns MNIST-5k, loses 90 or 98 % of
its weights in one shot by magnitude, and is trained for five epochs more in one of four ways, at two learning rates.
"""

import copy
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer, seed_everything
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))
from mnist5k import LeNet, MNIST5k

from lightning_prune import ConstantSparsity, MaskedAdapters, Masks, prune, sparsity

SEEDS, SPARSITIES, RATES = (0, 1, 2), (0.9, 0.98), (1e-3, 5e-3)
LAYERS = ("hidden1", "hidden2", "head")
RANK = 16
QUIET: dict[str, Any] = {
    **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False},
    **{"accelerator": "cpu", "limit_val_batches": 0},
}


class LowRank(nn.Module):
    """A frozen layer and a correction of low rank that knows no masks: LoRA."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        layer.weight.requires_grad_(False)
        rank = min(RANK, layer.out_features)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) + 2 * self.up(self.down(inputs))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        self.layer.weight += 2 * self.up.weight @ self.down.weight
        return self.layer


def fit(model: LeNet, data: MNIST5k, epochs: int, *callbacks: Any) -> int:
    """Train, and return how many numbers the optimizer has stepped."""
    trainer = Trainer(max_epochs=epochs, callbacks=list(callbacks), **QUIET)
    trainer.fit(model, datamodule=data)
    return sum(parameter.numel() for parameter in trainer.optimizers[0].state)


def masked_afterwards(model: LeNet, data: MNIST5k, epochs: int, masks: Masks) -> int:
    """Train adapters that know no masks, merge them, and apply the masks again."""
    for name in LAYERS:
        setattr(model, name, LowRank(getattr(model, name)))
    trained = fit(model, data, epochs)
    for name in LAYERS:
        setattr(model, name, getattr(model, name).merged())
    masks.apply(model)
    return trained


WAYS: dict[str, Callable[[LeNet, MNIST5k, int, Masks], int]] = {
    "all that is not zero": lambda model, data, epochs, masks: fit(model, data, epochs, ConstantSparsity()),
    "biases": lambda model, data, epochs, masks: fit(model, data, epochs, MaskedAdapters(0)),
    "biases, masked adapters": lambda model, data, epochs, masks: fit(model, data, epochs, MaskedAdapters(RANK)),
    "biases, adapters, masked at the end": masked_afterwards,
}


@torch.no_grad()
def accuracy(model: LeNet, data: MNIST5k) -> float:
    images, labels = data.test.tensors
    return float((model(images).argmax(1) == labels).float().mean())


def trained_dense(seed: int, data: MNIST5k) -> LeNet:
    seed_everything(seed, verbose=False)
    model = LeNet()
    fit(model, data, 10)
    return model


def main() -> None:
    """Print a row for each sparsity and way: accuracy for each learning rate, and what is trained."""
    data = {seed: MNIST5k(seed=seed) for seed in SEEDS}
    dense = {seed: trained_dense(seed, data[seed]) for seed in SEEDS}
    print(f"dense: {statistics.mean(accuracy(dense[seed], data[seed]) for seed in SEEDS):.1%}")
    print(f"{'':46}" + "".join(f"{f'rate {rate:g}':>16}" for rate in RATES) + f"{'trained':>10}")
    for amount in SPARSITIES:
        for name, way in {"nothing": None, **WAYS}.items():
            cells, trained = [], 0
            for rate in RATES:
                found = []
                for seed in SEEDS:
                    model = copy.deepcopy(dense[seed])
                    model.learning_rate = rate
                    masks = prune(model, amount)
                    seed_everything(seed, verbose=False)
                    trained = way(model, data[seed], 5, masks) if way else 0
                    assert abs(sparsity(model) - amount) < 1e-4
                    found.append(accuracy(model, data[seed]))
                cells.append(f"{statistics.mean(found):.1%} ± {100 * statistics.stdev(found):.1f}")
            row = f"{f'{amount:.0%}: {name}':46}" + "".join(f"{cell:>16}" for cell in cells)
            print(f"{row}{trained:>10,}", flush=True)


if __name__ == "__main__":
    main()
