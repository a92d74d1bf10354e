"""Prune LeNet-300-100 on 5,000 real digits with each strategy, fine-tune it, and compare: `python examples/demo.py`.

The same function prunes your own model; it only needs a metric logged in `validation_step`:

    from demo import prune_and_finetune
    from lightning_prune import MagnitudePruning
    result = prune_and_finetune(MyModel(), MyDataModule(), MagnitudePruning(0.9), epochs=10, metric="val_acc")
    print(result.dense, result.pruned, result.finetuned, result.sparsity)
"""

import argparse
import copy
import json
import logging
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from lightning_prune import (
    Channel,
    EntropyPruning,
    MagnitudePruning,
    Pruning,
    Random,
    RandomPruning,
    SensitivityPruning,
    Weight,
)

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


# --- The core: prune and fine-tune any model --------------------------------------------------------------------------


@dataclass
class Result:
    """What pruning and fine-tuning did to a model."""

    model: LightningModule  # the finished one
    dense: float  # the metric before pruning
    pruned: float  # right after the last mask update
    finetuned: float  # at the end of the run
    sparsity: float  # fraction of zeros among the targeted weights (or neurons), counted in the finished model
    zeros: int  # zeros among all weights, counted in the finished model
    seconds: float
    curve: list[tuple[int, float, float]]  # optimizer step, sparsity, metric


def prune_and_finetune(
    model: LightningModule,
    data: LightningDataModule,
    callback: Pruning,
    epochs: int,
    metric: str = "val_acc",
    **options: Any,
) -> Result:
    """Train a copy of `model` for some epochs while `callback` prunes it; `options` go to the Trainer."""
    model, watch = copy.deepcopy(model), Watch(callback, metric)
    dense = evaluate(model, data, metric)
    began = time.perf_counter()
    Trainer(max_epochs=epochs, callbacks=[callback, watch], **QUIET, **options).fit(model, datamodule=data)
    seconds = time.perf_counter() - began

    at_pruning = copy.deepcopy(model)
    at_pruning.load_state_dict(watch.weights)
    pruned, finetuned = evaluate(at_pruning, data, metric), evaluate(model, data, metric)
    curve = sorted([*watch.curve, (0, 0.0, dense), (watch.step, watch.sparsity, pruned)])
    return Result(model, dense, pruned, finetuned, *count(model, callback), seconds, curve)


def evaluate(model: LightningModule, data: LightningDataModule, metric: str) -> float:
    """Return what the model logs on the validation data."""
    return Trainer(**QUIET).validate(model, datamodule=data, verbose=False)[0][metric]


def count(model: LightningModule, callback: Pruning) -> tuple[float, int]:
    """Return the fraction of zeros among the units that the callback prunes, and the number of zero weights."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.ndim > 1}
    units = [weight == 0 for name, weight in weights.items() if name in callback.masks]
    if isinstance(callback.granularity, Channel):
        units = [zero.flatten(1).all(1) for zero in units]
    share = sum(int(zero.sum()) for zero in units) / sum(zero.numel() for zero in units)
    return share, sum(int((weight == 0).sum()) for weight in weights.values())


class Watch(Callback):
    """Records the weights right after the last mask update, and the metric of each validation."""

    def __init__(self, pruning: Pruning, metric: str) -> None:
        self.pruning, self.metric = pruning, metric
        self.sparsity, self.step, self.weights = -1.0, 0, dict[str, Tensor]()
        self.curve: list[tuple[int, float, float]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any = None, batch_idx: int = 0
    ) -> None:
        if self.sparsity != self.pruning.sparsity_now:  # `pruning` runs first: it is listed before this callback
            self.sparsity, self.step = self.pruning.sparsity_now, trainer.global_step
            self.weights = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_batch_start(trainer, pl_module)  # the last step may have made the last update

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            metric = trainer.callback_metrics[self.metric].item()
            self.curve.append((trainer.global_step, self.pruning.sparsity_now, metric))


# --- The experiment: every strategy on the same pretrained network ----------------------------------------------------


def strategies(seed: int) -> dict[str, Pruning]:
    """Return a new callback for each row of the table."""
    one_shot: dict[str, Any] = {"schedule": "one_shot", "start": 0}
    gradual: dict[str, Any] = {"schedule": "cubic", "start": 0, "end": 0.7}
    neurons: dict[str, Any] = {"scope": "local", "ignore": ("head.weight",), **one_shot}
    return {
        "Magnitude 95 %, one-shot": MagnitudePruning(0.95, **one_shot),
        "Magnitude 95 %, gradual": MagnitudePruning(0.95, **gradual),
        "Magnitude 98 %, one-shot": MagnitudePruning(0.98, **one_shot),
        "Magnitude 98 %, gradual": MagnitudePruning(0.98, **gradual),
        "Random 98 %, one-shot": Pruning(0.98, criterion=Random(seed=seed), granularity=Weight(), **one_shot),
        "Random neurons 50 %": RandomPruning(0.5, seed=seed, **neurons),
        "Sensitivity 50 %": SensitivityPruning(0.5, **neurons),
        "Entropy 50 %, low first": EntropyPruning(0.5, prune="low", **neurons),
        "Entropy 50 %, high first": EntropyPruning(0.5, prune="high", **neurons),
    }


def row(name: str, callback: Pruning, results: list[Result]) -> dict[str, Any]:
    """Return a row of the table: means over the seeds, accuracies in percent."""
    accuracies = {key: [100 * getattr(result, key) for result in results] for key in ("dense", "pruned", "finetuned")}
    return {
        "method": name,
        **{key: statistics.mean(each) for key, each in accuracies.items()},
        "finetuned_per_seed": accuracies["finetuned"],
        "requested": callback.sparsity,
        "unit": "neurons" if isinstance(callback.granularity, Channel) else "weights",
        "measured": statistics.mean(result.sparsity for result in results),
        "zeros": round(statistics.mean(result.zeros for result in results)),
        "seconds": statistics.mean(result.seconds for result in results),
    }


def tabulate(rows: list[dict[str, Any]], title: str) -> Table:
    """Return the rows as a table for the terminal."""
    note = "pruned: right after the last mask update; measured, zeros: in the finished weights"
    layout: dict[str, Any] = {"box": SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
    table = Table(title=title, caption=note, title_justify="left", caption_justify="left", **layout)
    for heading in ("method", "dense", "pruned", "tuned", "requested", "measured", "zeros", "s"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        accuracies = (f"{row[key]:.1f}" for key in ("dense", "pruned", "finetuned"))
        requested, measured = f"{row['requested']:.0%} {row['unit']}", f"{row['measured']:.2%}"
        table.add_row(row["method"], *accuracies, requested, measured, f"{row['zeros']:,}", f"{row['seconds']:.1f}")
    return table


def draw(results: dict[str, list[Result]], rows: list[dict[str, Any]], path: Path) -> None:
    """Plot one-shot and gradual pruning over the run, and every method before and after fine-tuning."""
    orange, blue, grey = "#D55E00", "#0072B2", "#666666"  # distinguishable with colour blindness and in greyscale
    dense = rows[0]["dense"]
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(2, 3), width_ratios=(6, 5))
    top, right = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[:, 1])
    bottom = figure.add_subplot(grid[1, 0], sharex=top)

    for name, colour, style in (("one-shot", orange, "--"), ("gradual", blue, "-")):
        curve = np.mean([result.curve for result in results[f"Magnitude 98 %, {name}"]], axis=0)
        for axes, column in ((top, 1), (bottom, 2)):
            axes.plot(curve[:, 0], 100 * curve[:, column], style, color=colour, label=name, linewidth=2)
    bottom.axhline(dense, color=grey, linestyle=":", label="dense")
    top.set(title="Magnitude pruning to 98 %, over the run", ylabel="zero weights (%)", ylim=(0, 103))
    bottom.set(xlabel="optimizer steps", ylabel="held-out accuracy (%)", ylim=(0, 100))
    bottom.legend(loc="lower right", frameon=False)
    top.tick_params(labelbottom=False)

    before, after = [row["pruned"] for row in rows], [row["finetuned"] for row in rows]
    places = range(len(rows), 0, -1)
    right.hlines(places, before, after, color=grey, linewidth=1, zorder=1)
    right.plot(before, places, "o", color=orange, markerfacecolor="white", markersize=9, label="right after pruning")
    right.plot(after, places, "o", color=blue, markersize=6, label="after fine-tuning")
    right.axvline(dense, color=grey, linestyle=":", zorder=0, label="dense")
    for accuracy, place in zip(after, places, strict=True):
        right.text(101, place, f"{accuracy:.1f}", color=blue, verticalalignment="center")
    right.set(title="Every method, before and after fine-tuning", xlabel="held-out accuracy (%)", xlim=(0, 100))
    right.set_yticks(places, [row["method"] for row in rows])
    right.legend(loc="lower left", frameon=False)

    for axes in (top, bottom, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x" if axes is right else "both", color="#dddddd", linewidth=0.6)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the experiment for each seed, print the table, draw the figure."""
    from mnist5k import LeNet, MNIST5k  # not at the top: your model needs neither

    parser = argparse.ArgumentParser(description="Prune LeNet-300-100 with each strategy and compare.")
    parser.add_argument("--quick", action="store_true", help="one seed and few epochs, as a smoke test")
    parser.add_argument("--seeds", type=int, default=2, help="number of networks to train and average over")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder for demo.png")
    parser.add_argument("--json", type=Path, help="also write the rows of the table to this file")
    args = parser.parse_args()
    logging.disable(logging.INFO)  # the plan of each run would bury the progress
    seeds, train_epochs, finetune_epochs = (range(1), 2, 2) if args.quick else (range(args.seeds), 20, 10)

    console = Console(width=None if sys.stdout.isatty() else 100)
    results: dict[str, list[Result]] = {name: [] for name in strategies(0)}
    columns = TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(seeds) * (1 + len(results)))

        def announce(work: str) -> None:
            progress.update(task, description=work)
            if not console.is_terminal:
                console.print(work)

        for seed in seeds:
            announce(f"seed {seed}: the dense network")
            seed_everything(seed, verbose=False)
            model, data = LeNet(), MNIST5k(seed=seed)
            Trainer(max_epochs=train_epochs, limit_val_batches=0, **QUIET).fit(model, datamodule=data)
            progress.advance(task)
            for name, callback in strategies(seed).items():
                announce(f"seed {seed}: {name}")
                result = prune_and_finetune(model, data, callback, finetune_epochs, val_check_interval=0.5)
                results[name].append(result)
                progress.advance(task)

    rows = [row(name, callback, results[name]) for name, callback in strategies(0).items()]
    runs = f"mean of {len(seeds)} runs" if len(seeds) > 1 else "one run"
    console.print(tabulate(rows, f"LeNet-300-100, accuracy in % on 1,000 held-out digits, {runs}"))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    args.output.mkdir(parents=True, exist_ok=True)
    draw(results, rows, args.output / "demo.png")
    console.print(f"Figure: {args.output / 'demo.png'}")


if __name__ == "__main__":
    main()
