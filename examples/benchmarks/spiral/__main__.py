"""How few weights does each method need? `python examples/benchmarks/spiral [--seeds 3] [--batch 512]`.

The Cubist Spiral of Zhang and Papyan (2024, arXiv:2407.04075): 49,982 points on two arms, and a four-layer MLP of 560
weights. A method prunes it to 50 weights; to fewer and fewer until its accuracy is below 95 %, and to more and more
until it is 99.5 %. Every run is one ``fit`` of Lightning's Trainer. Finished runs are not repeated: delete
results/spiral.jsonl to start over. ``--batch 128`` makes as many optimizer steps as the paper, four times as many.
"""

import argparse
import logging
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "evidence"))
from compared import NAMES, SMALL, TICKETS
from drawing import panels_of
from marked import replace
from outcome import draw, make_table, small_table
from running import Results
from searching import Accuracies, search

ROOT, PATH = Path(__file__).parents[3], Path(__file__).parents[1] / "results" / "spiral.jsonl"
DENSE_SEEDS = 5


def fill(runs: Accuracies, seeds: int, names: list[str]) -> None:
    """Run what is missing, seed by seed."""
    if find_spec("fasterai") is None and any("fasterai" in name for name in names):
        print("fasterai is skipped, since it is not installed: pip install --no-deps fasterai fastcore einops")
        names = [name for name in names if "fasterai" not in name]
    for seed in range(DENSE_SEEDS):
        for method, (first, second, third) in SMALL.items():
            runs.accuracy(method, 2 * first + first * second + second * third + third, seed)
    for part in ([name for name in names if name not in TICKETS], [name for name in names if name in TICKETS]):
        for seed in range(seeds):  # what takes five trainings comes last
            for method in part:
                search(runs, method, seed)


def main() -> None:
    """Run what is missing, then write the table and the figure."""
    parser = argparse.ArgumentParser(description="Count the weights that each method needs.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--methods", nargs="*", default=list(NAMES), choices=NAMES)
    parser.add_argument("--tables", action="store_true", help="run nothing, only write the table and the figure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    runs = Accuracies(PATH, args.batch)
    if not args.tables:
        fill(runs, args.seeds, args.methods)
    rows, page = [row for row in runs.rows if row["batch"] == args.batch], ROOT / "docs" / "spiral.md"
    replace(page, f"batch-{args.batch}", make_table(rows))
    replace(page, f"small-{args.batch}", small_table(rows))
    colours = panels_of(Results(PATH.with_name("evidence.jsonl")), range(5)).values()
    draw(rows, colours, ROOT / "docs" / f"spiral-{args.batch}.png")


if __name__ == "__main__":
    main()
