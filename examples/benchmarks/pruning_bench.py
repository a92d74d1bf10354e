"""The protocol of PruningBench, with two libraries: `python examples/benchmarks/pruning_bench.py [--seeds 3]`.

As in Li et al. (2024, arXiv:2406.12315), a trained residual network loses channels until it has 2, 4 or 8 times fewer
FLOPs: all layers are ranked together, by scores divided by the mean of their layer, but a tenth of every layer stays.
Then it is fine-tuned. Torch-Pruning removes channels in up to 400 steps and scores before each; this package decides at
once. The network (75 thousand weights) and the data (5,000 images of Fashion-MNIST, averaged to 14 x 14 pixels) are
small, where the paper has a ResNet-50 on CIFAR-100 and ImageNet.

Finished runs are not repeated: delete results/pruning_bench.jsonl to start over. The table of docs/pruning_bench.md is
written from that file.
"""

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch_pruning
from marked import replace, spread, table
from runs import Runs
from timing import RESULTS
from torch import Tensor, nn
from torch_pruning import importance

sys.path.insert(0, str(Path(__file__).with_name("scopes")))
from networks import Data, accuracy, fashion, fit, resnet
from variants import by_mean

from lightning_prune import (
    FPGM,
    APoZ,
    BatchNormScale,
    Channel,
    Criterion,
    Entropy,
    Fisher,
    Magnitude,
    Movement,
    Random,
    Sensitivity,
    prune,
    shrink,
)

PATH, PAGE = RESULTS / "pruning_bench.jsonl", Path(__file__).parents[2] / "docs" / "pruning_bench.md"
OURS, PEER = "lightning_prune", "Torch-Pruning"
SPEEDUPS, PROTECTED, STEPS = (2, 4, 8), 0.1, 400
CRITERIA: dict[str, Callable[[int], Criterion]] = {
    "magnitude, L1": lambda seed: Magnitude(),
    "magnitude, L2": lambda seed: Magnitude(p=2),
    "FPGM": lambda seed: FPGM(),
    "batch-norm scale": lambda seed: BatchNormScale(),
    "Taylor": lambda seed: Sensitivity(),
    "Fisher": lambda seed: Fisher(),
    "movement": lambda seed: Movement(),
    "APoZ": lambda seed: APoZ(),
    "entropy": lambda seed: Entropy(prune="low"),
    "random": lambda seed: Random(seed),
}
PEERS: dict[str, Callable[[], Any]] = {
    "magnitude, L1": lambda: importance.GroupMagnitudeImportance(p=1),
    "magnitude, L2": lambda: importance.GroupMagnitudeImportance(p=2),
    "FPGM": lambda: importance.FPGMImportance(),
    "batch-norm scale": lambda: importance.BNScaleImportance(),
    "Taylor": lambda: importance.GroupTaylorImportance(),
    "LAMP": lambda: importance.LAMPImportance(),
    "random": lambda: importance.RandomImportance(),
}


def batches(data: Data) -> list[tuple[Tensor, Tensor]]:
    """Return the 512 images that criteria observe."""
    return list(zip(*(part[:512].split(64) for part in data.train), strict=True))


def by_us(model: nn.Module, criterion: str, speedup: int, seed: int, data: Data) -> tuple[nn.Module, list[float]]:
    """Return the model without channels, and the seconds of the one step that it took."""
    chosen, example, began = CRITERIA[criterion](seed), data.train[0][:1], time.process_time()
    given = {} if chosen.needs == "weights" else {"data": batches(data)}
    how = {"granularity": Channel(), "scope": by_mean, "min_density": PROTECTED, "of": "flops"}
    prune(model, 1 - 1 / speedup, criterion=chosen, example_inputs=example, **how, **given)
    small = shrink(model, example)
    return small, [time.process_time() - began]


def by_peer(model: nn.Module, criterion: str, speedup: int, seed: int, data: Data) -> tuple[nn.Module, list[float]]:
    """Return the model without channels, and the seconds of each step."""
    torch.manual_seed(seed)
    example, seconds = data.train[0][:1], list[float]()
    before = operations(model, example)
    pruner = torch_pruning.pruner.BasePruner(
        model.eval(),
        example,
        importance=PEERS[criterion](),
        global_pruning=True,
        pruning_ratio=1.0,
        max_pruning_ratio=1 - PROTECTED,
        iterative_steps=STEPS,
        ignored_layers=[module for module in model.modules() if isinstance(module, nn.Linear)],
    )
    while operations(model, example) > before / speedup and len(seconds) < STEPS:
        began = time.process_time()
        if criterion == "Taylor":
            model.zero_grad()
            for x, y in batches(data):
                nn.functional.cross_entropy(model(x), y).backward()
        pruner.step()
        seconds.append(time.process_time() - began)
    return model, seconds


def operations(model: nn.Module, example: Tensor) -> float:
    """Return the multiplications of a forward pass, as Torch-Pruning counts them."""
    return float(torch_pruning.utils.count_ops_and_params(model, example)[0])


def size(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def run(dense: nn.Module, library: str, criterion: str, speedup: int, seed: int, data: Data) -> dict[str, Any]:
    """Prune a copy of a network and fine-tune it."""
    by, example = (by_us if library == OURS else by_peer), data.train[0][:1]
    small, seconds = by(copy.deepcopy(dense).eval(), criterion, speedup, seed, data)
    pruned = accuracy(small, data)
    fit(small, data, data.fine_tuning, seed)
    return {
        "dense": accuracy(dense, data),
        "pruned": pruned,
        "accuracy": accuracy(small, data),
        "speedup_reached": round(operations(dense, example) / operations(small, example), 3),
        "parameters": round(size(small) / size(dense), 4),
        "steps": len(seconds),
        "step_seconds": round(median(seconds), 4),
        "seconds": round(sum(seconds), 3),
    }


def fill(runs: Runs, seeds: int) -> None:
    """Run what is missing, seed by seed."""
    wanted = [(OURS, name) for name in CRITERIA] + [(PEER, name) for name in PEERS]
    for seed in range(seeds):
        places = [
            {"library": library, "criterion": name, "speedup": speedup, "seed": seed}
            for speedup in reversed(SPEEDUPS)
            for library, name in wanted
        ]
        missing = [place for place in places if not runs.have(**place)]
        if not missing:
            continue
        torch.manual_seed(seed)
        data, dense = fashion(), resnet()
        fit(dense, data, data.epochs, seed)
        for place in missing:
            runs.add(**place, **run(dense, **place, data=data))
            print(runs.rows[-1], flush=True)


def make_table(rows: list[dict[str, Any]]) -> str:
    """Return a row for each library and criterion, those with the best accuracy at the largest speedup first."""
    lines = []
    for library, name in dict.fromkeys((row["library"], row["criterion"]) for row in rows):
        mine = [row for row in rows if (row["library"], row["criterion"]) == (library, name)]
        found = [[row for row in mine if row["speedup"] == speedup] for speedup in SPEEDUPS]
        last = mean([row["accuracy"] for row in found[-1]] or [0.0])
        lines.append((last, [name, library, *(cell for part in found for cell in _cells(part)), *_times(mine)]))
    lines.sort(key=lambda line: -line[0])
    columns = [text for speedup in SPEEDUPS for text in (f"{speedup}x", "FLOPs, parameters")]
    return table(["criterion", "library", *columns, "one step", "all steps"], [cells for _, cells in lines])


def _cells(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["", ""]
    left = 1 / mean(row["speedup_reached"] for row in rows), mean(row["parameters"] for row in rows)
    return [_spread([row["accuracy"] for row in rows]), f"{left[0]:.1%}, {left[1]:.1%}"]


def _spread(accuracies: list[float]) -> str:
    return spread(accuracies) if len(accuracies) > 1 else f"{accuracies[0]:.1f}"


def _times(rows: list[dict[str, Any]]) -> list[str]:
    one, all_steps = (median(row[name] for row in rows) for name in ("step_seconds", "seconds"))
    return [f"{1e3 * one:.0f} ms", f"{all_steps:.2f} s"]


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description="Compare criteria and libraries at equal FLOPs.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tables", action="store_true", help="run nothing, only write the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    runs = Runs(PATH)
    if not args.tables:
        fill(runs, args.seeds)
    dense = {row["seed"]: row["dense"] for row in runs.rows}
    replace(PAGE, "dense", f"Dense: {_spread(list(dense.values()))}. Seeds: {len(dense)}.")
    replace(PAGE, "table", make_table(runs.rows))


if __name__ == "__main__":
    main()
