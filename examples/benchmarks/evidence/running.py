"""Runs of one setting with one seed, each stored as a line of JSON, so that nothing runs twice."""

import json
import logging
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from lightning import LightningModule, Trainer, seed_everything
from methods import METHODS
from shapes import PERMUTED, ROWS
from tasks import QUIET, TASKS

from lightning_prune import permute_rows


class Setting(NamedTuple):
    """What is trained, how it is pruned, and to which sparsity of its weights or neurons."""

    task: str
    method: str
    sparsity: float


def run(setting: Setting, seed: int) -> dict[str, Any]:
    """Train, prune and test once; return the accuracy in percent and the fraction of weights that are zero or gone."""
    logging.disable(logging.INFO)
    task = TASKS[setting.task]
    model, data = task.model(seed), task.data(seed)
    dense = sum(weight.numel() for weight in weights(model))
    callback = METHODS[setting.method](setting.sparsity, seed)
    if setting.method in PERMUTED:
        image = next(iter(data.val_dataloader()))[0][:2]
        permute_rows(model, image, sparsity=setting.sparsity, rows=ROWS[PERMUTED[setting.method]], inplace=True)
    seed_everything(seed, verbose=False)
    trainer = Trainer(max_epochs=task.epochs, limit_val_batches=0, callbacks=[callback] if callback else [], **QUIET)
    trainer.fit(model, datamodule=data)
    accuracy = Trainer(**QUIET).validate(model, datamodule=data, verbose=False)[0]["val_acc"]
    left = sum(int(weight.count_nonzero()) for weight in weights(model))
    return {
        **setting._asdict(),
        "seed": seed,
        "accuracy": round(100 * accuracy, 2),
        "zeros": round(1 - left / dense, 4),
    }


def weights(model: LightningModule) -> list[Any]:
    """Return the weight matrices and convolution kernels."""
    return [parameter for parameter in model.parameters() if parameter.ndim > 1]


class Results:
    """The measurements, in a file with a line for each setting and seed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: dict[tuple[Setting, int], dict[str, Any]] = {}
        for line in lines:
            self._take(json.loads(line))

    def _take(self, row: dict[str, Any]) -> None:
        self.rows[Setting(row["task"], row["method"], row["sparsity"]), row["seed"]] = row

    def accuracies(self, setting: Setting, seeds: Iterable[int]) -> list[float] | None:
        """Return the accuracy for each seed, or None if a run is missing."""
        found = [self.rows.get((setting, seed)) for seed in seeds]
        return [row["accuracy"] for row in found if row] if all(found) else None

    def fill(self, settings: Iterable[Setting], seeds: Iterable[int], jobs: int) -> None:
        """Run what is missing, in parallel processes."""
        seeds = list(seeds)
        missing = [(s, seed) for s in dict.fromkeys(settings) for seed in seeds if (s, seed) not in self.rows]
        if find_spec("fasterai") is None and any("fasterai" in setting.method for setting, _ in missing):
            print("fasterai is skipped, since it is not installed: pip install --no-deps fasterai fastcore einops")
            missing = [(setting, seed) for setting, seed in missing if "fasterai" not in setting.method]
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool, self.path.open("a") as file:
            runs = [pool.submit(run, setting, seed) for setting, seed in missing]
            for count, done in enumerate(as_completed(runs), 1):
                row = done.result()
                self._take(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
                name = f"{row['task']}, {row['method']}, {row['sparsity']:.1%}, seed {row['seed']}"
                print(f"{count}/{len(missing)}  {name}: {row['accuracy']:.1f}", flush=True)
