"""Evolve: a search for the allocation of the sparsity, in generations of small random changes."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from random import Random
from typing import Any, Literal

from torch import nn
from typing_extensions import override

from lightning_prune.scopes.erdos_renyi import whole
from lightning_prune.scopes.owl import by_block
from lightning_prune.scopes.searching import Room, Search, Trial
from lightning_prune.scopes.shares import SCOPES, Scope, ScopeName, resolve
from lightning_prune.tensors.selection import Scores
from lightning_prune.validation.arguments import choice, integer, number, numbers
from lightning_prune.validation.instances import flag, function, named, settle
from lightning_prune.validation.instances import path as as_path
from lightning_prune.validation.values import optional

_TRIES = 20  # times as many changes are tried as offspring are wanted: some are equal, or none is possible


@dataclass(frozen=True)
class Evolve(Search):
    """Search for the allocation whose model is closest to the dense one on the data, with ``prune`` or ``sparsegpt``.

    Each generation makes ``offspring`` of the best allocation until then, its parent. Each moves units from one target
    to another, from one block of layers to another, or from one kind of layer to another ("q_proj" in all blocks), up
    to three times, so that the number of units that stay is the same at every moment. They are selected in stages: a
    few batches are drawn from the data, the best ones survive, and are compared on more batches in the next stage. What
    their changes give together joins them, and in the last stage the parent. In the end the best allocation is
    compared with the first one on all of the data, and the better one is taken.

    Every trial prunes the model by the same scores, and the weights come back bit for bit. Where blocks are pruned one
    after another (``sequential``), refined or reconstructed, the search comes first, with masks by the scores of the
    dense model. The outputs of the dense model for all of the data are held in memory.

    Args:
        generations: How many there are.
        offspring: How many allocations are tried in each.
        survivors: How many of them are left after each stage; 1 after the last.
        batches: How many batches they are tried on in each stage; all, if there are fewer.
        step: The largest part, in (0, 1], of what could move between two groups of targets that moves in one change.
        start: The scope whose allocation is the first parent.
        metric: What is better if lower: "kl" is the mean Kullback-Leibler divergence of the softmax over the last
            dimension from that of the dense model, for outputs that are logits, as those of language models and
            classifiers; "mse" is the mean squared error, for any other. Of an output with ``logits``, these count. Or
            ``metric(model, batches) -> float`` of your own, called in eval mode without gradients.
        mode: Whether a lower ("min") or higher ("max") metric is better.
        seed: Of the random numbers: the same seed gives the same allocation.
        path: A JSON file that stores the result of every trial: a search that is interrupted resumes where it stopped
            when the same call is made again, and one with more ``generations`` goes on.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If an argument is out of range.

    Reference: Sieberling et al., 2024, "EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search",
        arXiv:2410.14649.

    >>> import torch
    >>> from lightning_prune import prune
    >>> model, data = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), [torch.randn(16, 8)]
    >>> masks = prune(model, 0.5, scope=Evolve(generations=5, progress=False), data=data)
    >>> masks.sparsity
    0.5
    """

    generations: int = 100
    offspring: int = 16
    survivors: Sequence[int] = (4, 1)
    batches: Sequence[int] = (1, 4)
    step: float = 0.5
    start: ScopeName | Scope = "local"
    metric: Literal["kl", "mse"] | Callable[[nn.Module, Any], float] = "kl"
    mode: Literal["min", "max"] = "min"
    seed: int = 0
    path: str | Path | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        settle(self, generations=integer("generations", self.generations, 1))
        settle(self, offspring=integer("offspring", self.offspring, 1), seed=integer("seed", self.seed, 0))
        settle(self, survivors=_counts("survivors", self.survivors), batches=_counts("batches", self.batches))
        settle(self, step=number("step", self.step, "(0, 1]"), progress=flag("progress", self.progress))
        if len(self.survivors) != len(self.batches):
            raise ValueError(f"batches must be as many numbers as survivors, got {self.batches} and {self.survivors}")
        if self.survivors[-1] != 1 or list(self.survivors) != sorted(self.survivors, reverse=True):
            raise ValueError(f"survivors must fall from stage to stage, to 1 after the last, got {self.survivors}")
        if isinstance(self.metric, str):
            choice("metric", self.metric, ("kl", "mse"))
        else:
            function("metric", self.metric, "model", "batches")
        if choice("mode", self.mode, ("min", "max")) == "max" and isinstance(self.metric, str):
            raise ValueError(f'mode must be "min" for metric={self.metric!r}, got "max"')
        named("start", self.start, SCOPES, "scores", "sparsity")
        if isinstance(self.start, Search):
            raise ValueError(f"start must be a scope that does not search, got {self.start}")
        optional(as_path, "path", self.path)

    @override
    def __call__(self, scores: Scores, sparsity: float) -> dict[str, int]:
        keep, sizes = dict(resolve(self.start)(scores, sparsity)), scores.sizes
        total = sum(sizes.values())
        missing = total - round(sparsity * total) - sum(keep.values())  # a scope may round each target on its own
        more = spread({name: sizes[name] - keep[name] for name in keep}, max(0, missing))
        fewer = spread(keep, max(0, -missing))
        return {name: keep[name] + more[name] - fewer[name] for name in keep}

    @override
    def trials(
        self, start: Mapping[str, int], rooms: Mapping[str, Room], batches: int
    ) -> Generator[Trial, float, dict[str, int]]:
        random, parent = Random(self.seed), dict(start)
        before = parent
        for generation in range(self.generations):
            young = self._young(parent, before, rooms, random)
            if not young:  # there is nothing to move
                return parent
            for left, count in zip(self.survivors, self.batches, strict=True):
                drawn = tuple(sorted(random.sample(range(batches), min(count, batches))))
                young = [*young, parent] if left == 1 else young
                losses = []
                for keep in young:
                    losses.append((yield Trial(keep, drawn, generation)))
                order = sorted(range(len(young)), key=losses.__getitem__)
                young = [young[number] for number in order[:left]]
                both = joined(parent, young, rooms)
                young = [*young, both] if left > 1 and both not in (parent, *young) else young
            before, parent = (parent, young[0]) if young[0] != parent else (before, parent)
        ends = []
        for keep in (parent, dict(start)):
            ends.append((yield Trial(keep, tuple(range(batches)), self.generations)))
        return parent if ends[0] <= ends[1] else dict(start)

    def _young(
        self, parent: dict[str, int], before: dict[str, int], rooms: Mapping[str, Room], random: Random
    ) -> list[dict[str, int]]:
        """Return different allocations near the parent; one of them makes the last change once more."""
        groupings = groupings_of(list(parent))
        again = joined(parent, [{name: 2 * parent[name] - before[name] for name in parent}], rooms)
        found = [again] if again != parent else []
        for _ in range(_TRIES * self.offspring if groupings else 0):
            if len(found) >= self.offspring:
                break
            child = parent
            for _ in range(min(random.randint(1, 3), random.randint(1, 3))):  # rather few, as in the paper
                giver, taker = random.sample(random.choice(groupings), 2)
                child = moved(child, giver, taker, rooms, self.step / 2 ** random.randrange(3))
            if child not in (parent, *found):
                found.append(child)
        return found


def _counts(argument: str, value: Any) -> tuple[int, ...]:
    return tuple(integer(argument, entry, 1) for entry in numbers(argument, value, "[1, inf)"))


def groupings_of(names: Sequence[str]) -> list[list[list[str]]]:
    """Return the ways to divide targets into groups that units move between: one by one, by block, by kind of layer.

    >>> groupings_of(["h.0.q", "h.0.k", "h.1.q", "h.1.k"])[1:]
    [[['h.0.q', 'h.0.k'], ['h.1.q', 'h.1.k']], [['h.0.q', 'h.1.q'], ['h.0.k', 'h.1.k']]]
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(".".join("*" if part.isdigit() else part for part in name.split(".")), []).append(name)
    found: list[list[list[str]]] = []
    for groups in ([[name] for name in names], by_block(names, None), list(kinds.values())):
        if len(groups) > 1 and groups not in found:
            found.append(groups)
    return found


def moved(
    keep: Mapping[str, int], giver: Iterable[str], taker: Iterable[str], rooms: Mapping[str, Room], part: float
) -> dict[str, int]:
    """Move a part, 0 to 1, of what could move from one group of targets to another, each in proportion to its room.

    >>> moved({"a": 6, "b": 6}, ["a"], ["b"], {"a": Room(2, 10), "b": Room(2, 10)}, 0.5)
    {'a': 4, 'b': 8}
    """
    step = lcm(*(room.step for room in rooms.values()))
    gives = {name: (keep[name] - rooms[name].low) // step for name in giver}
    takes = {name: (rooms[name].high - keep[name]) // step for name in taker}
    most = min(sum(gives.values()), sum(takes.values()))
    amount = min(most, max(1, round(part * most)))
    lost, won = spread(gives, amount), spread(takes, amount)
    return {name: keep[name] + step * (won.get(name, 0) - lost.get(name, 0)) for name in keep}


def spread(rooms: Mapping[str, int], amount: int) -> dict[str, int]:
    """Share out a number, no larger than all rooms, in proportion to these.

    >>> spread({"a": 1, "b": 3}, 2)
    {'a': 1, 'b': 1}
    """
    total = max(1, sum(rooms.values()))
    return whole({name: amount * room / total for name, room in rooms.items()}, amount)


def joined(parent: Mapping[str, int], others: Sequence[Mapping[str, int]], rooms: Mapping[str, Room]) -> dict[str, int]:
    """Make the changes of several allocations together; the parent itself where there is no room for them all.

    >>> rooms = {"a": Room(0, 10), "b": Room(0, 10)}
    >>> joined({"a": 5, "b": 5}, [{"a": 6, "b": 4}, {"a": 8, "b": 2}], rooms)
    {'a': 9, 'b': 1}
    """
    found = {name: number + sum(other[name] - number for other in others) for name, number in parent.items()}
    fits = all(rooms[name].low <= number <= rooms[name].high for name, number in found.items())
    return found if fits else dict(parent)
