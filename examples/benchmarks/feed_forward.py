"""What each shape of zeros costs a language model: `python examples/benchmarks/feed_forward.py [shape ...]`.

SmolLM2-135M-Instruct (weights de-quantised from 4 bits): the feed-forward layers of its 30 blocks, which have three
quarters of its weights but the embedding, without training: masks by Wanda, block by block, and what is left is fitted
with `Reconstruction(steps=16)`, on 16 windows of 256 tokens. Perplexity on BBC news, in 16 other windows. Every gate,
up and down projection has the same fraction of zeros. Of neurons it is the fraction of the hidden width that is gone,
which `Sensitivity` chooses.

Each measurement is appended to results/feed_forward.jsonl when it is finished, and is not repeated: delete lines to
measure again. `tradeoff.py` draws them against measured time.
"""

import argparse
import copy
import os
import time
from typing import Any

from depth_width import language_loss
from post_training import Task, smollm2
from runs import Runs
from shapes import NEURONS, PERMUTED, ROWS, SHAPES, TRAINED
from timing import RESULTS, machine, quiet

from lightning_prune import Reconstruction, Sensitivity, Wanda, permute_rows, prune, sparsity

PATH = RESULTS / "feed_forward.jsonl"
BATCHES, STEPS = 4, 16  # a batch has four windows
TARGETS = ["model.layers.*.mlp.*"]


def measure(task: Task, shape: str, level: float) -> dict[str, Any]:
    """Prune a copy of the model, and return its perplexity."""
    model, began, data = copy.deepcopy(task.model), time.perf_counter(), task.data[:BATCHES]
    tokens, name = data[0][:1, :16], PERMUTED.get(shape, shape)
    loss, criterion = (language_loss, Sensitivity(window=BATCHES)) if name == NEURONS else (None, Wanda())
    if shape in PERMUTED:
        permute_rows(model, tokens, sparsity=level, rows=ROWS[name], criterion=criterion, data=data, inplace=True)
    options: dict[str, Any] = {"granularity": SHAPES[name], "targets": TARGETS, "scope": "local", "min_density": 0}
    options |= {"criterion": criterion, "loss": loss, "data": data}
    options |= {"sequential": task.blocks, "reconstruct": Reconstruction(steps=STEPS)}
    prune(model, level, example_inputs=tokens, **options)
    seconds = time.perf_counter() - began
    zeros = sparsity(model, targets=TARGETS)
    return {"score": round(task.score(model), 4), "sparsity": round(zeros, 6), "seconds": round(seconds, 1)}


def main() -> None:
    """Measure what is missing, level by level."""
    options = argparse.ArgumentParser(description="Measure what each shape of zeros costs.")
    options.add_argument("shapes", nargs="*", metavar="shape", help=", ".join(TRAINED))
    wanted = options.parse_args().shapes or list(TRAINED)
    os.environ["HF_HUB_OFFLINE"] = "1"
    quiet()
    runs = Runs(PATH)
    keys = sorted((level, shape) for shape in wanted for level in TRAINED[shape])
    missing = [(level, shape) for level, shape in keys if not runs.have(shape=shape, level=level)]
    task = smollm2() if missing else None
    if task and not runs.have(shape="dense"):
        runs.add(shape="dense", level=0.0, score=round(task.score(task.model), 4), machine=machine())
    for level, shape in missing if task else ():
        runs.add(shape=shape, level=level, **measure(task, shape, level), machine=machine())
        print(runs.rows[-1], flush=True)


if __name__ == "__main__":
    main()
