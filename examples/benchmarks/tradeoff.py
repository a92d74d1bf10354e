"""Accuracy against measured time, in two pictures: `python examples/benchmarks/tradeoff.py [--measure]`.

LeNet-300-100 on 5,000 digits and on Fashion-MNIST, by the shape of its zeros. The accuracies are those of `evidence`
(five seeds, recorded in results/evidence.jsonl), the times CPU time of one core for a batch of 64, medians of rounds in
which all take turns, of networks pruned in the same shape. Each form runs with torch, converted by `to_fast`, and with
ONNX Runtime, which multiplies by zeros; the faster of the two counts.
Without `--measure` the pictures are drawn again from results/tradeoff.json.
"""

import copy
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from fast import compare, with_onnx
from marked import replace, spread, table
from timing import RESULTS, describe, load, parser, save
from torch import nn

from lightning_prune import NM, Block, Channel, Granularity, Magnitude, SharedFanIn, Weight, prune, shrink
from lightning_prune.export.fast import fastest

sys.path.insert(0, str(Path(__file__).with_name("evidence")))
from methods import SHARED
from running import Results, Setting
from tasks import lenet

DOCS = Path(__file__).parents[2] / "docs"
BATCH, SEEDS = 64, range(5)
DENSE, MASKED, NEURONS, PAIRS, BLOCKS = "dense", "weights", "neurons, L2", "2:4, gradual", "blocks of 16 x 16"
GROUPS = {f"groups of {rows} rows": rows for rows in SHARED}
SHAPED = dict.fromkeys((MASKED, *GROUPS, BLOCKS), (0.8, 0.9, 0.95))
FORMS = {DENSE: (0.0,), **SHAPED, PAIRS: (0.5,), NEURONS: (0.5, 0.75, 0.9, 0.95)}
PANELS = {
    "mnist": "5,000 digits, 20 epochs from scratch",
    "fashion": "Fashion-MNIST, 3 epochs dense, then 1 pruned",
}
LABELS = {
    DENSE: "dense",
    MASKED: "single weights",
    **{name: f"SharedFanIn({rows})" for name, rows in GROUPS.items()},
    BLOCKS: "Block(16, 16)",
    PAIRS: "NM(2, 4)",
    NEURONS: "neurons, removed by shrink",
}
STYLES = {
    DENSE: ("#666666", "D"),
    MASKED: ("#999999", "x"),
    **dict(zip(GROUPS, (("#f2c14e", "v"), ("#e8a33d", "^"), ("#d9730d", "o"), ("#8c4303", "s")), strict=True)),
    BLOCKS: ("#2e7d32", "P"),
    PAIRS: ("#1565c0", "*"),
    NEURONS: ("#5e35b1", "s"),
}
Accuracies = Callable[[Setting], list[float] | None]


def make(form: str, level: float, dense: nn.Module, inputs: torch.Tensor) -> nn.Module:
    """Return a network of this form, with the shapes and zeros that training would give it."""
    model = copy.deepcopy(dense)
    hidden: dict[str, Any] = {"scope": "local", "ignore": ["head.*"]}
    if form == DENSE:
        return model.requires_grad_(False).eval()
    if form == NEURONS:
        channels: dict[str, Any] = {"criterion": Magnitude(p=2), "granularity": Channel(), "example_inputs": inputs}
        prune(model, level, **channels, **hidden, min_density=0)
        return shrink(model, inputs).requires_grad_(False).eval()
    shapes: dict[str, Granularity] = {name: SharedFanIn(rows) for name, rows in GROUPS.items()}
    shapes |= {MASKED: Weight(), BLOCKS: Block(16, 16), PAIRS: NM(2, 4)}
    prune(model, level, granularity=shapes[form], **hidden)
    return fastest(model.requires_grad_(False).eval(), inputs)[0].eval()


def measure(rounds: int) -> list[dict[str, Any]]:
    """Return the milliseconds of every form at every sparsity."""
    torch.manual_seed(0)
    dense, inputs = lenet().eval(), torch.randn(BATCH, 784)
    calls: dict[str, Callable[[], Any]] = {}
    keys = [(form, level) for form, levels in FORMS.items() for level in levels]
    with tempfile.TemporaryDirectory() as folder:
        for form, level in keys:
            model = make(form, level, dense, inputs)
            calls[f"{form}, {level}, torch"] = partial(model, inputs)
            if form in (DENSE, NEURONS):  # zeros take ONNX Runtime as long as other numbers
                part = Path(folder) / f"{form} {level}"
                part.mkdir()
                calls[f"{form}, {level}, ONNX Runtime"] = with_onnx(model, inputs, str(part))
        found = compare(calls, rounds)
    rows = []
    for form, level in keys:
        in_onnx = found.get(f"{form}, {level}, ONNX Runtime", found[f"{DENSE}, 0.0, ONNX Runtime"])
        times = {"torch": found[f"{form}, {level}, torch"], "ONNX Runtime": in_onnx}
        rows.append({"form": form, "sparsity": level, "ms": times})
    return rows


def speeds(content: dict[str, Any]) -> dict[tuple[str, float], float]:
    """Return how many times faster each form is than the fastest dense run."""
    best = {(row["form"], row["sparsity"]): min(row["ms"].values()) for row in content["rows"]}
    return {key: best[DENSE, 0.0] / ms for key, ms in best.items()}


def draw(ax: Any, task: str, content: dict[str, Any], accuracies: Accuracies, forms: Sequence[str]) -> None:
    """Draw accuracy against speed, a line for each form."""
    speed = speeds(content)
    for form in forms:
        drawn = [(level, values) for level in FORMS[form] if (values := accuracies(Setting(task, form, level)))]
        if not drawn:
            continue
        color, marker = STYLES[form]
        ax.errorbar(
            [speed[form, level] for level, _ in drawn],
            [mean(values) for _, values in drawn],
            [stdev(values) for _, values in drawn],
            color=color,
            marker=marker,
            capsize=2,
            linewidth=0 if form == MASKED else 1.5,
            elinewidth=0.8,
            label=LABELS[form],
        )
        if form in ("groups of 16 rows", NEURONS):
            for level, values in drawn:
                below = form != NEURONS
                ax.annotate(
                    f"{level:.0%}",
                    (speed[form, level], mean(values)),
                    (-6, -12) if below else (6, 5),
                    textcoords="offset points",
                    ha="right" if below else "left",
                    color=color,
                )
    ax.set_xscale("log", base=2)
    ax.set_xlim(0.6, 13)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
    ax.set_title(PANELS[task], fontsize=10)
    ax.grid(alpha=0.25)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def pictures(content: dict[str, Any], accuracies: Accuracies) -> None:
    """Draw the one of the front page, and that with all shapes and tasks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    over = "speed on one core, over the fastest dense run (batch of 64)"
    figure, ax = plt.subplots(figsize=(7.2, 4.0), dpi=160)
    draw(ax, "mnist", content, accuracies, (DENSE, MASKED, "groups of 16 rows", NEURONS))
    ax.set_title("LeNet-300-100, 5,000 digits: mean and deviation of five seeds", fontsize=10)
    ax.set_xlabel(over)
    ax.set_ylabel("test accuracy, %")
    ax.legend(loc="lower left", fontsize=8)
    figure.tight_layout()
    figure.savefig(DOCS / "tradeoff.png")
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.8), dpi=130)
    for ax, task in zip(panels, PANELS, strict=True):
        draw(ax, task, content, accuracies, list(LABELS))
    panels[0].set_ylabel("test accuracy of LeNet-300-100, %: five seeds")
    figure.supxlabel(over, fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.88))
    figure.savefig(DOCS / "shapes.png")


def accuracy_table(accuracies: Accuracies) -> str:
    """Return the accuracies of all shapes on Fashion-MNIST, also with the rows in another order."""
    lines = []
    for name in SHAPED:
        for form, label in ((name, LABELS[name]), (f"{name}, permuted", f"{LABELS[name]}, rows permuted")):
            found = [accuracies(Setting("fashion", form, level)) for level in SHAPED[name]]
            if any(found):
                lines.append([label, *("" if values is None else spread(values) for values in found)])
    return table(["accuracy", *(f"{level:.0%}" for level in SHAPED[MASKED])], lines)


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
    results, content = Results(RESULTS / "evidence.jsonl"), load("tradeoff")
    accuracies = partial(results.accuracies, seeds=SEEDS)
    pictures(content, accuracies)
    replace(DOCS / "speed.md", "shapes", accuracy_table(accuracies))
    print(f"{describe(content['machine'])}\nwritten: tradeoff.png and shapes.png in {DOCS}")


if __name__ == "__main__":
    main()
