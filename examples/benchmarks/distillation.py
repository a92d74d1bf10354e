"""What distillation adds to pruning at 98 %: `python examples/benchmarks/distillation.py [--seeds 10]`.

LeNet-300-100 on 5,000 real digits. For each seed a dense network is trained for 20 epochs, then pruned to 98 % and
fine-tuned for 10 epochs, one-shot or gradually: without a teacher, with the dense network's logits at three
temperatures (2 is the default), and with the output of its second hidden layer. Every setting that was run is shown.
"""

import argparse
import copy
import json
import logging
import statistics
import sys
from pathlib import Path
from typing import Any

from lightning import Trainer, seed_everything
from timing import RESULTS, table

from lightning_prune import Distillation, MagnitudePruning

sys.path.insert(0, str(Path(__file__).parents[1]))
from mnist5k import LeNet, MNIST5k

SCHEDULES: dict[str, dict[str, Any]] = {
    "one-shot": {"schedule": "one_shot", "start": 0},
    "gradual": {"schedule": "cubic", "start": 0, "end": 0.7},
}
TEACHERS: dict[str, dict[str, Any] | None] = {
    "none": None,
    **{f"logits, T = {t:g}": {"temperature": t} for t in (1.0, 2.0, 4.0)},
    "hidden layer": {"layer": "hidden2"},
}
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def fit(model: LeNet, data: MNIST5k, epochs: int, *callbacks: Any) -> float:
    """Train, and return the accuracy in percent on the held-out digits."""
    Trainer(max_epochs=epochs, limit_val_batches=0, callbacks=list(callbacks), **QUIET).fit(model, datamodule=data)
    return 100 * Trainer(**QUIET).validate(model, datamodule=data, verbose=False)[0]["val_acc"]


def spread(values: list[float]) -> dict[str, float]:
    """Return mean and standard deviation."""
    return {"mean": round(statistics.mean(values), 2), "sd": round(statistics.stdev(values), 2)}


def main() -> None:
    """Train and prune for each seed; print means, standard deviations and the paired gains of the teacher."""
    parser = argparse.ArgumentParser(description="Pruning to 98 % with and without a teacher.")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--sparsity", type=float, default=0.98)
    args = parser.parse_args()
    logging.disable(logging.INFO)
    arms = {f"{when}, {teacher}": (when, teacher) for when in SCHEDULES for teacher in TEACHERS}
    found: dict[str, list[float]] = {"dense": [], **{name: [] for name in arms}}
    for seed in range(args.seeds):
        seed_everything(seed, verbose=False)
        dense, data = LeNet(), MNIST5k(seed=seed)
        found["dense"].append(fit(dense, data, 20))
        for name, (when, teacher) in arms.items():
            lesson = TEACHERS[teacher]
            callbacks = [MagnitudePruning(args.sparsity, **SCHEDULES[when])]
            callbacks += [Distillation(**lesson)] if lesson is not None else []
            found[name].append(fit(copy.deepcopy(dense), data, 10, *callbacks))
        print(f"seed {seed}:", {name: round(values[-1], 1) for name, values in found.items()}, flush=True)

    rows = []
    for name, values in found.items():
        row: dict[str, Any] = {"method": name, **spread(values), "per_seed": [round(value, 1) for value in values]}
        if name in arms and arms[name][1] != "none":
            gains = [a - b for a, b in zip(values, found[f"{arms[name][0]}, none"], strict=True)]
            row |= {f"gain_{key}": value for key, value in spread(gains).items()}
        rows.append(row)
    cells = [["pruning, teacher", "mean", "sd", "gain", "sd of gain"]]
    for row in rows:
        gain = [f"{row['gain_mean']:+.2f}", f"{row['gain_sd']:.2f}"] if "gain_sd" in row else ["", ""]
        cells.append([row["method"], f"{row['mean']:.2f}", f"{row['sd']:.2f}", *gain])
    print(table(cells))
    RESULTS.mkdir(exist_ok=True)
    content = {"benchmark": "distillation", "seeds": args.seeds, "sparsity": args.sparsity, "rows": rows}
    (RESULTS / "distillation.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
