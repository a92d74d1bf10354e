"""Knapsack: units go where the least importance is lost for what they cost."""

import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_prune.scopes.shares import Scope, global_
from lightning_prune.tensors.selection import Scores
from lightning_prune.validation.arguments import integer
from lightning_prune.validation.instances import settle

_NOTHING = 1e-12  # of the cost
Left = Callable[[Mapping[str, int]], float]  # from how many units stay to the fraction of the cost that is left


@dataclass(frozen=True)
class Knapsack:
    """A scope: units go where the least importance is lost for each FLOP, parameter or millisecond that goes with them.

    The importance of a unit is its score over the sum of those of its target. Step by step, of all targets that one
    loses units whose next ones are the cheapest: what counts is the fraction of the importance that is still there, so
    that no target is emptied, for what they cost, which follows from ``of`` and from what is left of other targets.
    It is a greedy answer to the knapsack that SPDY solves with measured losses in the place of scores. Where all units
    cost the same (``of="units"``) it ranks them by importance.

    Args:
        steps: How many steps there are from all units of a target to none.

    Raises:
        ValueError: If ``steps`` is smaller than 1.

    Reference: Frantar and Alistarh, 2022, "SPDY: Accurate Pruning with Speedup Guarantees", arXiv:2201.13096; Kurtic et
    al., 2023, "ZipLM: Inference-Aware Structured Pruning of Language Models", arXiv:2302.04089.

    >>> import torch
    >>> Knapsack()(Scores.of({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([1.0, 40.0])}), 0.25)
    {'a': 2, 'b': 1}
    """

    steps: int = 16

    def __post_init__(self) -> None:
        """Check the argument."""
        settle(self, steps=integer("steps", self.steps, 1))

    def __call__(self, scores: Scores, sparsity: float) -> Mapping[str, int]:
        """Return how many units of each target stay if all cost the same."""
        return global_(scores.within_targets(_importance), sparsity)

    def priced(self, scores: Scores, stays: Callable[[str, int], int], left: Left) -> Scope:
        """Return the scope for units that cost something.

        Args:
            scores: Those of all units.
            stays: From the name of a target and how many of its units are to stay to how many really do.
            left: The fraction of the cost that is left.
        """
        order = self._order(scores, stays, left)

        def share_out(scores: Scores, sparsity: float) -> dict[str, int]:
            keep, goal = dict(scores.sizes), (1.0 - sparsity) * sum(scores.sizes.values())
            for name, count in order:
                if sum(keep.values()) <= goal:
                    break
                keep[name] = count
            return keep

        return share_out

    def _order(self, scores: Scores, stays: Callable[[str, int], int], left: Left) -> list[tuple[str, int]]:
        """Return the steps, as (name of a target, units that stay in it), in the order in which they are taken."""
        options, lost = {}, {}
        for name, size in scores.sizes.items():
            counts = {stays(name, round(size * part / self.steps)) for part in range(self.steps)}
            options[name] = sorted(counts - {size})
            left_over = 1.0 - _importance(scores.raw(name)).flatten().sort().values.cumsum(0)
            lost[name] = [0.0, *left_over.clamp(min=1e-12).log().neg().tolist()]  # the logarithm: of what is there
        keep, taken, waiting = dict(scores.sizes), list[tuple[str, int]](), list[tuple[float, str]]()

        def price(name: str) -> tuple[float, int]:
            size, now, gone = scores.sizes[name], left(keep), lost[name][scores.sizes[name] - keep[name]]
            steps = reversed(options[name])
            return _next((lost[name][size - less] - gone, now - left({**keep, name: less}), less) for less in steps)

        for name in scores.sizes:
            _push(waiting, options, name, price)
        while waiting:
            _, name = heapq.heappop(waiting)
            now, less = price(name)  # it may cost less by now, since other targets have become smaller
            if waiting and (now, name) > waiting[0]:
                heapq.heappush(waiting, (now, name))
                continue
            while keep[name] > less:
                keep[name] = options[name].pop()
                taken.append((name, keep[name]))
            _push(waiting, options, name, price)
        return taken


def _next(steps: Iterable[tuple[float, float, int]]) -> tuple[float, int]:
    """Return what the next steps of a target cost for what they save, and how many of its units stay after them.

    It is one step where each costs more than the one before. Steps that save nothing, as where only few units have a
    faster form, are taken together with those that do.

    Args:
        steps: What importance is lost and what is saved by all of them so far, and how many units stay.
    """
    best = (math.inf, 0)
    for lost, saved, less in steps:
        cost = lost / max(_NOTHING, saved)
        if saved > _NOTHING and cost >= best[0]:
            break
        if cost < best[0]:
            best = (cost, less)
    return best


def _push(
    waiting: list[tuple[float, str]],
    options: Mapping[str, Sequence[int]],
    name: str,
    price: Callable[[str], tuple[float, int]],
) -> None:
    """Let a target wait for its next step, if there is one."""
    if options[name]:
        heapq.heappush(waiting, (price(name)[0], name))


def _importance(scores: Tensor) -> Tensor:
    positive = scores.double().clamp(min=0.0)
    return positive / positive.sum().clamp(min=1e-300)
