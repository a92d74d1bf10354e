"""What masks cost in every training step: `python examples/benchmarks/step_overhead.py [--full]`.

Each variant trains for some steps in a real Trainer, with a logger and the callback under test; they take turns.
A step is timed from the start of one batch to the start of the next, so it holds all that a user pays: the loop, the
hooks, the optimizer, the logging. On one thread the processor time is the better measure, since other processes do not
add to it; on several it also counts threads that wait.
"""

import copy
import tempfile
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.loggers import CSVLogger
from models import MODELS, Module, Task
from timing import RESULTS, alternate, parser, quiet, ratio, save, significant, table
from torch import nn
from torch.utils.data import DataLoader

from lightning_prune import Channel, EntropyPruning, MagnitudePruning, SensitivityPruning, Weight, prune

STEPS = 10  # in a turn
SKIPPED = 2  # of them: the optimizer makes its state, and the caches are full of another variant
FAR = 10**6  # a step that no run reaches
SPARSITY = 0.9
INFERENCE = "inference, weights"


class Clock(Callback):
    """Times the steps of one run."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.processor: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx > SKIPPED:
            self.wall.append(time.perf_counter() - self.began[0])
            self.processor.append(time.process_time() - self.began[1])
        self.began = time.perf_counter(), time.process_time()


class PruneAtStart(ModelPruning):
    """Lightning's callback on the weights of linear and convolutional layers, pruned once, before the first step."""

    def __init__(self, model: nn.Module, granularity: str) -> None:
        layers = [(module, "weight") for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        channels = {"use_global_unstructured": False, "pruning_dim": 0, "pruning_norm": 1}
        super().__init__(
            "ln_structured" if granularity == "channel" else "l1_unstructured",
            parameters_to_prune=layers,
            amount=SPARSITY,
            apply_pruning=False,
            use_lottery_ticket_hypothesis=False,
            **(channels if granularity == "channel" else {}),
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.apply_pruning(SPARSITY)


def variants(module: Module) -> dict[str, Callable[[], list[Callback]]]:
    """Return what makes the callbacks of each variant."""
    held = partial(MagnitudePruning, SPARSITY, schedule="one_shot", start=0)
    window = {"start": STEPS, "end": STEPS, "window": STEPS}  # open in every step, before an update behind the last
    return {
        "dense": list,
        "lightning_prune, weights": lambda: [held(granularity=Weight())],
        "lightning_prune, channels": lambda: [held(granularity=Channel())],
        "ModelPruning, weights": lambda: [PruneAtStart(module.model, "weight")],
        "ModelPruning, channels": lambda: [PruneAtStart(module.model, "channel")],
        "sensitivity, in its window": lambda: [SensitivityPruning(SPARSITY, **window)],
        "entropy, in its window": lambda: [EntropyPruning(SPARSITY, **window)],
        "entropy, outside": lambda: [EntropyPruning(SPARSITY, start=FAR, end=FAR)],
    }


def train(module: Module, task: Task, found: list[Callback]) -> Clock:
    """Train for one turn, and return its times."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=1,
            callbacks=[*found, clock],
            logger=CSVLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        )
        trainer.fit(module, DataLoader([task.batch()] * STEPS, batch_size=None))
    return clock


def measure(task: Task, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each variant."""
    torch.set_num_threads(threads)
    names = list(variants(Module(task)))
    wall: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name in names:
            module = Module(task)
            clock = train(module, task, variants(module)[name]())
            wall.setdefault(name, []).append(median(clock.wall))
            processor.setdefault(name, []).append(median(clock.processor))
    return [
        {
            "model": task.name,
            "threads": threads,
            "variant": name,
            "milliseconds": significant(1e3 * median(wall[name])),
            "ratio": round(ratio(wall[name], wall["dense"]), 3),
            "processor_ratio": round(ratio(processor[name], processor["dense"]), 3),
        }
        for name in wall
    ]


@torch.inference_mode()
def infer(task: Task, threads: int, rounds: int) -> dict[str, Any]:
    """Return a row on the forward pass of a trained model: its masked weights are zeros, which are multiplied too."""
    torch.set_num_threads(threads)
    dense, inputs = task.model().eval(), task.inputs()
    masked = copy.deepcopy(dense)
    prune(masked, SPARSITY)
    clock = time.process_time if threads == 1 else time.perf_counter
    both = {"dense": partial(dense, inputs), INFERENCE: partial(masked, inputs)}
    seconds = alternate(both, 10 * rounds, clock=clock)
    return {
        "model": task.name,
        "threads": threads,
        "variant": INFERENCE,
        "milliseconds": significant(1e3 * median(seconds[INFERENCE])),
        "ratio": round(ratio(seconds[INFERENCE], seconds["dense"]), 3),
    }


def plot(rows: list[dict[str, Any]]) -> None:
    """Draw the ratios to dense training as bars."""
    rows = [row for row in rows if row["threads"] == 1 and "processor_ratio" in row]
    names = list(dict.fromkeys(row["variant"] for row in rows if row["variant"] != "dense"))
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    height = 0.8 / len(models)
    for place, model in enumerate(models):
        found = {row["variant"]: row["processor_ratio"] for row in rows if row["model"] == model}
        ys = [y + place * height for y in range(len(names))]
        bars = axes.barh(ys, [found[name] for name in names], height, label=model)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_xlim(left=0.9)
    axes.set_xlabel("processor time of a training step on one thread (dense training = 1)")
    axes.legend()
    figure.savefig(RESULTS / "step_overhead.png", dpi=120)


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    arguments.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    options = arguments.parse_args()
    quiet()
    rounds = options.rounds or (30 if options.full else 6)
    rows = []
    for threads in options.threads:
        for model in options.models:
            found = [*measure(MODELS[model], threads, rounds), infer(MODELS[model], threads, rounds)]
            head = [f"{model}, {threads} threads", "ms", "x dense", "x dense, processor time"]
            columns = ["milliseconds", "ratio", "processor_ratio"]
            cells = [
                [row["variant"], *(f"{row[column]:g}" if column in row else "" for column in columns)] for row in found
            ]
            print(table([head, *cells]), end="\n\n", flush=True)
            rows += found
    save("step_overhead", options.full, rows)
    plot(rows)


if __name__ == "__main__":
    main()
