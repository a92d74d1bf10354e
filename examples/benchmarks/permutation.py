"""What permuted rows gain after training: `python examples/benchmarks/permutation.py`.

SmolLM2-135M-Instruct (weights de-quantised from 4 bits): the gate and up projections of its 30 blocks in groups of rows
that share their inputs, by Wanda, without training; perplexity on BBC news, in 16 windows of 256 tokens that the
calibration does not see. Once with the channels in the order of the model, and once permuted by the same scores.

Each measurement is appended to results/permutation.jsonl when it is finished, and is not repeated: delete lines to
measure again. The table of docs/speed.md is written from there.
"""

import copy
import os
import time
from itertools import product
from pathlib import Path

from marked import replace, table
from post_training import Task, smollm2
from runs import Runs
from timing import RESULTS, machine, quiet

from lightning_prune import SharedFanIn, Wanda, permute_rows, prune, sparsity

PATH = RESULTS / "permutation.jsonl"
ROWS, LEVELS = (4, 16), (0.3, 0.5)
TARGETS = ["*.gate_proj.*", "*.up_proj.*"]


def measure(task: Task, rows: int, level: float, permuted: bool) -> dict[str, float]:
    """Prune a copy of the model, and return its perplexity, and how long its rows took to permute."""
    model, began = copy.deepcopy(task.model), time.perf_counter()
    if permuted:
        inputs = task.data[0][:1, :16]
        permute_rows(model, inputs, sparsity=level, rows=rows, criterion=Wanda(), data=task.data, inplace=True)
    seconds = time.perf_counter() - began
    options = {"granularity": SharedFanIn(rows), "scope": "local", "targets": TARGETS}
    prune(model, level, criterion=Wanda(), data=task.data, **options)
    zeros = sparsity(model, targets=TARGETS)
    return {"score": round(task.score(model), 4), "sparsity": round(zeros, 6), "seconds": round(seconds, 1)}


def make_table(runs: Runs) -> str:
    """Return the perplexities."""
    lines = []
    for level, rows in product(LEVELS, ROWS):
        found = [runs.have(level=level, rows=rows, permuted=permuted) for permuted in (False, True)]
        lines.append([f"{level:.0%}", str(rows), *(f"{have[0]['score']:.1f}" if have else "" for have in found)])
    return table(["sparsity", "rows in a group", "as they are", "permuted"], lines)


def main() -> None:
    """Measure what is missing, print the table and write it into the docs."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    quiet()
    runs = Runs(PATH)
    keys = [{"rows": r, "level": level, "permuted": p} for level, r, p in product(LEVELS, ROWS, (False, True))]
    missing = [key for key in keys if not runs.have(**key)]
    task = smollm2() if missing else None
    for key in missing if task else ():
        runs.add(**key, **measure(task, **key), machine=machine())
        print({**key, **runs.rows[-1]}, flush=True)
    print(found := make_table(runs))
    replace(Path(__file__).parents[2] / "docs" / "speed.md", "permuted", found)


if __name__ == "__main__":
    main()
