"""What recovery after pruning gains: `python examples/benchmarks/reconstruction.py [--models NAME ...] [setting ...]`.

The models, data and scores of post_training.py, pruned without training: SmolLM2-135M and all-MiniLM-L6-v2 by Wanda,
block by block, and a CNN by magnitude, ranked over all of its layers, whose batch norms are recalibrated before. Then
masks are refined by at most 25 swaps in each row, or the weights that are left are fitted with the default
`Reconstruction()`, or both. Draws of calibration data differ for SmolLM2; draw 0 is that of post_training.py, whose
rows stand beside these in the tables.

Each measurement is appended to results/reconstruction.jsonl when it is finished, and is not repeated: delete lines to
measure again. The tables of docs/strategies/reconstruction.md are written from that file.
"""

import argparse
import copy
import json
import os
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

from marked import replace, spread, table
from post_training import MODELS, SETTINGS, Task, accuracy, shown, smollm2
from timing import RESULTS, load, machine, quiet
from torch import nn

from lightning_prune import Reconstruction, Wanda, prune, recalibrate, sparsegpt, sparsity

sys.path.insert(0, str(Path(__file__).with_name("evidence")))
from tasks import TASKS

PATH = RESULTS / "reconstruction.jsonl"
PAGE = Path(__file__).parents[2] / "docs" / "strategies" / "reconstruction.md"
DRAWS, SWAPS = 3, 25
LANGUAGE = "SmolLM2-135M"
MASK = {LANGUAGE: "Wanda", "all-MiniLM-L6-v2": "Wanda", "CNN": "magnitude, global"}
LONGER = ", reconstructed in 400 steps"  # of the CNN, which is one block
RECOVERY: dict[str, dict[str, Any]] = {
    "": {},
    ", refined": {"refine": SWAPS},
    ", reconstructed": {"reconstruct": True},
    ", refined and reconstructed": {"refine": SWAPS, "reconstruct": True},
    LONGER: {"reconstruct": Reconstruction(steps=400)},
}
DRAWN = ("Wanda", "Wanda, reconstructed", "SparseGPT")  # for each draw
Row = dict[str, Any]


def measure(task: Task, setting: str, method: str, draw: int) -> Row:
    """Prune a copy of the model, and score it."""
    model, (zeros, granularity), began = copy.deepcopy(task.model), SETTINGS[setting], time.perf_counter()
    common: dict[str, Any] = {"granularity": granularity, "targets": [f"{task.blocks}.*"], "data": task.data}
    by_block = {**common, "sequential": task.blocks}
    if method == "SparseGPT":
        sparsegpt(model, zeros, **by_block)
    elif task.name == "CNN":  # one block, by magnitude; its outputs are those with statistics of the whole training
        recalibrate(model, task.data)
        prune(model, zeros, **common, **RECOVERY[method.removeprefix(MASK["CNN"])])
    else:
        prune(model, zeros, criterion=Wanda(), scope="local", **by_block, **RECOVERY[method.removeprefix("Wanda")])
    seconds = time.perf_counter() - began
    found = {"sparsity": round(sparsity(model, targets=[f"{task.blocks}.*"]), 6), "seconds": round(seconds, 1)}
    place = {"model": task.name, "setting": setting, "method": method, "draw": draw}
    return {**place, "score": round(scored(task, model, method), 4), **found}


def scored(task: Task, model: nn.Module, method: str) -> float:
    """Return the score; the batch norms of the CNN are recalibrated, unless they were fitted."""
    if task.name == "CNN" and "reconstructed" in method:
        return accuracy(model.eval(), TASKS["cnn"].data(0).val_dataloader())
    return task.score(model)


def read() -> list[Row]:
    """Return the rows so far, and those of the other benchmark on the same data."""
    rows = [{**row, "draw": 0} for row in load("post_training")["rows"] if row["setting"] in SETTINGS]
    lines = PATH.read_text().splitlines() if PATH.exists() else []
    return rows + [{"model": LANGUAGE, **json.loads(line)} for line in lines]


def drawn_table(rows: list[Row]) -> str:
    """Return the mean and the deviation of the perplexities of all draws, or those of the draws that are there."""
    scores: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["model"] == LANGUAGE:
            scores.setdefault((row["setting"], row["method"]), []).append(row["score"])
    lines = [[setting, *(cell(scores.get((setting, method), [])) for method in DRAWN)] for setting in SETTINGS]
    return table(["sparsity", *DRAWN], lines)


def cell(scores: list[float]) -> str:
    """Return perplexities as a cell of the table."""
    return spread(scores) if len(scores) == DRAWS else ", ".join(f"{score:.1f}" for score in scores)


def model_table(rows: list[Row]) -> str:
    """Return the scores of draw 0, with a row for each model and sparsity."""
    scores = {(row["model"], row["setting"], row["method"]): row["score"] for row in rows if row["draw"] == 0}
    lines = []
    for model, setting in product(MODELS, SETTINGS):
        cells = [scores.get((model, setting, method)) for method in methods_of(model)]
        if any(score is not None for score in cells[1:4]):
            lines.append([f"{model}, {setting}", *("" if score is None else shown(model, score) for score in cells)])
    return table(["model, sparsity", "mask", "refined", "reconstructed", "both", "in 400 steps", "SparseGPT"], lines)


def methods_of(model: str) -> list[str]:
    """Return how a model is pruned, in the order of the columns."""
    return [*(MASK[model] + end for end in RECOVERY), "SparseGPT"]


def missing(rows: list[Row], model: str, draw: int, settings: list[str]) -> list[tuple[str, str]]:
    """Return the settings and methods of a draw that are not measured yet."""
    known = {(row["setting"], row["method"]) for row in rows if (row["model"], row["draw"]) == (model, draw)}
    methods = DRAWN if draw else [m for m in methods_of(model) if model == "CNN" or not m.endswith(LONGER)]
    return [pair for pair in product(settings, methods) if pair not in known]


def main() -> None:
    """Measure what is missing, print the tables and write them into the docs."""
    options = argparse.ArgumentParser(description="Measure what recovery after pruning gains.")
    options.add_argument("settings", nargs="*", metavar="setting", help=", ".join(SETTINGS))
    options.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    args = options.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    quiet()
    rows = read()
    for draw, model in [
        (draw, model) for draw in range(DRAWS) for model in args.models if not draw or model == LANGUAGE
    ]:
        pairs = missing(rows, model, draw, args.settings or list(SETTINGS))
        task = (smollm2(draw) if model == LANGUAGE else MODELS[model]()) if pairs else None
        for setting, method in pairs if task else ():
            rows.append(measure(task, setting, method, draw))
            print(rows[-1], flush=True)
            with PATH.open("a") as file:
                file.write(json.dumps({**rows[-1], "machine": machine()}) + "\n")
    for name, found in (("reconstruction", drawn_table(rows)), ("recovery", model_table(rows))):
        print(found)
        replace(PAGE, name, found)


if __name__ == "__main__":
    main()
