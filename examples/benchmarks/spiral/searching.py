"""The search for the least number of weights, and its runs, each stored as a line of JSON."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compared import BEGIN, BOTH, ROUNDS, SMALL, TARGETS, TICKETS, levels_of, sparsity_of
from cubist import fit


def run(method: str, weights: int, seed: int, batch: int) -> dict[str, Any]:
    """Train once."""
    if method in SMALL:
        return fit(seed, batch, None, SMALL[method])
    trainings = ROUNDS + 1 if method in TICKETS else 1
    return fit(seed, batch, BOTH[method](sparsity_of(method, weights), seed), trainings=trainings)


class Runs:
    """The finished runs, a line of JSON each.

    Args:
        path: The file.
        batch: The size of the batches of new runs.
        run: Makes a new run.
    """

    def __init__(self, path: Path, batch: int, run: Callable[[str, int, int, int], dict[str, Any]] = run) -> None:
        self.path, self.batch, self.run = path, batch, run
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            self.rows = [json.loads(line) for line in path.read_text().splitlines()]

    def accuracy(self, method: str, weights: int, seed: int) -> float:
        """Return the accuracy with so many weights, from the file or from a new run."""
        place = {"method": method, "weights": weights, "seed": seed, "batch": self.batch}
        found = next((row for row in self.rows if place.items() <= row.items()), None)
        if found is None:
            found = {**place, **self.run(method, weights, seed, self.batch)}
            self.rows.append(found)
            with self.path.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(found, flush=True)
        return float(found["accuracy"])


def search(runs: Runs, method: str, seed: int) -> None:
    """Run what tells with how few weights a method reaches each accuracy."""
    levels = levels_of(method)
    begin = next(place for place, weights in enumerate(levels) if weights >= min(BEGIN, levels[-1]))
    for place in range(begin, -1, -1):
        if runs.accuracy(method, levels[place], seed) < TARGETS[0]:
            break
    reached = any(runs.accuracy(method, weights, seed) >= TARGETS[-1] for weights in levels[place : begin + 1])
    for weights in levels[begin + 1 :]:
        if reached:
            break
        reached = runs.accuracy(method, weights, seed) >= TARGETS[-1]
