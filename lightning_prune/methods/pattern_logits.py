"""Pattern logits: which n of every m weights are kept, as numbers that are trained in the place of the weights."""

import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_prune.tensors.masking import zero_pruned

MOST_PATTERNS = 256
SPREAD = 0.01  # of the logits at first, in units of the strength of the prior
_PART = 1 << 16  # groups on the CPU: what is made of so many stays in the cache
_PART_ELSEWHERE = 1 << 22


@dataclass(frozen=True)
class Draw:
    """The random numbers of one optimizer step, and what logits become with them.

    Args:
        seed: Of the whole run.
        step: The number of the step.
        temperature: Of the softmax: close to 0, each group has nearly one pattern.
        scale: What logits are multiplied by before the random numbers are added.
    """

    seed: int
    step: int
    temperature: float
    scale: float

    def generator(self, name: str, device: torch.device) -> torch.Generator:
        """Return the generator of a weight, the same on every rank and in every resumed run."""
        digest = hashlib.blake2b(f"{self.seed} {self.step} {name}".encode(), digest_size=7).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))


def patterns(n: int, m: int, device: torch.device | str = "cpu") -> Tensor:
    """Return all ways to keep n of m, one a row.

    >>> patterns(1, 2).tolist()
    [[True, False], [False, True]]
    """
    found = torch.zeros(math.comb(m, n), m, dtype=torch.bool)
    for row, kept in zip(found, itertools.combinations(range(m), n), strict=True):
        row[list(kept)] = True
    return found.to(device)


def groups(values: Tensor, axis: int, m: int) -> Tensor:
    """Return the whole groups of m that follow each other along a dimension, as the last one; a view.

    >>> groups(torch.arange(10).view(2, 5), 1, 2).tolist()
    [[[0, 1], [2, 3]], [[5, 6], [7, 8]]]
    """
    rows = values.movedim(axis, -1)
    whole = rows.shape[-1] // m
    found: Tensor = rows[..., : whole * m].unflatten(-1, (whole, m))
    return found


def gumbel(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return random numbers of the standard Gumbel distribution, of the shape and type of a tensor."""
    # a fourth of the time of exponential_ on a CPU
    uniform = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    return uniform.clamp_(min=torch.finfo(like.dtype).tiny).log_().neg_().log_().neg_()


def most_likely(logits: Tensor) -> Tensor:
    """Return which row is the largest in each column, the first of equals.

    >>> most_likely(torch.tensor([[0.0, 2.0], [1.0, 2.0]])).tolist()
    [1, 0]
    """
    # as argmax, but on a CPU that takes four times as long along the first dimension
    best, found = logits[0].clone(), torch.zeros(logits.shape[1], dtype=torch.long, device=logits.device)
    for number, row in enumerate(logits[1:], 1):
        found.masked_fill_(row > best, number)
        torch.maximum(best, row, out=best)
    return found


def prior_logits(mask: Tensor, axis: int, n: int, m: int, strength: float, dtype: torch.dtype) -> Tensor:
    """Return the logits to start from, (patterns, groups): the more weights a pattern shares with the mask, the higher.

    >>> prior_logits(torch.tensor([[True, False]]), 1, 1, 2, 2.0, torch.float32).tolist()
    [[0.009999999776482582], [-0.009999999776482582]]
    """
    kept = groups(mask, axis, m).reshape(-1, m).T.to(dtype)
    return (patterns(n, m, mask.device).to(dtype) @ kept - n / 2) * (strength * SPREAD)


@dataclass(eq=False)
class PatternLogits:
    """The weight is ``dense * mask``: a soft mask in training, the most likely pattern of each group at other times.

    Args:
        name: Of the weight.
        weight: The weight, which no optimizer may step.
        axis: The dimension along which groups lie.
        n: How many of a group are kept.
        m: The size of a group.
        logits: Of the patterns of each group, (patterns, groups).
        dense: The weight without zeros.
    """

    name: str
    weight: nn.Parameter
    axis: int
    n: int
    m: int
    logits: nn.Parameter
    dense: Tensor

    def probabilities(self, draw: Draw) -> Iterator[tuple[slice, Tensor]]:
        """Yield the Gumbel softmax over the patterns of some groups at a time, (patterns, groups)."""
        logits = self.logits.detach()
        generator = draw.generator(self.name, logits.device)
        for at in self._parts():
            part = logits[:, at] * draw.scale
            part += gumbel(part, generator)
            yield at, part.div_(draw.temperature).softmax(0)

    def _parts(self) -> list[slice]:
        """Return the groups in parts that fit into the cache."""
        size = _PART if self.logits.device.type == "cpu" else _PART_ELSEWHERE
        return [slice(begin, begin + size) for begin in range(0, self.logits.shape[1], size)]

    def _groups(self, values: Tensor) -> Tensor:
        """Return the groups of a tensor of the weight's shape, one a row."""
        return groups(values, self.axis, self.m).reshape(-1, self.m)

    @torch.no_grad()
    def soften(self, draw: Draw, mask: Tensor) -> None:
        """Write the weight under the soft mask; what is in no whole group follows the hard one."""
        self.harden(mask)
        table = patterns(self.n, self.m, self.logits.device).to(self.logits.dtype)
        soft = torch.empty(self.logits.shape[1], self.m, dtype=table.dtype, device=table.device)
        for at, likely in self.probabilities(draw):
            torch.mm(likely.T, table, out=soft[at])
        inside = groups(self.weight.detach(), self.axis, self.m)
        dense = groups(self.dense, self.axis, self.m)
        inside.copy_(dense * soft.view(dense.shape).to(dense.dtype))

    @torch.no_grad()
    def take_gradient(self, draw: Draw, regularization: float) -> None:
        """Turn the gradient of the soft weight into that of the logits.

        Args:
            draw: That the gradient was taken with.
            regularization: How strongly large weights are kept: this times the sum of their squares is gained.
        """
        gradient, self.weight.grad = self.weight.grad, None
        if gradient is None:
            self.logits.grad = None
            return
        table = patterns(self.n, self.m, self.logits.device).to(self.logits.dtype)
        dense, slopes = self._groups(self.dense), self._groups(gradient)
        found = torch.empty_like(self.logits)
        for at, likely in self.probabilities(draw):
            weights = dense[at].T.to(table.dtype)
            slope = slopes[at].T * weights
            if regularization:
                slope -= weights.square().mul_(2 * regularization) * (table.T @ likely)
            steps = table @ slope
            steps -= (likely * steps).sum(0)
            found[:, at] = steps.mul_(likely).mul_(draw.scale / draw.temperature)
        self.logits.grad = found

    @torch.no_grad()
    def choose(self, mask: Tensor) -> Tensor:
        """Return the mask of the most likely patterns; what is in no whole group stays as it is in this one."""
        table, logits = patterns(self.n, self.m, mask.device), self.logits.detach()
        chosen = torch.empty(logits.shape[1], self.m, dtype=torch.bool, device=mask.device)
        for at in self._parts():
            chosen[at] = table[most_likely(logits[:, at])]
        mask = mask.clone()
        inside = groups(mask, self.axis, self.m)
        inside.copy_(chosen.view(inside.shape))
        return mask

    @torch.no_grad()
    def harden(self, mask: Tensor) -> None:
        """Write the weight under a mask, bit for bit where it is kept."""
        self.weight.copy_(self.dense)
        zero_pruned([(self.weight.detach(), mask)])
