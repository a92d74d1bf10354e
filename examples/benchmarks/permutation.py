"""What permuted rows gain: `python examples/benchmarks/permutation.py [--network]`.

With `--network`, LeNet-300-100 on 5,000 digits, trained for 10 epochs, its hidden layers pruned by magnitude in groups
of 4 to 32 rows, and fine-tuned for 10 epochs, with five seeds. Otherwise:

SmolLM2-135M-Instruct (weights de-quantised from 4 bits): the gate and up projections of its 30 blocks in groups of rows
that share their inputs, by Wanda, without training; perplexity on BBC news, in 16 windows of 256 tokens that the
calibration does not see. Once with the channels in the order of the model, and once permuted by the same scores.

Each measurement is appended to results/permutation.jsonl when it is finished, and is not repeated: delete lines to
measure again. The tables of docs/speed.md are written from there.
"""

import copy
import os
import sys
import time
from itertools import product
from pathlib import Path

from marked import replace, spread, table
from post_training import Task, smollm2
from runs import Runs
from shapes import ROWS as GROUPS
from shapes import SHAPED_LEVELS
from timing import RESULTS, machine, quiet

from lightning_prune import ConstantSparsity, SharedFanIn, Wanda, permute_rows, prune, sparsity

sys.path.insert(0, str(Path(__file__).with_name("evidence")))
from second_order import accuracy, train
from tasks import TASKS, Classifier

PATH = RESULTS / "permutation.jsonl"
ROWS, LEVELS = (4, 16), (0.3, 0.5)
TARGETS = ["*.gate_proj.*", "*.up_proj.*"]
NETWORK, SEEDS, EPOCHS = "LeNet-300-100", range(5), 10
DIGITS = [{"rows": rows, "level": level} for rows in GROUPS.values() for level in SHAPED_LEVELS]


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


def digits(runs: Runs, seed: int) -> None:
    """Train a network, and prune and fine-tune copies of it in both orders, as far as they are missing."""
    keys = [{"network": NETWORK, "seed": seed, **each, "permuted": p} for each, p in product(DIGITS, (False, True))]
    missing = [key for key in keys if not runs.have(**key)]
    if not missing:
        return
    task = TASKS["mnist"]
    data = task.data(seed)
    model = task.model(seed)
    train(model, data, seed, max_epochs=EPOCHS)
    image = next(iter(data.val_dataloader()))[0][:2]
    for key in missing:
        network, rows, level = copy.deepcopy(model.network), key["rows"], key["level"]
        if key["permuted"]:
            permute_rows(network, image, sparsity=level, rows=rows, inplace=True)
        prune(network, level, granularity=SharedFanIn(rows), scope="local", ignore=["head.*"])
        pruned = Classifier(network, task.optimizer, task.rate)
        scores = {"at_once": accuracy(pruned, data)}
        train(pruned, data, seed, ConstantSparsity(), max_epochs=EPOCHS)
        scores["tuned"] = accuracy(pruned, data)
        runs.add(**key, **scores)
        print(runs.rows[-1], flush=True)


def table_of_digits(runs: Runs) -> str:
    """Return the accuracies."""
    lines = []
    for each in DIGITS:
        found = [runs.have(network=NETWORK, **each, permuted=permuted) for permuted in (False, True)]
        cells = [spread([run[key] for run in have]) for key in ("at_once", "tuned") for have in found]
        lines.append([str(each["rows"]), f"{each['level']:.0%}", *cells])
    columns = ["one-shot, as they are", "permuted", "fine-tuned, as they are", "permuted"]
    return table(["rows in a group", "sparsity", *columns], lines)


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
    page = Path(__file__).parents[2] / "docs" / "speed.md"
    if "--network" in sys.argv:
        for seed in SEEDS:
            digits(runs, seed)
        print(found := table_of_digits(runs))
        replace(page, "permuted digits", found)
        return
    keys = [{"rows": r, "level": level, "permuted": p} for level, r, p in product(LEVELS, ROWS, (False, True))]
    missing = [key for key in keys if not runs.have(**key)]
    task = smollm2() if missing else None
    for key in missing if task else ():
        runs.add(**key, **measure(task, **key), machine=machine())
        print({**key, **runs.rows[-1]}, flush=True)
    print(found := make_table(runs))
    replace(page, "permuted", found)


if __name__ == "__main__":
    main()
