"""The search for the least number of weights, and its runs, each stored as a line of JSON."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from compared import BEGIN, BOTH, ROUNDS, SMALL, TARGETS, TICKETS, levels_of, sparsity_of
from cubist import fit
from runs import Runs


def run(method: str, weights: int, seed: int, batch: int) -> dict[str, Any]:
    """Train once."""
    if method in SMALL:
        return fit(seed, batch, None, SMALL[method])
    trainings = ROUNDS + 1 if method in TICKETS else 1
    return fit(seed, batch, BOTH[method](sparsity_of(method, weights), seed), trainings=trainings)


class Accuracies(Runs):
    """The accuracies of finished runs, and of new ones where these are asked for.

    Args:
        path: The file.
        batch: The size of the batches of new runs.
        run: Makes a new run.
    """

    def __init__(self, path: Path, batch: int, run: Callable[[str, int, int, int], dict[str, Any]] = run) -> None:
        super().__init__(path)
        self.batch, self.run = batch, run

    def accuracy(self, method: str, weights: int, seed: int) -> float:
        """Return the accuracy with so many weights, from the file or from a new run."""
        place = {"method": method, "weights": weights, "seed": seed, "batch": self.batch}
        if not self.have(**place):
            self.add(**place, **self.run(method, weights, seed, self.batch))
            print(self.rows[-1], flush=True)
        return float(self.have(**place)[0]["accuracy"])


def search(runs: Accuracies, method: str, seed: int) -> None:
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
