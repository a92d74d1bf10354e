"""What masks add to a checkpoint: `python examples/benchmarks/checkpoint.py [--full]`.

The same model is saved and loaded with and without a callback, the way Lightning does it: `Trainer.save_checkpoint`,
and all of `Trainer.fit(ckpt_path=...)` up to the first step.
"""

import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import torch
from lightning import Callback, LightningModule, Trainer
from models import MODELS, Module, Task
from timing import RESULTS, alternate, parser, quiet, save, significant, table
from torch.utils.data import DataLoader

from lightning_prune import Channel, EntropyPruning, MagnitudePruning, SensitivityPruning

STEPS = 20
KINDS = ("dense", "weights", "channels", "sensitivity, in its window", "entropy, in its window")


class Stop(Callback):
    """Stops a run as soon as everything is restored."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.fit_loop.epoch_loop.max_steps = trainer.global_step


def callbacks(kind: str) -> list[Callback]:
    """Return the callback of a kind; those with a window are saved in the middle of it, with masks in place."""
    window = {"schedule": "linear", "start": 0, "end": 30, "frequency": 15, "window": 15}
    made = {
        "dense": list,
        "weights": lambda: [MagnitudePruning(0.9, schedule="one_shot", start=1)],
        "channels": lambda: [MagnitudePruning(0.9, granularity=Channel(), schedule="one_shot", start=1)],
        "sensitivity, in its window": lambda: [SensitivityPruning(0.5, **window)],
        "entropy, in its window": lambda: [EntropyPruning(0.5, **window)],
    }
    return made[kind]()


def make_trainer(steps: int, found: list[Callback]) -> Trainer:
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(max_steps=steps, callbacks=found, accelerator="cpu", **off)


def loader(task: Task) -> DataLoader:
    return DataLoader([task.batch()] * STEPS, batch_size=None)


def trained(task: Task, kind: str) -> Trainer:
    """Return a trainer after some steps, so that the optimizer has all its state."""
    trainer = make_trainer(STEPS, callbacks(kind))
    trainer.fit(Module(task), loader(task))
    return trainer


def restore(module: Module, task: Task, kind: str, path: Path) -> None:
    """Do everything that Lightning does from a path to the first step."""
    trainer = make_trainer(STEPS + 1, [*callbacks(kind), Stop()])
    trainer.fit(module, loader(task), ckpt_path=path, weights_only=True)


def measure(task: Task, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each kind of callback."""
    module = Module(task)
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    with tempfile.TemporaryDirectory() as folder:
        paths = {kind: Path(folder) / f"{place}.ckpt" for place, kind in enumerate(KINDS)}
        trainers = {kind: trained(task, kind) for kind in KINDS}
        saving = alternate(
            {kind: partial(trainers[kind].save_checkpoint, paths[kind]) for kind in KINDS},
            rounds,
            clock=time.process_time,
        )
        loading = alternate(
            {kind: partial(restore, module, task, kind, paths[kind]) for kind in KINDS}, rounds, clock=time.process_time
        )
        sizes = {kind: path.stat().st_size for kind, path in paths.items()}
    return [
        {
            "model": task.name,
            "callback": kind,
            "bytes": sizes[kind],
            "bytes_added": sizes[kind] - sizes["dense"],
            "share_of_weights": significant((sizes[kind] - sizes["dense"]) / weights),
            "save_seconds": significant(median(saving[kind])),
            "save_seconds_added": significant(_added(saving[kind], saving["dense"])),
            "load_seconds": significant(median(loading[kind])),
            "load_seconds_added": significant(_added(loading[kind], loading["dense"])),
        }
        for kind in KINDS
    ]


def _added(seconds: list[float], baseline: list[float]) -> float:
    return median(a - b for a, b in zip(seconds, baseline, strict=True))


def plot(rows: list[dict[str, Any]]) -> None:
    """Plot the bytes and the times that masks add."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained", sharey=True)
    rows = [row for row in rows if row["callback"] != "dense" and row["model"] == "mlp"]
    names = [row["callback"] for row in rows]
    bars = left.barh(names, [row["share_of_weights"] for row in rows])
    left.bar_label(bars, fmt="%.3f", padding=3)
    left.axvline(1 / 32, color="black", linewidth=1, linestyle=":", label="one bit per weight (1/32)")
    left.set_xlabel("bytes added (weights = 1)")
    left.margins(x=0.15)
    left.legend()
    for place, (what, label) in enumerate((("save", "save"), ("load", "load"))):
        ys = [y - 0.2 + 0.4 * place for y in range(len(names))]
        right.barh(ys, [1e3 * row[f"{what}_seconds_added"] for row in rows], 0.4, label=label)
    right.axvline(0, color="black", linewidth=1)
    right.set_xlabel("time added (ms)")
    right.legend()
    left.invert_yaxis()
    figure.savefig(RESULTS / "checkpoint.png", dpi=120)


def main() -> None:
    """Measure and report."""
    options = parser(__doc__.splitlines()[0]).parse_args()
    quiet()
    torch.set_num_threads(1)
    rows = []
    for model in MODELS if options.full else ["mlp"]:
        found = measure(MODELS[model], options.rounds or (20 if options.full else 4))
        head = [model, "bytes", "added / weights", "save ms", "added", "load ms", "added"]
        columns = ["save_seconds", "save_seconds_added", "load_seconds", "load_seconds_added"]
        cells = [
            [
                row["callback"],
                f"{row['bytes']:,}",
                f"{row['share_of_weights']:.4f}",
                *(f"{1e3 * row[c]:.1f}" for c in columns),
            ]
            for row in found
        ]
        print(table([head, *cells]), end="\n\n", flush=True)
        rows += found
    save("checkpoint", options.full, rows)
    plot(rows)


if __name__ == "__main__":
    main()
