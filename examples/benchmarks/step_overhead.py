"""What masks cost in every training step: `python examples/benchmarks/step_overhead.py [--full]`.

Each variant trains in a Trainer of its own, with a logger and the callback under test, in a thread of its own. Only
one of them runs at a time: an epoch is a turn, and the turns alternate. A step is timed from the start of one batch to
the start of the next, so it holds all that a user pays: the loop, the hooks, the optimizer, the logging.
"""

import logging
import tempfile
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from threading import Condition
from typing import Any

import matplotlib.pyplot as plt
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.loggers import CSVLogger
from models import MODELS, Task
from timing import RESULTS, parser, ratio, save, significant, table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune import Channel, EntropyPruning, MagnitudePruning, Pruning, SensitivityPruning, Weight

BATCHES = 8  # an epoch, which is a turn
FAR = 10**6  # an epoch or step that no run reaches
SPARSITY = 0.9


class Module(LightningModule):
    """A model in training as a user writes it: the loss is logged, and AdamW is fused."""

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


class Turns:
    """Lets one of several threads run at a time, in a fixed order."""

    def __init__(self, names: list[str]) -> None:
        self.order = deque(names)
        self.changed = Condition()

    def wait(self, name: str) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.order[0] == name)

    def pass_on(self, name: str) -> None:
        with self.changed:
            self.order.rotate(-1)
            self.changed.notify_all()

    def leave(self, name: str) -> None:
        with self.changed:
            self.order.remove(name)
            self.changed.notify_all()


class Clock(Callback):
    """Times the steps of one trainer, and passes the turn on between two epochs."""

    def __init__(self, name: str, turns: Turns) -> None:
        self.name, self.turns = name, turns
        self.wall: list[list[float]] = []  # seconds, by epoch
        self.cpu: list[list[float]] = []  # seconds of the processor, which others on the machine do not add to

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch:
            self.turns.pass_on(self.name)
            self.turns.wait(self.name)
        self.wall.append([])
        self.cpu.append([])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter(), time.process_time()
        if batch_idx > 1:  # the first step of a turn finds the caches full of another variant
            self.wall[-1].append(now[0] - self.began[0])
            self.cpu[-1].append(now[1] - self.began[1])
        self.began = time.perf_counter(), time.process_time()


class LightningPruning(ModelPruning):
    """Lightning's callback on the weights of linear and convolutional layers, pruned once, after the first epoch."""

    def __init__(self, model: nn.Module, granularity: str) -> None:
        layers = [(m, "weight") for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        structured = {"use_global_unstructured": False, "pruning_dim": 0, "pruning_norm": 1}
        super().__init__(
            "l1_unstructured" if granularity == "weight" else "ln_structured",
            parameters_to_prune=layers,
            amount=SPARSITY,
            apply_pruning=lambda epoch: epoch == 0,
            use_lottery_ticket_hypothesis=False,
            **({} if granularity == "weight" else structured),
        )


def ours(granularity: str) -> Pruning:
    """Return a callback that prunes before the second epoch and holds its masks from then on."""
    units = Weight() if granularity == "weight" else Channel()
    return MagnitudePruning(SPARSITY, granularity=units, schedule="one_shot", start=1, interval="epoch")


def variants(module: Module, epochs: int) -> dict[str, Any]:
    """Return what makes the callback of each variant; None for dense training."""
    last = epochs * BATCHES - 1
    # a window of 16 steps before an update every 16 steps: it is always open
    watching = {"schedule": "linear", "start": 0, "end": last, "frequency": 16}
    return {
        "dense": None,
        "lightning_prune weight": partial(ours, "weight"),
        "lightning_prune channel": partial(ours, "channel"),
        "ModelPruning weight": partial(LightningPruning, module.model, "weight"),
        "ModelPruning channel": partial(LightningPruning, module.model, "channel"),
        "sensitivity, in its window": partial(SensitivityPruning, 0.5, **watching),
        "entropy, in its window": partial(EntropyPruning, 0.5, **watching),
        "entropy, outside": partial(EntropyPruning, 0.5, start=FAR, end=FAR),
    }


def train(name: str, task: Task, epochs: int, turns: Turns) -> Clock:
    """Train one variant, in its turns, and return its times."""
    clock = Clock(name, turns)
    turns.wait(name)
    try:
        torch.manual_seed(0)
        module = Module(task)
        callback = variants(module, epochs)[name]
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                max_epochs=epochs,
                callbacks=[clock, *([callback()] if callback else [])],
                logger=CSVLogger(folder),
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                accelerator="cpu",
            )
            trainer.fit(module, DataLoader([task.batch()] * BATCHES, batch_size=None))
    finally:
        turns.leave(name)
    return clock


def measure(task: Task, threads: int, rounds: int, names: list[str]) -> list[dict[str, Any]]:
    """Return a row for each variant."""
    torch.set_num_threads(threads)
    turns = Turns(names)
    with ThreadPoolExecutor(len(names)) as pool:
        clocks = list(pool.map(partial(train, task=task, epochs=rounds + 1, turns=turns), names))
    rows = []
    for clock in clocks:
        # in the first epoch there are no masks yet
        wall, cpu, dense_wall, dense_cpu = (
            [median(epoch) for epoch in epochs[1:]] for epochs in (clock.wall, clock.cpu, clocks[0].wall, clocks[0].cpu)
        )
        rows.append(
            {
                "model": task.name,
                "threads": threads,
                "variant": clock.name,
                "milliseconds": significant(1e3 * median(wall)),
                "ratio": round(ratio(wall, dense_wall), 3),
                "cpu_ratio": round(ratio(cpu, dense_cpu), 3),
            }
        )
    return rows


def plot(rows: list[dict[str, Any]]) -> None:
    """Draw the ratios to dense training as bars."""
    rows = [row for row in rows if row["threads"] == 1]
    names = list(dict.fromkeys(row["variant"] for row in rows if row["variant"] != "dense"))
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    height = 0.8 / len(models)
    for place, model in enumerate(models):
        found = {row["variant"]: row["ratio"] for row in rows if row["model"] == model}
        ys = [y + place * height for y in range(len(names))]
        bars = axes.barh(ys, [found[name] for name in names], height, label=model)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_xlim(left=0.9)
    axes.set_xlabel("time of a training step, dense training = 1 (1 thread)")
    axes.legend()
    figure.savefig(RESULTS / "step_overhead.png", dpi=120)


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    arguments.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    arguments.add_argument("--rounds", type=int)
    options = arguments.parse_args()
    for namespace in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(namespace).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    names = list(variants(Module(MODELS["mlp"]), 1))
    rounds = options.rounds or (30 if options.full else 8)
    rows = []
    for threads in options.threads:
        for model in options.models:
            found = measure(MODELS[model], threads, rounds, names)
            head = [f"{model}, {threads} threads", "ms", "x dense", "x dense, CPU time"]
            cells = [
                [r["variant"], f"{r['milliseconds']:g}", f"{r['ratio']:.3f}", f"{r['cpu_ratio']:.3f}"] for r in found
            ]
            print(table([head, *cells]), end="\n\n", flush=True)
            rows += found
    save("step_overhead", options.full, rows)
    plot(rows)


if __name__ == "__main__":
    main()
