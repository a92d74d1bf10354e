"""Test what the papers claim: `python examples/benchmarks/evidence [--full]`.

Small networks on real data, five seeds, the same budget for all methods of a task, and the callbacks as users run them.
Finished runs are not repeated: delete results/evidence.jsonl to start over.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import shapes
from claims import CLAIMS, DENSE, PEERS
from drawing import draw
from methods import GROUPS
from report import write
from running import Results, Setting

SEEDS = range(5)
ROOT, RESULTS = Path(__file__).parents[3], Path(__file__).parents[1] / "results"
LEVELS = (0.995, 0.99, 0.98, 0.95, 0.9)
DENSE_FIRST = ("gradual", "one-shot", "ACDC", "ADMM", "gradual, ERK", "one-shot, random")
NEURON_LEVELS = {"mnist": (0.5, 0.75, 0.9, 0.95), "cnn": (0.3, 0.5, 0.7)}
NEURONS = ("random", "L2", "Taylor", "entropy, low first", "entropy, high first", "FPGM", "APoZ")
FINE_TUNED = ("one-shot at start", "one-shot at start, uniform", "one-shot at start, random", "gradual", "gradual, ERK")


def quick() -> list[Setting]:
    """Return the settings of the claims and the peers, the most important first."""
    settings = [setting for claim in CLAIMS for setting in (claim.one, claim.other)]
    settings.sort(key=lambda setting: setting.task == "rounds")  # the longest last
    return [DENSE, *settings, *(setting for pair in PEERS["mnist"] for setting in pair), Setting("mnist", "ACDC", 0.98)]


def full() -> list[Setting]:
    """Return the settings of the curves and of the larger dataset."""
    compared = (*DENSE_FIRST, *(method for methods in GROUPS.values() for method in methods))
    curves = [Setting("mnist", method, level) for level in LEVELS for method in compared]
    neurons = [
        Setting(task, f"neurons, {name}", level)
        for task, levels in NEURON_LEVELS.items()
        for level in levels
        for name in NEURONS
    ]
    fine_tuned = [
        Setting(task, method, level)
        for task in ("fashion", "cnn")
        for method, levels in [("dense", (0.0,)), *((name, (0.98, 0.95, 0.9)) for name in FINE_TUNED)]
        for level in levels
    ]
    others = [Setting("fashion-10", "dense", 0.0), *(setting for pair in PEERS["fashion-10"] for setting in pair)]
    shaped = [Setting("mnist", method, level) for level in shapes.SHAPED_LEVELS for method in shapes.SHAPED]
    return [*curves, *shaped, *neurons, *others, *fine_tuned, *trained()]


def trained() -> list[Setting]:
    """Return the settings of the shapes of zeros in trained networks, where rows can be permuted."""
    wanted = [(method, level) for method, levels in shapes.TRAINED.items() for level in levels]
    return [Setting(task, method, level) for task in ("fashion", "cnn") for method, level in wanted]


def main() -> None:
    """Run what is missing, then write the tables and the figure."""
    parser = argparse.ArgumentParser(description="Test what the papers claim.")
    parser.add_argument("--full", action="store_true", help="all sparsities, and Fashion-MNIST: takes hours")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of processes, one core each")
    parser.add_argument("--tables", action="store_true", help="run nothing, only write the tables and the figure")
    args = parser.parse_args()
    results = Results(RESULTS / "evidence.jsonl")
    if not args.tables:
        results.fill([*quick(), *(full() if args.full else [])], SEEDS, args.jobs)
    draw(results, SEEDS, ROOT / "docs" / "evidence.png")
    write(results, SEEDS, ROOT, shapes.SHAPED, shapes.SHAPED_LEVELS)


if __name__ == "__main__":
    main()
