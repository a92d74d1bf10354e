"""Does RigL in groups gain by the ablation of SRigL? `python examples/benchmarks/ablation.py`.

LeNet-300-100 on 5,000 digits for 20 epochs, and on Fashion-MNIST for 10, sparse from the first step; both hidden layers
by `SharedFanIn`, the head stays dense. SRigL (Lasby et al., 2023, arXiv:2305.02299) drops the smallest weights of a
layer wherever they are, ablates the neurons of which fewer than 30 % are salient, and lets the others grow to the same
number of inputs; `RigL(granularity=SharedFanIn(...))` exchanges as many inputs in each group. Here both are run, SRigL
with and without the ablation, on groups of 1 row (its own case) and of 16. Finished runs are not repeated: delete
results/ablation.jsonl to start over.
"""

import math
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from marked import replace, spread, table
from runs import Runs
from torch import Tensor, nn
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).with_name("evidence")))
from methods import HIDDEN
from second_order import accuracy, be_quiet, train
from tasks import TASKS

from lightning_prune import Granularity, Masks, RigL, SharedFanIn, Weight

RESULTS = Path(__file__).parent / "results" / "ablation.jsonl"
PAGE = Path(__file__).parents[2] / "docs" / "speed.md"
LEVELS, ROWS, SEEDS = {"mnist": (0.9, 0.95, 0.98), "fashion-10": (0.9, 0.95)}, (1, 16), {"mnist": 5, "fashion-10": 3}
TITLES = {"mnist": "MNIST-5k", "fashion-10": "Fashion-MNIST"}
SALIENT = 0.3  # of the paper: a group stays if so many of its inputs are among the best of the layer
WAYS = ("RigL", *(f"{way}, {rows}" for rows in ROWS for way in ("RigL", "SRigL", "SRigL, ablating")))
COLUMNS = [(task, level) for task, levels in LEVELS.items() for level in levels]


def rigl(sparsity: float, seed: int, granularity: Granularity) -> RigL:
    return RigL(sparsity, seed=seed, granularity=granularity, **HIDDEN)


class SRigL(RigL):
    """RigL as in SRigL, on groups of rows.

    Args:
        sparsity: The fraction of zeros.
        seed: Draws the first masks.
        rows: Rows in a group.
        salient: The fraction of a group's inputs that have to be salient; 0 ablates none.
    """

    def __init__(self, sparsity: float, seed: int, rows: int, salient: float) -> None:
        self.salient = salient
        super().__init__(sparsity, seed=seed, granularity=SharedFanIn(rows), **HIDDEN)

    @override
    def choose_masks(self, model: nn.Module, position: int, amount: float) -> Masks:
        masks, growth = Masks(), self.growth(position)
        for unit in self.state.units:
            kept, size = unit.kept(self.masks), unit.mean(torch.abs)
            assert kept is not None
            gain = growth.scores(unit).masked_fill(kept, -1.0)
            shape = (unit.groups, -1)
            keep = regrown(kept.view(shape), size.view(shape), gain.view(shape), amount, self.salient)
            masks.update(unit.masks(keep.flatten()))
        return masks


def regrown(kept: Tensor, size: Tensor, gain: Tensor, amount: float, salient: float) -> Tensor:
    """Return which inputs of each group stay or grow: as many in each group that is left, and as many in all.

    Args:
        kept: Which inputs each group has, groups x inputs.
        size: The magnitude of each.
        gain: The gradient of those that may grow; -1 for those that are there.
        amount: The fraction that is exchanged.
        salient: The fraction of a group's inputs that have to be salient.
    """
    total = int(kept.sum())
    exchanged = round(amount * total)
    weakest = size.masked_fill(~kept, math.inf).flatten().argsort(stable=True)[:exchanged]
    stay = kept.clone()
    stay.view(-1)[weakest] = False
    best = stay.clone()
    best.view(-1)[gain.flatten().topk(exchanged).indices] = True
    active = kept.any(1)
    fan_in = total // int(active.sum())
    active &= best.sum(1) >= salient * fan_in
    fan_in = min(total // max(1, int(active.sum())), kept.shape[1])
    # what stays comes first, the largest first, then what gains most; dropped inputs have no gain and come last
    order = torch.where(stay, 2.0 + size / size.max(), gain / gain.max().clamp_min(1e-30))
    chosen = torch.zeros_like(kept).scatter_(1, order.topk(fan_in, dim=1).indices, value=True)
    return chosen & active[:, None]


def callback(way: str, sparsity: float, seed: int) -> Callback:
    """Return the callback of a way to train."""
    if way == "RigL":
        return rigl(sparsity, seed, Weight())
    name, _, rows = way.rpartition(", ")
    if name == "RigL":
        return rigl(sparsity, seed, SharedFanIn(int(rows)))
    return SRigL(sparsity, seed, int(rows), SALIENT if "ablating" in name else 0.0)


def run(name: str, way: str, level: float, seed: int) -> dict[str, Any]:
    """Train one network; return the accuracy, the zeros, and the neurons that are gone."""
    task = TASKS[name]
    model, data, pruning = task.model(seed), task.data(seed), callback(way, level, seed)
    train(model, data, seed, pruning, max_epochs=task.epochs)
    layers = [layer.weight for layer in (model.network.hidden1, model.network.hidden2)]
    gone = [int((layer == 0).all(1).sum()) for layer in layers]
    zeros = sum(int((layer == 0).sum()) for layer in layers) / sum(layer.numel() for layer in layers)
    return {"tuned": accuracy(model, data), "zeros": round(zeros, 5), "gone": gone}


def make_table(runs: Runs) -> str:
    """Return the accuracies, and in brackets the hidden neurons that are gone."""
    lines = []
    for way in WAYS:
        cells = []
        for task, level in COLUMNS:
            have = runs.have(task=task, way=way, level=level)
            gone = sum(sum(row["gone"]) for row in have) / max(1, len(have))
            cells.append(f"{spread([row['tuned'] for row in have])} ({gone:.0f})" if have else "")
        name, _, rows = way.rpartition(", ")
        lines.append([f"{name}, groups of {rows}" if name else f"{way}, single weights", *cells])
    return table(["", *(f"{TITLES[task]}, {level:.0%}" for task, level in COLUMNS)], lines)


def main() -> None:
    """Run what is missing, and write the table."""
    be_quiet()
    runs = Runs(RESULTS)
    for (task, level), way in product(COLUMNS, WAYS):
        for seed in range(SEEDS[task]):
            if not runs.have(task=task, way=way, level=level, seed=seed):
                runs.add(task=task, way=way, level=level, seed=seed, **run(task, way, level, seed))
                print(runs.rows[-1], flush=True)
    print(found := make_table(runs))
    replace(PAGE, "ablation", found)


if __name__ == "__main__":
    main()
