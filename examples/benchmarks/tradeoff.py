"""Accuracy against measured time, in one picture: `python examples/benchmarks/tradeoff.py [--measure]`.

LeNet-300-100 on 5,000 digits. The accuracies are those of `evidence` (five seeds, recorded in results/evidence.jsonl),
the times CPU time of one core for a batch of 64, medians of rounds in which all take turns, of networks pruned in the
same shape. Each form runs with torch and, where it can be exported, ONNX Runtime; the faster of the two counts.
Without `--measure` the picture is drawn again from results/tradeoff.json.
"""

import copy
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from fast import compare, with_onnx
from timing import RESULTS, describe, load, parser, save
from torch import nn

from lightning_prune import Channel, Magnitude, SharedFanIn, prune, shrink
from lightning_prune.export.fast import fastest

sys.path.insert(0, str(Path(__file__).with_name("evidence")))
from running import Results, Setting
from tasks import lenet

PICTURE = Path(__file__).parents[2] / "docs" / "tradeoff.png"
BATCH, SEEDS = 64, range(5)
DENSE, MASKED, GROUPS, NEURONS = "dense", "weights", "groups of 16 rows", "neurons, L2"
LEVELS = {DENSE: (0.0,), MASKED: (0.8, 0.9, 0.95), GROUPS: (0.8, 0.9, 0.95), NEURONS: (0.5, 0.75, 0.9, 0.95)}
LABELS = {
    DENSE: "dense",
    MASKED: "single weights, as zeros in dense layers",
    GROUPS: "SharedFanIn(16), run by to_fast",
    NEURONS: "neurons, removed by shrink",
}


def make(form: str, level: float, dense: nn.Module, inputs: torch.Tensor) -> nn.Module:
    """Return a network of this form, with the shapes and zeros that training would give it."""
    model = copy.deepcopy(dense)
    if form == MASKED:
        prune(model, level, scope="local", ignore=["head.*"])
    elif form == GROUPS:
        prune(model, level, granularity=SharedFanIn(16), scope="local", ignore=["head.*"])
        model = fastest(model.requires_grad_(False), inputs)[0]
    elif form == NEURONS:
        prune(
            model,
            level,
            criterion=Magnitude(p=2),
            granularity=Channel(),
            scope="local",
            ignore=["head.*"],
            min_density=0,
        )
        model = shrink(model, inputs)
    return model.requires_grad_(False).eval()


def measure(rounds: int) -> list[dict[str, Any]]:
    """Return the milliseconds of every form at every sparsity."""
    torch.manual_seed(0)
    dense, inputs = lenet().eval(), torch.randn(BATCH, 784)
    calls: dict[str, Callable[[], Any]] = {}
    keys = [(form, level) for form, levels in LEVELS.items() for level in levels]
    with tempfile.TemporaryDirectory() as folder:
        for form, level in keys:
            model = make(form, level, dense, inputs)
            calls[f"{form}, {level}, torch"] = partial(model, inputs)
            if form != GROUPS:
                part = Path(folder) / f"{form} {level}"
                part.mkdir()
                calls[f"{form}, {level}, ONNX Runtime"] = with_onnx(model, inputs, str(part))
        found = compare(calls, rounds)
    rows = []
    for form, level in keys:
        times = {
            name: found[f"{form}, {level}, {name}"]
            for name in ("torch", "ONNX Runtime")
            if f"{form}, {level}, {name}" in found
        }
        rows.append({"form": form, "sparsity": level, "ms": times})
    return rows


def draw(content: dict[str, Any], accuracies: Callable[[str, float], list[float]]) -> None:
    """Draw accuracy against time, one line for each form."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    best = {(row["form"], row["sparsity"]): min(row["ms"].values()) for row in content["rows"]}
    unit = best[DENSE, 0.0]
    figure, ax = plt.subplots(figsize=(7.2, 4.0), dpi=160)
    styles = {DENSE: ("#666666", "D"), MASKED: ("#999999", "x"), GROUPS: ("#d9730d", "o"), NEURONS: ("#5e35b1", "s")}
    for form, levels in LEVELS.items():
        color, marker = styles[form]
        speed = [unit / best[form, level] for level in levels]
        found = [accuracies(form, level) for level in levels]
        ax.errorbar(
            speed,
            [mean(values) for values in found],
            [stdev(values) for values in found],
            color=color,
            marker=marker,
            capsize=2,
            linewidth=0 if form == MASKED else 1.5,
            elinewidth=0.8,
            label=LABELS[form],
        )
        if form in (GROUPS, NEURONS):
            for x, values, level in zip(speed, found, levels, strict=True):
                below = form == GROUPS
                ax.annotate(
                    f"{level:.0%}",
                    (x, mean(values)),
                    (-6, -12) if below else (6, 5),
                    textcoords="offset points",
                    ha="right" if below else "left",
                    color=color,
                )
    ax.set_xscale("log", base=2)
    ax.set_xlim(0.6, 13)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
    ax.set_xlabel("speed on one core, over the fastest dense run (batch of 64)")
    ax.set_ylabel("test accuracy, %")
    ax.set_title("LeNet-300-100, 5,000 digits: mean and deviation of five seeds", fontsize=10)
    ax.legend(loc="lower left", fontsize=8)
    ax.grid(alpha=0.25)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(PICTURE)


def main() -> None:
    """Measure if asked to, and draw."""
    options = parser(str(__doc__).partition("\n")[0])
    options.add_argument("--measure", action="store_true", help="measure the times again")
    args = options.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if args.measure:
        save("tradeoff", args.full, measure(args.rounds or 31))
    results = Results(RESULTS / "evidence.jsonl")
    draw(load("tradeoff"), lambda form, level: results.accuracies(Setting("mnist", form, level), SEEDS))
    print(f"{describe(load('tradeoff')['machine'])}\nwritten: {PICTURE}")


if __name__ == "__main__":
    main()
