"""What reconstruction after pruning gains: `python examples/benchmarks/reconstruction.py [setting ...]`.

SmolLM2-135M-Instruct (weights de-quantised from 4 bits), all linear layers of its 30 blocks, pruned without training:
perplexity on BBC news, in 16 windows of 256 tokens. Masks are chosen by Wanda, block by block, on 32 other windows, and
the weights that are left are then fitted with the default `Reconstruction()`. Three draws of calibration data; that of
draw 0 is the one of post_training.py, whose rows for Wanda and SparseGPT stand beside these in the table.

Each measurement is appended to results/reconstruction.jsonl when it is finished, and is not repeated: delete lines to
measure again. The table of docs/strategies/reconstruction.md is written from that file.
"""

import copy
import json
import os
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

from marked import replace, spread, table
from post_training import SETTINGS, Task, smollm2
from timing import RESULTS, load, machine, quiet

from lightning_prune import Wanda, prune, sparsegpt, sparsity

PATH = RESULTS / "reconstruction.jsonl"
DRAWS = 3
OPTIONS: dict[str, dict[str, Any]] = {
    "Wanda": {},
    "Wanda, reconstructed": {"reconstruct": True},
    "SparseGPT": {},
}
Row = dict[str, Any]


def measure(task: Task, setting: str, method: str, draw: int) -> Row:
    """Prune a copy of the model, and score it."""
    model, (zeros, granularity), began = copy.deepcopy(task.model), SETTINGS[setting], time.perf_counter()
    common: dict[str, Any] = {"granularity": granularity, "targets": [f"{task.blocks}.*"], "data": task.data}
    common["sequential"] = task.blocks
    if method == "SparseGPT":
        sparsegpt(model, zeros, **common)
    else:
        prune(model, zeros, criterion=Wanda(), scope="local", **common, **OPTIONS[method])
    seconds = time.perf_counter() - began
    found = {"sparsity": round(sparsity(model, targets=[f"{task.blocks}.*"]), 6), "seconds": round(seconds, 1)}
    return {"setting": setting, "method": method, "draw": draw, "score": round(task.score(model), 4), **found}


def read() -> list[Row]:
    """Return the rows so far, and those of the other benchmark on the same data."""
    kept = [row for row in load("post_training")["rows"] if row["model"] == "SmolLM2-135M"]
    rows = [{**row, "draw": 0} for row in kept if row["method"] in OPTIONS and row["setting"] in SETTINGS]
    lines = PATH.read_text().splitlines() if PATH.exists() else []
    return rows + [json.loads(line) for line in lines]


def make_table(rows: list[Row]) -> str:
    """Return the mean and the deviation of the perplexities of all draws, or those of the draws that are there."""
    scores: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        scores.setdefault((row["setting"], row["method"]), []).append(row["score"])
    lines = [[setting, *(cell(scores.get((setting, method), [])) for method in OPTIONS)] for setting in SETTINGS]
    return table(["sparsity", *OPTIONS], lines)


def cell(scores: list[float]) -> str:
    """Return perplexities as a cell of the table."""
    return spread(scores) if len(scores) == DRAWS else ", ".join(f"{score:.1f}" for score in scores)


def main() -> None:
    """Measure what is missing, print the table and write it into the docs."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    quiet()
    rows = read()
    known = {(row["draw"], row["setting"], row["method"]) for row in rows}
    settings = sys.argv[1:] or list(SETTINGS)
    for draw in range(DRAWS):
        missing = [pair for pair in product(settings, OPTIONS) if (draw, *pair) not in known]
        task = smollm2(draw) if missing else None
        for setting, method in missing if task else ():
            rows.append(measure(task, setting, method, draw))
            print(rows[-1], flush=True)
            with PATH.open("a") as file:
                file.write(json.dumps({**rows[-1], "machine": machine()}) + "\n")
    print(found := make_table(rows))
    replace(Path(__file__).parents[2] / "docs" / "strategies" / "reconstruction.md", "reconstruction", found)


if __name__ == "__main__":
    main()
