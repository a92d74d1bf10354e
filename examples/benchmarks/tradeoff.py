"""Accuracy against measured time, in two pictures: `python examples/benchmarks/tradeoff.py [--measure]`.

LeNet-300-100 on 5,000 digits and on Fashion-MNIST and a CNN on Fashion-MNIST, by the shape of their zeros, with the
accuracies of `evidence` (five seeds, recorded in results/evidence.jsonl), and the feed-forward layers of SmolLM2-135M
with the perplexities of `feed_forward`. What permuted rows gain on the digits is from `permutation`. Times are CPU time
of one core, medians of rounds in which all take turns, of networks pruned in the same shape: a batch of 64, or 64
tokens. Each form runs with torch, converted by `to_fast`, and with ONNX Runtime, which multiplies by zeros unless they
are in groups of rows; the faster of the two counts.
Without `--measure` the pictures are drawn again from results/tradeoff.json.
"""

import copy
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from fast import compare, with_onnx
from marked import replace, spread, table
from runs import Runs
from shapes import BLOCKS, DENSE, LEVELS, MASKED, NEURONS, PAIRS, PERMUTED, ROWS, SHAPED_LEVELS, SHAPES, TRAINED
from timing import RESULTS, describe, load, parser, save
from torch import Tensor, nn

from lightning_prune import Magnitude, prune, shrink
from lightning_prune.export.fast import fastest
from lightning_prune.export.shared_fan_in import SharedFanInLinear
from lightning_prune.export.sparse_layers import linear_layers, replaced

sys.path.insert(0, str(Path(__file__).with_name("evidence")))
from running import Results, Setting
from tasks import lenet, small_cnn

DOCS = Path(__file__).parents[2] / "docs"
BATCH, SEEDS = 64, range(5)
FORMS = {DENSE: (0.0,), **LEVELS}  # what is timed: the order of the rows changes no time


class FeedForward(nn.Module):
    """The feed-forward layers of a block of SmolLM2-135M."""

    def __init__(self, width: int = 576, hidden: int = 1536) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(tokens)) * self.up(tokens))


@dataclass(frozen=True)
class Panel:
    """A part of the picture: accuracies of a task, and times of a network of its kind."""

    title: str
    network: str
    measure: str = "test accuracy, %"


Network = tuple[Callable[[], nn.Module], tuple[int, ...], int]  # the shape of its inputs; how often a model has it
NETWORKS: dict[str, Network] = {
    "LeNet-300-100": (lenet, (BATCH, 784), 1),
    "CNN": (small_cnn, (BATCH, 1, 28, 28), 1),
    "SmolLM2-135M": (FeedForward, (BATCH, 576), 30),
}
PANELS = {
    "mnist": Panel("LeNet-300-100, 5,000 digits,\n20 epochs from scratch", "LeNet-300-100"),
    "digits": Panel("LeNet-300-100, 5,000 digits,\n10 epochs dense, pruned, then 10 more", "LeNet-300-100"),
    "fashion": Panel("LeNet-300-100, Fashion-MNIST,\n3 epochs dense, then 1 pruned", "LeNet-300-100"),
    "cnn": Panel("CNN, Fashion-MNIST,\n3 epochs dense, then 1 pruned", "CNN"),
    "smollm2": Panel("SmolLM2-135M, feed-forward layers,\nwithout training", "SmolLM2-135M", "perplexity"),
}
LABELS = {
    DENSE: "dense",
    MASKED: "single weights",
    **{name: f"SharedFanIn({rows})" for name, rows in ROWS.items()},
    BLOCKS: "Block(16, 16)",
    PAIRS: "NM(2, 4)",
    NEURONS: "neurons, removed by shrink",
}
LABELS |= {permuted: f"{LABELS[name]}, rows permuted" for permuted, name in PERMUTED.items()}
STYLES = {
    DENSE: ("#666666", "D"),
    MASKED: ("#999999", "x"),
    **dict(zip(ROWS, (("#f2c14e", "v"), ("#e8a33d", "^"), ("#d9730d", "o"), ("#8c4303", "s")), strict=True)),
    BLOCKS: ("#2e7d32", "P"),
    PAIRS: ("#1565c0", "*"),
    NEURONS: ("#5e35b1", "s"),
}
Accuracies = Callable[[str, float], list[float] | None]


def make(form: str, level: float, dense: nn.Module, inputs: Tensor) -> nn.Module:
    """Return a network of this form, with the shapes and zeros that training would give it."""
    model = copy.deepcopy(dense)
    ignore = ["head.*"] if hasattr(model, "head") else []
    hidden: dict[str, Any] = {"granularity": SHAPES.get(form), "scope": "local", "ignore": ignore}
    if form == NEURONS:
        prune(model, level, criterion=Magnitude(p=2), example_inputs=inputs, **hidden, min_density=0)
        model = shrink(model, inputs)
    elif form != DENSE:
        prune(model, level, **hidden)
    return model.requires_grad_(False).eval()


def in_groups(model: nn.Module, rows: int) -> nn.Module:
    """Return a copy whose linear layers with zeros are groups of rows, which ONNX Runtime can skip zeros in."""
    pruned = {name: layer for name, layer in linear_layers(model) if not layer.weight.all()}
    layers = {name: SharedFanInLinear.of(layer, rows, by_column=True) for name, layer in pruned.items()}
    return replaced(copy.deepcopy(model), layers)


def measure(network: str, rounds: int) -> list[dict[str, Any]]:
    """Return the milliseconds of every form of a network at every sparsity."""
    torch.manual_seed(0)
    build, shape, repeats = NETWORKS[network]
    dense, inputs = build().eval(), torch.randn(shape)
    kernels = any(isinstance(layer, nn.Conv2d) for layer in dense.modules())  # which `to_fast` leaves dense
    calls: dict[str, Callable[[], Any]] = {}
    keys = [(form, level) for form, levels in FORMS.items() for level in levels]
    with tempfile.TemporaryDirectory() as folder:
        for form, level in keys:
            model = make(form, level, dense, inputs)
            whole = form in (DENSE, NEURONS) or kernels
            calls[f"{form}, {level}, torch"] = partial(model if whole else fastest(model, inputs)[0], inputs)
            rows = 16 if form == BLOCKS else ROWS.get(form)
            if form in (DENSE, NEURONS) or (rows and not kernels):  # others take as long as the dense network
                part = Path(folder) / f"{form} {level}"
                part.mkdir()
                exported = model if rows is None else in_groups(model, rows)
                calls[f"{form}, {level}, ONNX Runtime"] = with_onnx(exported, inputs, str(part))
        found = compare(calls, rounds)
    measured = []
    for form, level in keys:
        as_dense = found[f"{DENSE}, 0.0, ONNX Runtime"]
        in_onnx = min(as_dense, found.get(f"{form}, {level}, ONNX Runtime", as_dense))
        times = {"torch": found[f"{form}, {level}, torch"], "ONNX Runtime": in_onnx}
        times = {name: repeats * ms for name, ms in times.items()}
        measured.append({"network": network, "form": form, "sparsity": level, "ms": times})
    return measured


def milliseconds(content: dict[str, Any], network: str) -> dict[tuple[str, float], float]:
    """Return how long each form of a network takes, in the faster of torch and ONNX Runtime."""
    rows = [row for row in content["rows"] if row["network"] == network]
    return {(row["form"], row["sparsity"]): min(row["ms"].values()) for row in rows}


def draw(ax: Any, places: dict[tuple[str, float], float], accuracies: Accuracies, forms: Sequence[str]) -> None:
    """Draw accuracy against time or speed, a line for each form."""
    for form in forms:
        timed = PERMUTED.get(form, form)
        drawn = [(level, values) for level in FORMS[timed] if (values := accuracies(form, level))]
        if not drawn:
            continue
        color, marker = STYLES[timed]
        ax.errorbar(
            [places[timed, level] for level, _ in drawn],
            [mean(values) for _, values in drawn],
            [stdev(values) if len(values) > 1 else 0 for _, values in drawn],
            color=color,
            marker=marker,
            markerfacecolor="white" if form in PERMUTED else color,
            capsize=2,
            linestyle="--" if form in PERMUTED else "-",
            linewidth=0 if form == MASKED else 1.5,
            elinewidth=0.8,
            label=None if form in PERMUTED else LABELS[form],
        )
    ax.grid(alpha=0.25)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def front_page(content: dict[str, Any], accuracies: Accuracies) -> Any:
    """Draw four forms of one network against their speed."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7.2, 4.0), dpi=160)
    times = milliseconds(content, PANELS["mnist"].network)
    speeds = {key: times[DENSE, 0.0] / ms for key, ms in times.items()}
    draw(ax, speeds, accuracies, (DENSE, MASKED, "groups of 16 rows", NEURONS))
    for form, offset, side in (("groups of 16 rows", (-6, -12), "right"), (NEURONS, (6, 5), "left")):
        for level in FORMS[form]:
            if values := accuracies(form, level):
                place = speeds[form, level], mean(values)
                ax.annotate(f"{level:.0%}", place, offset, textcoords="offset points", ha=side, color=STYLES[form][0])
    ax.set_xscale("log", base=2)
    ax.set_xlim(0.6, 13)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
    ax.set_title("LeNet-300-100, 5,000 digits: mean and deviation of five seeds", fontsize=10)
    ax.set_xlabel("speed on one core, over the fastest dense run (batch of 64)")
    ax.set_ylabel("test accuracy, %")
    ax.legend(loc="lower left", fontsize=8)
    figure.tight_layout()
    return figure


def all_shapes(content: dict[str, Any], accuracies: dict[str, Accuracies]) -> Any:
    """Draw all forms against their time, in a panel for each task."""
    import matplotlib.pyplot as plt

    rows = len(accuracies) // 2 + 1
    figure, axes = plt.subplots(rows, 2, figsize=(11, 4.0 * rows), dpi=130)
    for ax in axes.flat[len(accuracies) :]:
        ax.axis("off")  # the last one is for the legend
    for ax, task in zip(axes.flat, accuracies, strict=False):
        panel = PANELS[task]
        draw(ax, milliseconds(content, panel.network), accuracies[task], [DENSE, *TRAINED])
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        ax.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
        ax.set_title(panel.title, fontsize=10)
        ax.set_ylabel(panel.measure)
        if panel.measure == "perplexity":
            ax.set_yscale("log")
            ax.invert_yaxis()
    figure.supxlabel(
        "milliseconds on one core, the faster of torch and ONNX Runtime (64 images or tokens); dashed: rows permuted",
        fontsize=10,
    )
    handles, labels = axes.flat[0].get_legend_handles_labels()
    axes.flat[-1].legend(handles, labels, loc="center", fontsize=10)
    figure.tight_layout()
    return figure


def accuracy_table(accuracies: Accuracies) -> str:
    """Return the accuracies of all shapes, also with the rows in another order."""
    lines = []
    for form in TRAINED:
        found = [accuracies(form, level) for level in SHAPED_LEVELS]
        if all(found):
            lines.append([LABELS[form], *(spread(values) for values in found if values)])
    return table(["accuracy", *(f"{level:.0%}" for level in SHAPED_LEVELS)], lines)


def perplexity_table(perplexities: Accuracies) -> str:
    """Return the perplexities of the language model."""
    levels = sorted({level for form in LEVELS for level in LEVELS[form]})
    found = {form: [perplexities(form, level) for level in levels] for form in TRAINED}
    lines = [
        [LABELS[form], *(f"{value[0]:,.0f}" if value else "" for value in values)]
        for form, values in found.items()
        if any(values)
    ]
    return table(["perplexity", *(f"{level:.0%}" for level in levels)], lines)


def read() -> dict[str, Accuracies]:
    """Return the accuracies of each task."""
    results, runs = Results(RESULTS / "evidence.jsonl"), Runs(RESULTS / "feed_forward.jsonl")
    orders = Runs(RESULTS / "permutation.jsonl")

    def perplexities(form: str, level: float) -> list[float] | None:
        return [run["score"] for run in runs.have(shape=form, level=level)] or None

    def digits(form: str, level: float) -> list[float] | None:
        if (rows := ROWS.get(PERMUTED.get(form, form))) is None:
            return None
        found = orders.have(network=PANELS["digits"].network, rows=rows, level=level, permuted=form in PERMUTED)
        return [run["tuned"] for run in found] or None

    def accuracies(task: str, form: str, level: float) -> list[float] | None:
        return results.accuracies(Setting(task, form, level), SEEDS)

    found: dict[str, Accuracies] = {task: partial(accuracies, task) for task in PANELS}
    return found | {"digits": digits, "smollm2": perplexities}


def main() -> None:
    """Measure if asked to, and draw."""
    import matplotlib

    matplotlib.use("Agg")
    options = parser(str(__doc__).partition("\n")[0])
    options.add_argument("--measure", action="store_true", help="measure the times again")
    args = options.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if args.measure:
        save("tradeoff", args.full, [row for name in NETWORKS for row in measure(name, args.rounds or 31)])
    accuracies, content = read(), load("tradeoff")
    front_page(content, accuracies["mnist"]).savefig(DOCS / "tradeoff.png")
    all_shapes(content, accuracies).savefig(DOCS / "shapes.png")
    for task in accuracies.keys() - {"mnist", "digits"}:
        made = perplexity_table if PANELS[task].measure == "perplexity" else accuracy_table
        replace(DOCS / "speed.md", f"shapes {task}", made(accuracies[task]))
    print(f"{describe(content['machine'])}\nwritten: tradeoff.png and shapes.png in {DOCS}")


if __name__ == "__main__":
    main()
