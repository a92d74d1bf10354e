"""Does a group lasso before one-shot channel pruning pay? `python examples/benchmarks/group_lasso.py [--seeds 5]`.

A small CNN and a small ResNet are trained on the digits of scikit-learn, with and without penalties on their coupled
channels, pruned once by magnitude, shrunk and fine-tuned. Runs of one seed have the same initial weights and the same
batches. Finished runs are not repeated: delete results/group_lasso.jsonl to start over.
"""

import argparse
import copy
import itertools
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "scopes"))
from marked import replace, spread, table
from networks import NETWORKS, Data, accuracy, digits

from lightning_prune import Channel, GroupLasso, prune, shrink

RESULTS = Path(__file__).parent / "results" / "group_lasso.jsonl"
PAGE = Path(__file__).parents[2] / "docs" / "strategies" / "group_lasso.md"
LEVELS = (0.5, 0.7)
EPOCHS, FINE_TUNING = 12, 4
VARIANTS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "lasso, 1e-2": {"strength": 1e-2},
    "lasso, 3e-3, growth 4": {"strength": 3e-3, "growth": 4.0},
    "lasso, 1e-2, growth 4": {"strength": 1e-2, "growth": 4.0},
    "lasso, 1e-2, growth 4, linear": {"strength": 1e-2, "growth": 4.0, "schedule": "linear"},
    "proximal, 1e-1, growth 4": {"strength": 1e-1, "growth": 4.0, "proximal": True},
    "squared, 1e-3, growth 4 (DepGraph)": {"strength": 1e-3, "growth": 4.0, "squared": True},
}


class Batches:
    """Shuffled batches of 64 images."""

    def __init__(self, data: Data, seed: int) -> None:
        self.data, self.generator = data, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.data.train[1]) // 64)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for part in torch.randperm(len(self.data.train[1]), generator=self.generator).split(64):
            yield self.data.train[0][part], self.data.train[1][part]


class Classifier(LightningModule):
    """A network, trained with cross-entropy and SGD."""

    def __init__(self, network: nn.Module, lr: float) -> None:
        super().__init__()
        self.network, self.lr = network, lr
        self.example_input_array = torch.zeros(8, 1, 8, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=1e-4)


def train(network: nn.Module, data: Data, seed: int, epochs: int, lr: float, *callbacks: Callback) -> None:
    """Train a network in place."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks), enable_model_summary=False, **quiet
    )
    trainer.fit(Classifier(network, lr), Batches(data, seed))


def run(network: str, variant: str, seed: int, levels: list[float]) -> Iterator[dict[str, Any]]:
    """Yield the accuracies of one training: dense, right after pruning, and fine-tuned."""
    torch.manual_seed(seed)
    data, dense, given = digits(), NETWORKS[network](), VARIANTS[variant]
    start = time.process_time()
    train(
        dense,
        data,
        seed,
        EPOCHS,
        0.05,
        *([] if given is None else [GroupLasso(granularity=Channel(coupled=True), **given)]),
    )
    seconds = round(time.process_time() - start, 1)
    example, before = data.train[0][:8], accuracy(dense, data)
    for level in levels:
        model = copy.deepcopy(dense)
        prune(model, level, granularity=Channel(coupled=True), example_inputs=example)
        model = shrink(model, example)
        row = {"network": network, "variant": variant, "seed": seed, "level": level, "seconds": seconds}
        pruned = accuracy(model, data)
        train(model, data, seed, FINE_TUNING, 0.01)
        yield {**row, "dense": before, "pruned": pruned, "tuned": accuracy(model, data)}


def make_table(rows: list[dict[str, Any]]) -> str:
    """Return all accuracies, and the differences to the runs of the same seeds without a penalty."""
    lines = []
    for network, level, variant in itertools.product(NETWORKS, LEVELS, VARIANTS):
        own = {r["seed"]: r for r in rows if (r["network"], r["level"], r["variant"]) == (network, level, variant)}
        plain = {r["seed"]: r for r in rows if (r["network"], r["level"], r["variant"]) == (network, level, "none")}
        if len(own) < 2:
            continue
        cells = [spread([row[name] for row in own.values()]) for name in ("dense", "pruned", "tuned")]
        gains = [own[seed]["tuned"] - plain[seed]["tuned"] for seed in own if seed in plain]
        gain = "" if variant == "none" else f"{mean(gains):+.1f} ± {stdev(gains):.1f}"
        lines.append([f"{network}, {level:.0%}", variant, str(len(own)), *cells, gain])
    return table(["channels", "penalty", "seeds", "dense", "pruned", "fine-tuned", "to none, paired"], lines)


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description="Compare penalties before one-shot channel pruning.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--networks", nargs="+", default=["CNN", "ResNet"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--tables", action="store_true", help="run nothing, only write the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    done = {(row["network"], row["variant"], row["seed"], row["level"]) for row in rows}
    grid = itertools.product(range(args.seeds), args.networks, args.variants)
    for seed, network, variant in () if args.tables else grid:
        missing = [level for level in LEVELS if (network, variant, seed, level) not in done]
        for row in run(network, variant, seed, missing) if missing else ():
            rows.append(row)
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
    replace(PAGE, "group-lasso", make_table(rows))


if __name__ == "__main__":
    main()
