"""Test what the papers claim: `python examples/benchmarks/evidence [--full]`.

Small networks on real data, five seeds, the same budget for all methods of a task, and the code that users run. What
was run already is not run again: delete results/evidence.jsonl to begin anew.
"""

import argparse
import os
from pathlib import Path

from claims import CLAIMS, DENSE, PEERS
from drawing import draw
from report import claims, grid, peers, replace
from running import Results, Setting

SEEDS = range(5)
ROOT, RESULTS = Path(__file__).parents[3], Path(__file__).parents[1] / "results"
ENDS, BETWEEN = (0.995, 0.9), (0.99, 0.95)
CURVES = ("gradual", "one-shot", "RigL", "static", "SNIP", "SET", "ACDC", "gradual, ERK", "gradual, uniform")


def quick() -> list[Setting]:
    """Return what the claims and the peers need, the most important first."""
    settings = [setting for claim in CLAIMS for setting in (claim.one, claim.other)]
    settings.sort(key=lambda setting: setting.task == "rounds")  # the longest last
    return [DENSE, *settings, *(setting for pair in PEERS for setting in pair), Setting("mnist", "ACDC", 0.98)]


def full() -> list[Setting]:
    """Return the curves, and the larger data."""
    fashion = [
        Setting(task, method, level)
        for task in ("fashion", "cnn")
        for level in (0.98, 0.95, 0.9)
        for method in ("gradual", "one-shot", "gradual, ERK", "gradual, uniform", "one-shot, random")
    ]
    curves = [Setting("mnist", method, level) for levels in (ENDS, BETWEEN) for method in CURVES for level in levels]
    return [*curves, *(Setting(task, "dense", 0.0) for task in ("fashion", "cnn")), *fashion]


def main() -> None:
    """Run what is missing, and write tables and the picture."""
    parser = argparse.ArgumentParser(description="Test what the papers claim.")
    parser.add_argument("--full", action="store_true", help="all sparsities, and Fashion-MNIST: an hour or two")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, one core each")
    parser.add_argument("--tables", action="store_true", help="run nothing, only write tables and the picture")
    args = parser.parse_args()
    results = Results(RESULTS / "evidence.jsonl")
    if not args.tables:
        results.fill([*quick(), *(full() if args.full else [])], SEEDS, args.jobs)
    draw(results, SEEDS, ROOT / "docs" / "evidence.png")
    replace(ROOT / "README.md", "claims", claims(results, SEEDS))
    replace(ROOT / "docs" / "evidence.md", "peers", peers(results, SEEDS))
    replace(ROOT / "docs" / "evidence.md", "grid", grid(results, SEEDS))


if __name__ == "__main__":
    main()
