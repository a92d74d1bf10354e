"""What one mask update costs: `python examples/benchmarks/mask_update.py [--full]`.

From 1 to 100 M weights (`--full`: 1,000 M, 4 GB), in tensors of up to 16.8 M: the time of an update and its peak memory
beyond the weights and the current masks. Compared with `torch.nn.utils.prune.global_unstructured`, and with the minimum
that any update must do: one pass that reads every weight and takes its absolute value.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import torch
from timing import RESULTS, alternate, parser, peak_memory, ratio, save, significant, table
from torch import nn
from torch.nn.utils import prune

from lightning_prune import NM, Channel, Criterion, Granularity, Magnitude, Masks, Sensitivity, Weight, scopes
from lightning_prune.models.parameters import find
from lightning_prune.tensors.selection import Scores
from lightning_prune.units import Units, make_units
from lightning_prune.updates.decision import decide
from lightning_prune.updates.target_sparsity import SparsityTarget

SIZES = {  # weights: number of tensors, side of each
    "1 M": (4, 512),
    "10 M": (10, 1024),
    "100 M": (24, 2048),
    "1,000 M": (60, 4096),
}
TARGET = SparsityTarget(1.0 - 1e-9)
PASS = "one pass of abs"
MASK = "one comparison into new masks"
TORCH = "prune.global_unstructured"


def make_model(count: int, side: int) -> nn.Module:
    """Return that many square linear layers with normally distributed weights."""
    layers = [nn.Linear(side, side, bias=False, device="meta").to_empty(device="cpu") for _ in range(count)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.02)
    return nn.ModuleList(layers)


class Update:
    """A mask update as a callback makes it, on top of the masks of an earlier one."""

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion = Magnitude(),
        granularity: Granularity = Weight(),
        scope: str = "global",
        first: bool = False,
    ) -> None:
        self.criterion = criterion
        self.found = find(model)
        self.units = make_units(self.found, model, granularity)
        self.scope = scopes.resolve(scope)
        self.held = Masks()
        for unit in self.units if criterion.needs == "gradients" else ():
            unit.statistic, unit.steps = torch.rand_like(unit.parameter), 1
        if not first:
            self.held = self(0.8)

    def __call__(self, due: float = 0.9) -> Masks:
        def allocate(scores: Scores) -> Mapping[str, int]:
            return TARGET.allocate(scores, self.found, self.criterion, self.scope, due)

        return decide(self.units, self.criterion, allocate, self.held).masks


def updates(model: nn.Module) -> dict[str, Callable[[], Update]]:
    """Return a factory for each kind of update; the others are compared with the first."""
    return {
        "global": partial(Update, model),
        "global, first": partial(Update, model, first=True),
        "local": partial(Update, model, scope="local"),
        "erk": partial(Update, model, scope="erk"),
        "2:4": partial(Update, model, granularity=NM(2, 4)),
        "channels": partial(Update, model, granularity=Channel()),
        "sensitivity": partial(Update, model, Sensitivity()),
    }


@dataclass(frozen=True)
class Counted(Magnitude):
    """Magnitude that counts the weights it is asked to score."""

    elementwise = True
    asked: list[int] = field(default_factory=list)

    def scores(self, units: Units) -> torch.Tensor:
        self.asked.append(units.parameter.numel())
        return super().scores(units)


def passes(model: nn.Module, **arguments: Any) -> float:
    """Return how often an update scores a weight."""
    criterion = Counted()
    update = Update(model, criterion, **arguments)
    criterion.asked.clear()
    update()
    return sum(criterion.asked) / sum(layer.weight.numel() for layer in model)


def one_pass(model: nn.Module) -> None:
    """Read every weight and take its absolute value, into a buffer that stays in the cache."""
    room = torch.empty(1 << 18)
    for layer in model:
        for piece in layer.weight.detach().view(-1).split(len(room)):
            torch.abs(piece, out=room[: len(piece)])


def compare(model: nn.Module) -> list[torch.Tensor]:
    """Compare every weight with a number and write new masks, whose memory the system hands out page by page."""
    room = torch.empty(1 << 18)
    masks = [torch.empty(layer.weight.shape, dtype=torch.bool) for layer in model]
    for layer, mask in zip(model, masks, strict=True):
        for piece, part in zip(*(t.detach().view(-1).split(len(room)) for t in (layer.weight, mask)), strict=True):
            part.copy_(torch.gt(piece, 0.02, out=room[: len(piece)]))  # torch does not vectorise into bools
    return masks


def with_torch(model: nn.Module) -> None:
    """Prune with torch.nn.utils.prune."""
    parameters = [(layer, "weight") for layer in model]
    prune.global_unstructured(parameters, pruning_method=prune.L1Unstructured, amount=0.9)


def undo(model: nn.Module) -> None:
    """Restore the layers as they were before ``with_torch``."""
    for layer in model:
        if prune.is_pruned(layer):
            original = layer.weight_orig.detach().clone()
            prune.remove(layer, "weight")
            layer.weight.data = original


def measure(size: str, rounds: int, torch_too: bool, full: bool) -> list[dict[str, Any]]:
    """Return a row for each kind of update of a model of this size."""
    model = make_model(*SIZES[size])
    weights = sum(layer.weight.numel() for layer in model)
    seconds: dict[str, list[float]] = {}
    memory: dict[str, int | None] = {}
    kinds = updates(model)
    if weights > (10**9 if full else 10**8) // 2:
        kinds = {"global": kinds["global"]}  # enough to see how the time grows
    for name, make in kinds.items():
        update = make()
        found = alternate({PASS: partial(one_pass, model), name: update}, rounds, clock=time.process_time)
        seconds[name] = found[name]
        seconds[f"{PASS} beside {name}"] = found[PASS]
        memory[name] = peak_memory(update)
        del update
    if torch_too:
        update = kinds["global"]()
        found = alternate(
            {"global": update, TORCH: partial(with_torch, model)},
            max(1, rounds // 5),
            {"global": partial(undo, model), TORCH: partial(undo, model)},
            time.process_time,
        )
        seconds[TORCH], seconds["global beside torch"] = found[TORCH], found["global"]
        memory[TORCH] = peak_memory(partial(with_torch, model), before=partial(undo, model))
        undo(model)
    found = alternate({PASS: partial(one_pass, model), MASK: partial(compare, model)}, rounds, clock=time.process_time)
    seconds[MASK], seconds[f"{PASS} beside {MASK}"], memory[MASK] = found[MASK], found[PASS], None
    scored = {name: passes(model, scope=name) for name in ("global", "local") if name in kinds}
    rows = []
    for name in [*kinds, MASK, *([TORCH] if torch_too else [])]:
        row = {
            "size": size,
            "weights": weights,
            "targets": len(model),
            "update": name,
            "seconds": significant(median(seconds[name])),
            "nanoseconds_per_weight": significant(1e9 * median(seconds[name]) / weights),
            "peak_memory_by_weights": None if memory[name] is None else round(memory[name] / (4 * weights), 3),
        }
        if name in scored:
            row["passes"] = round(scored[name], 2)
        if name == TORCH:
            row["ratio_to_global"] = significant(ratio(seconds[TORCH], seconds["global beside torch"]))
        else:
            row["ratio_to_pass"] = significant(ratio(seconds[name], seconds[f"{PASS} beside {name}"]))
        rows.append(row)
    return rows


def plot(rows: list[dict[str, Any]]) -> None:
    """Plot time and memory against the number of weights."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for name in dict.fromkeys(row["update"] for row in rows):
        found = [row for row in rows if row["update"] == name]
        weights = [row["weights"] for row in found]
        style = {"marker": "o", "label": name, "linestyle": "--" if name == TORCH else "-"}
        left.loglog(weights, [row["seconds"] for row in found], **style)
        if found[0]["peak_memory_by_weights"] is not None:
            right.loglog(weights, [row["peak_memory_by_weights"] for row in found], **style)
    left.set_ylabel("time per update (s)")
    right.set_ylabel("peak extra memory (weights = 1)")
    for axes in (left, right):
        axes.set_xlabel("weights")
        axes.grid(alpha=0.3, which="both")
    left.legend(fontsize=8)
    figure.savefig(RESULTS / "mask_update.png", dpi=120)


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--sizes", nargs="+", choices=SIZES)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for size in options.sizes or (SIZES if options.full else ["1 M", "10 M", "100 M"]):
        count, side = SIZES[size]
        weights = count * side * side
        rounds = options.rounds or max(
            2, min(20, 4 * 10**8 // weights) if options.full else min(5, 3 * 10**8 // weights)
        )
        found = measure(size, rounds, weights < 10**8 or (options.full and weights < 10**9), options.full)
        head = [f"{size} weights", "s", "ns per weight", "x one pass", "x global", "peak memory / weights"]
        columns = ["seconds", "nanoseconds_per_weight", "ratio_to_pass", "ratio_to_global", "peak_memory_by_weights"]
        cells = [[row["update"], *(f"{row[c]:g}" if row.get(c) is not None else "" for c in columns)] for row in found]
        print(table([head, *cells]), end="\n\n", flush=True)
        rows += found
    save("mask_update", options.full, rows)
    plot(rows)


if __name__ == "__main__":
    main()
