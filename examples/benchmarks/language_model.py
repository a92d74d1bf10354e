"""Training a language model to 90 % zeros: `python examples/benchmarks/language_model.py`, an hour on one busy core.

SmolLM2-135M-Instruct (weights de-quantised from 4 bits), all linear layers of its 30 blocks, every one of them at 90 %:
perplexity on BBC news, in the 16 windows of 256 tokens that post_training.py scores. Every way trains all weights for
120 steps of `fit` with AdamW (2 windows of 128 tokens each; the learning rate rises to 1e-4 and decays to zero) on
articles that are neither calibrated on nor scored. Three quarters of the run are for pruning, and the last quarter is
for fine-tuning; SparseGPT prunes before the run, all of which fine-tunes. One seed, no search for learning rates.

Finished runs are kept in results/language_model.jsonl: delete lines to run again. The table of docs/strategies/admm.md
is written from that file.
"""

import copy
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from depth_width import Language, training_windows
from lightning.pytorch import Callback, Trainer, seed_everything
from marked import replace, table
from post_training import Task, smollm2
from runs import Runs
from timing import RESULTS, machine, quiet
from torch import Tensor

from lightning_prune import ADMM, ConstantSparsity, MagnitudePruning, sparsegpt, sparsity

RUNS = Runs(RESULTS / "language_model.jsonl")
ZEROS, STEPS = 0.9, 120


def ways(task: Task) -> dict[str, Callable[[], Callback]]:
    """Return the ways to 90 %, each with the arguments that all have in common and the defaults for the rest."""
    targets = (f"model.{task.blocks}.*",)
    common: dict[str, Any] = {"scope": "local", "targets": targets, "start": 0, "end": 0.75}
    return {
        "magnitude, gradual": lambda: MagnitudePruning(ZEROS, schedule="cubic", **common),
        "ADMM": lambda: ADMM(ZEROS, schedule="cubic", **common),
        "SparseGPT, fine-tuned": lambda: ConstantSparsity(targets=targets),
    }


def run(task: Task, name: str, callback: Callback, windows: Tensor) -> None:
    """Train a copy of the model in one way, score it and keep the result."""
    model, began = copy.deepcopy(task.model), time.perf_counter()
    targets, found = [f"{task.blocks}.*"], dict[str, Any]()
    if "SparseGPT" in name:
        sparsegpt(model, ZEROS, targets=targets, data=task.data, sequential=task.blocks)
        found["untrained"] = round(task.score(model), 1)
    seed_everything(0, verbose=False)
    switches = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_steps=STEPS, accelerator="cpu", gradient_clip_val=1.0, callbacks=[callback], **switches)
    trainer.fit(Language(model.train(), windows))
    found["seconds"] = round(time.perf_counter() - began)
    found |= {"sparsity": round(sparsity(model, targets=targets), 6), "perplexity": round(task.score(model.eval()), 1)}
    RUNS.add(way=name, **found, machine=machine())
    print(name, found, flush=True)


def make_table() -> str:
    """Return the perplexities."""
    cells = [[row["way"], f"{row['perplexity']:,.0f}", f"{row['sparsity']:.2%}"] for row in RUNS.rows]
    return table(["way to 90 %", "perplexity", "zeros"], sorted(cells, key=lambda row: float(row[1].replace(",", ""))))


def main() -> None:
    """Run what is missing, and write the table."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    quiet()
    warnings.filterwarnings("ignore")
    task, windows = smollm2(), training_windows(STEPS)
    for name, callback in ways(task).items():
        if not RUNS.have(way=name):
            run(task, name, callback(), windows)
    print(found := make_table())
    replace(Path(__file__).parents[2] / "docs" / "strategies" / "admm.md", "language model", found)


if __name__ == "__main__":
    main()
