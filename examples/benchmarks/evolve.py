"""What a searched allocation gains: `python examples/benchmarks/evolve.py [setting ...]`.

SmolLM2-135M-Instruct (weights de-quantised from 4 bits), all linear layers of its 30 blocks, pruned by Wanda block by
block without training: perplexity on BBC news, in 16 windows of 256 tokens. The 32 windows that Wanda is calibrated on
are also the data of the search, which never sees the others. Rows of post_training.py for the same sparsity, with the
same in every layer and with OWL, stand beside it in the table.

Each measurement is appended to results/evolve.jsonl when it is finished, and is not repeated: delete lines to measure
again. A search that is interrupted resumes from a file in the temporary folder. The table of docs/strategies/evolve.md
is written from results/evolve.jsonl.
"""

import copy
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from marked import replace, table
from post_training import SETTINGS, Task, batches, smollm2
from runs import Runs
from timing import RESULTS, load, machine, quiet

from lightning_prune import Evolve, Wanda, prune, sparsity

PATH = RESULTS / "evolve.jsonl"
METHODS = ("Wanda", "Wanda, OWL", "Wanda, Evolve")
SEARCH: dict[str, Any] = {"offspring": 8, "survivors": (2, 1), "batches": (1, 2)}
GENERATIONS = {"60 %": 40, "70 %": 30, "50 %": 30}
Row = dict[str, Any]


def measure(task: Task, setting: str) -> Row:
    """Prune a copy of the model, and score it."""
    model, (zeros, _), began = copy.deepcopy(task.model), SETTINGS[setting], time.perf_counter()
    targets, path = [f"{task.blocks}.*"], Path(tempfile.gettempdir(), f"evolve {setting}.json")
    windows = batches([window for batch in task.data for window in batch], 1)
    resumed = path.exists()  # then the seconds are those since
    search = {"generations": GENERATIONS[setting], **SEARCH}
    scope = Evolve(**search, path=path)
    masks = prune(model, zeros, criterion=Wanda(), scope=scope, targets=targets, data=windows, sequential=task.blocks)
    found = {"sparsity": round(sparsity(model, targets=targets), 6), "seconds": round(time.perf_counter() - began, 1)}
    levels = {name: round(level, 4) for name, level in masks.sparsities().items()}
    row = {"model": task.name, "setting": setting, "method": "Wanda, Evolve", "score": round(task.score(model), 4)}
    found["resumed"] = resumed
    return {**row, **found, "search": search, "trials": len(json.loads(path.read_text())["scores"]), "levels": levels}


def read() -> list[Row]:
    """Return the rows so far, and those of the other benchmark on the same data."""
    rows = [row for row in load("post_training")["rows"] if row["model"] == "SmolLM2-135M"]
    return rows + Runs(PATH).rows


def make_table(rows: list[Row]) -> str:
    """Return the perplexities."""
    scores = {(row["setting"], row["method"]): row["score"] for row in rows}
    cells = {setting: [scores.get((setting, method)) for method in METHODS] for setting in sorted(GENERATIONS)}
    lines = [[name, *("" if score is None else f"{score:.1f}" for score in found)] for name, found in cells.items()]
    return table(["sparsity", *METHODS], lines)


def main() -> None:
    """Measure what is missing, print the table and write it into the docs."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    quiet()
    known = {row["setting"] for row in read() if row["method"] == "Wanda, Evolve"}
    missing = [setting for setting in sys.argv[1:] or GENERATIONS if setting not in known]
    task = smollm2() if missing else None
    for setting in missing if task else ():
        row = measure(task, setting)
        print({name: value for name, value in row.items() if name != "levels"}, flush=True)
        Runs(PATH).add(**row, machine=machine())
    print(found := make_table(read()))
    replace(Path(__file__).parents[2] / "docs" / "strategies" / "evolve.md", "evolve", found)


if __name__ == "__main__":
    main()
