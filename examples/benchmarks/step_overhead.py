"""What masks cost in every training step: `python examples/benchmarks/step_overhead.py [--full]`.

Each variant trains for some steps in a real Trainer, with a logger and the callback under test; the variants alternate.
A step is timed from the start of one batch to the start of the next, so it includes everything a user pays for: the
loop, the hooks, the optimizer, the logging. With one thread the clock is CPU time, which other processes do not affect;
with more it is wall time, since threads that wait would count as work.

Windows are measured without masks, so that their ratio to dense is the cost of observing. The floor is what any mask
that touches each weight must cost: one multiplication by 1, in place, after every step.
"""

import copy
import gc
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
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from lightning_prune import (
    Channel,
    EntropyPruning,
    MagnitudePruning,
    MovementPruning,
    SensitivityPruning,
    WandaPruning,
    Weight,
    prune,
)

STEPS = 10  # per turn
SKIPPED = 2  # of them: the optimizer creates its state, and the caches hold another variant
FAR = 10**6  # a step that no run reaches
SPARSITY = 0.9
FLOOR = "floor: weights times 1"
INFERENCE = "inference, weights"
APPLIES = "aten::_foreach_mul_"  # the operation that applies the masks
ROUNDS = {"mlp": 20, "cnn": 5, "transformer": 8}  # with --full; the lengths of their steps differ that much
QUICK_ROUNDS = 8


def clock(threads: int) -> tuple[str, Callable[[], float]]:
    """Return the name of the clock for this number of threads, and the function to read it."""
    return ("CPU", time.process_time) if threads == 1 else ("wall", time.perf_counter)


def layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers whose weights are pruned."""
    return [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]


class Clock(Callback):
    """Times the steps of one run."""

    def __init__(self, read: Callable[[], float]) -> None:
        self.read = read
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx > SKIPPED:
            self.seconds.append(self.read() - self.began)
        self.began = self.read()


class Floor(Callback):
    """Reads and writes every weight once after each step, and does nothing else."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = [layer.weight.detach() for layer in layers(pl_module)]
        trainer.optimizers[0].register_step_post_hook(lambda *args: torch._foreach_mul_(weights, 1.0))


class Profiled(Callback):
    """Profiles steps that are not timed, including the hooks of other callbacks."""

    def __init__(self) -> None:
        self.profile = profile(activities=[ProfilerActivity.CPU])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == SKIPPED:
            self.profile.start()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.profile.stop()


class PruneAtStart(ModelPruning):
    """Lightning's callback, pruning once, before the first step."""

    def __init__(self, model: nn.Module, granularity: str) -> None:
        channels = {"use_global_unstructured": False, "pruning_dim": 0, "pruning_norm": 1}
        super().__init__(
            "ln_structured" if granularity == "channel" else "l1_unstructured",
            parameters_to_prune=[(layer, "weight") for layer in layers(model)],
            amount=SPARSITY,
            apply_pruning=False,
            use_lottery_ticket_hypothesis=False,
            **(channels if granularity == "channel" else {}),
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.apply_pruning(SPARSITY)


def variants(module: Module) -> dict[str, Callable[[], list[Callback]]]:
    """Return a factory for the callbacks of each variant."""
    held = partial(MagnitudePruning, SPARSITY, schedule="one_shot", start=0)
    window = {"start": STEPS, "end": STEPS, "window": STEPS}  # open at every step: the update is past the end
    return {
        "dense": list,
        FLOOR: lambda: [Floor()],
        "lightning_prune, weights": lambda: [held(granularity=Weight())],
        "lightning_prune, channels": lambda: [held(granularity=Channel())],
        "ModelPruning, weights": lambda: [PruneAtStart(module.model, "weight")],
        "ModelPruning, channels": lambda: [PruneAtStart(module.model, "channel")],
        "sensitivity, in its window": lambda: [SensitivityPruning(SPARSITY, **window)],
        "entropy, in its window": lambda: [EntropyPruning(SPARSITY, **window)],
        "movement, in its window": lambda: [MovementPruning(SPARSITY, **window)],
        "wanda, in its window": lambda: [WandaPruning(SPARSITY, **window)],
        "sensitivity, outside its window": lambda: [SensitivityPruning(SPARSITY, start=FAR, end=FAR)],
    }


def train(module: Module, task: Task, found: list[Callback], read: Callable[[], float]) -> list[float]:
    """Train for one turn, and return the time of each step."""
    clock = Clock(read)
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
    return clock.seconds


def measure(task: Task, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each variant."""
    torch.set_num_threads(threads)
    kind, read = clock(threads)
    names = list(variants(Module(task)))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            module = Module(task)
            seconds[name].append(median(train(module, task, variants(module)[name](), read)))
            del module
            gc.collect()  # the trainer and its model refer to each other
    return [
        {
            "model": task.name,
            "threads": threads,
            "clock": kind,
            "variant": name,
            "milliseconds": significant(1e3 * median(seconds[name])),
            "ratio": round(ratio(seconds[name], seconds["dense"]), 3),
        }
        for name in names
    ]


@torch.inference_mode()
def infer(task: Task, threads: int, rounds: int) -> dict[str, Any]:
    """Return a row on the forward pass of a masked model, whose zeros are multiplied like any other number."""
    torch.set_num_threads(threads)
    dense, inputs = task.model().eval(), task.inputs()
    masked = copy.deepcopy(dense)
    prune(masked, SPARSITY)
    kind, read = clock(threads)
    both = {"dense": partial(dense, inputs), INFERENCE: partial(masked, inputs)}
    seconds = alternate(both, 5 * rounds, clock=read)
    return {
        "model": task.name,
        "threads": threads,
        "clock": kind,
        "variant": INFERENCE,
        "milliseconds": significant(1e3 * median(seconds[INFERENCE])),
        "ratio": round(ratio(seconds[INFERENCE], seconds["dense"]), 3),
    }


def operations(task: Task) -> list[dict[str, Any]]:
    """Return a row for each costly operation in a step with masks on weights, on one thread."""
    torch.set_num_threads(1)
    module, profiled = Module(task), Profiled()
    train(module, task, [*variants(module)["lightning_prune, weights"](), profiled], time.process_time)
    events = {event.key: event for event in profiled.profile.key_averages()}
    total = sum(event.self_cpu_time_total for event in events.values())
    found = {name: event.self_cpu_time_total / total for name, event in events.items()}
    most = sorted(found, key=lambda name: -found[name])[:8]
    masks = events[APPLIES].cpu_time_total / total
    shares = {**{name: found[name] for name in most}, f"{APPLIES} and what it calls: the masks": masks}
    return [{"model": task.name, "operation": name, "share": significant(share)} for name, share in shares.items()]


def plot(rows: list[dict[str, Any]]) -> None:
    """Plot the overhead over dense training as bars, one panel for each number of threads."""
    rows = [row for row in rows if row["variant"] not in ("dense", INFERENCE)]
    names, models, threads = (list(dict.fromkeys(row[key] for row in rows)) for key in ("variant", "model", "threads"))
    size = (3 + 4.5 * len(threads), 1.2 + len(names) * (0.15 + 0.22 * len(models)))
    figure, panels = plt.subplots(1, len(threads), sharex=True, sharey=True, squeeze=False, figsize=size)
    height = 0.8 / len(models)
    for axes, count in zip(panels[0], threads, strict=True):
        for place, model in enumerate(models):
            found = {row["variant"]: row["ratio"] for row in rows if (row["model"], row["threads"]) == (model, count)}
            ys = [names.index(name) + (place - (len(models) - 1) / 2) * height for name in found]
            axes.barh(ys, [ratio - 1 for ratio in found.values()], height, left=1, label=model)
            for y, value in zip(ys, found.values(), strict=True):
                axes.text(max(value, 1) + 0.004, y, f"{value:.2f}", va="center", fontsize=8)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_title(f"{count} thread{'s' * (count > 1)}, {clock(count)[0]} time", fontsize=10)
        axes.set_xlabel("time per training step (dense = 1)")
    axes = panels[0][0]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    if len(models) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(models))
    else:
        figure.suptitle(models[0])
    figure.set_layout_engine("constrained")
    figure.savefig(RESULTS / "step_overhead.png", dpi=120)


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--models", nargs="+", choices=MODELS, help="default: the MLP; all with --full")
    arguments.add_argument("--threads", nargs="+", type=int, help="default: 1; 1 2 with --full")
    options = arguments.parse_args()
    quiet()
    rows = []
    for threads in options.threads or ([1, 2] if options.full else [1]):
        for model in options.models or (MODELS if options.full else ["mlp"]):
            rounds = options.rounds or (ROUNDS[model] if options.full else QUICK_ROUNDS)
            found = [*measure(MODELS[model], threads, rounds), infer(MODELS[model], threads, rounds)]
            head = [f"{model}, threads: {threads}", f"ms, {found[0]['clock']} time", "x dense"]
            print(table([head, *([r["variant"], f"{r['milliseconds']:g}", f"{r['ratio']:.3f}"] for r in found)]))
            print(flush=True)
            rows += found
    plot(rows)
    save("step_overhead", options.full, [*rows, *operations(MODELS["mlp"])])


if __name__ == "__main__":
    main()
