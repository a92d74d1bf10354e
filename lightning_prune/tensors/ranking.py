"""Ranking: scores relative to other units, of the same group or of the same layer."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_prune.tensors.boolean import slices
from lightning_prune.tensors.radix import keys

_SMALL_GROUP = 32  # up to this size pairwise comparisons are faster than sorting

Part = Callable[[slice | Tensor], Tensor]


def rank_within(scores: Tensor, size: int) -> Tensor:
    """Return float64 scores that sort by rank within groups of ``size`` along the last dimension, then by score.

    A rank counts as ``(rank + 0.5) / size``, so that the k lowest of all spread as evenly over the groups as possible,
    also if the last group is shorter. Equal scores in a group keep their order.

    >>> rank_within(torch.tensor([9.0, 1.0, 5.0, 2.0, 4.0, 3.0]), 4).mul(8).round().tolist()
    [7.0, 1.0, 5.0, 3.0, 6.0, 2.0]
    """
    length = scores.shape[-1]
    even = length - length % size
    parts = [scores[..., :even].unflatten(-1, (-1, size)), scores[..., even:].unsqueeze(-2)]
    found = [_relative(_rank(part), keys(part)).flatten(-2) for part in parts if part.numel()]
    return torch.cat(found, -1) if found else scores.double()


def part_within(like: Tensor, part: Part, size: int, stride: int, kept: Tensor | None = None) -> Part:
    """Return a function that returns ``rank_within`` of some units by flat index, and reads their groups only.

    Args:
        like: A tensor on the device of the scores.
        part: Returns the scores of some units by flat index.
        size: The size of all groups.
        stride: The distance from one unit of a group to the next.
        kept: Which units (bool) are not pruned yet; pruned ones rank lowest in their group. None means all.

    >>> scores = torch.tensor([9.0, 1.0, 5.0, 2.0, 4.0, 3.0, 8.0, 7.0])
    >>> part_within(scores, scores.__getitem__, 4, 1)(torch.tensor([7, 0])).mul(8).round().tolist()
    [5.0, 7.0]
    """
    flat = None if kept is None else kept.reshape(-1)
    block = size * stride

    def ranked(at: slice | Tensor, groups: Callable[[Tensor], Tensor]) -> Tensor:
        scores = part(at)
        key = keys(scores, 64 if scores.dtype == torch.float64 else 32, None if flat is None else flat[at])
        return _relative(_rank(groups(key)), groups(keys(scores) if key.dtype == torch.int64 else key))

    def some(at: slice | Tensor) -> Tensor:
        if isinstance(at, slice) and at.step == 1:
            first, last = at.start // block * block, -(-at.stop // block) * block
            found = ranked(slice(first, last), lambda values: values.view(-1, size, stride).movedim(1, -1))
            return found.movedim(-1, 1).reshape(-1)[at.start - first : at.stop - first]
        at = torch.arange(at.start, at.stop, at.step, device=like.device) if isinstance(at, slice) else at
        position = at // stride % size
        group = (at - position * stride).unsqueeze(1) + torch.arange(0, block, stride, device=like.device)
        found = ranked(group.view(-1), lambda values: values.view(-1, size))
        return found.gather(1, position.unsqueeze(1)).squeeze(1)

    return some


def _relative(rank: Tensor, key: Tensor) -> Tensor:
    """Return float64 scores that sort by the rank in a group (the last dimension), then by the key."""
    offset = key.double().add_(2.0**31)
    # scores of one rank differ by less than 2**-30, ranks in a group of up to 2**30 by more
    return rank.double().add_(0.5).div_(rank.shape[-1]).add_(offset, alpha=2.0**-62)


def _rank(groups: Tensor) -> Tensor:
    """Return the rank of each element along the last dimension, from 0; equal ones keep their order."""
    size = groups.shape[-1]
    if size > _SMALL_GROUP:
        order = groups.argsort(dim=-1, stable=True)
        return torch.empty_like(order).scatter_(-1, order, torch.arange(size, device=order.device).expand_as(order))
    columns = [column.contiguous() for column in groups.unbind(-1)]
    ranks = [torch.full_like(column, size - 1 - i) for i, column in enumerate(columns)]
    for i, column in enumerate(columns):
        for before in range(i):
            no_more = torch.le(columns[before], column, out=torch.empty_like(column))
            ranks[i] += no_more
            ranks[before] -= no_more
    return torch.stack(ranks, -1)


def sum_share(rows: Tensor) -> Tensor:
    """Return, for each score, the share of its row's sum that it and all lower scores make up: float64, 0 to 1.

    >>> sum_share(torch.tensor([[1.0, 3.0, 4.0], [0.0, 2.0, 0.0]])).tolist()
    [[0.125, 0.5, 1.0], [0.0, 1.0, 0.0]]
    """
    ordered, order = rows.double().sort(dim=-1, stable=True)
    total = ordered.cumsum(-1)
    shares = total / total[..., -1:].clamp(min=torch.finfo(torch.float64).tiny)
    return torch.empty_like(shares).scatter_(-1, order, shares)


def tail_share(scores: Tensor) -> Tensor:
    """Return the square of each score divided by the sum of squares of all scores at least as high (LAMP).

    Negative scores count as 0.

    >>> tail_share(torch.tensor([1.0, 3.0, 2.0, 1.0])).tolist()
    [0.06666666666666667, 1.0, 0.3076923076923077, 0.06666666666666667]
    """
    # in place, since a large layer has many scores; the highest come first
    lowered, order = scores.reshape(-1).clamp(min=0.0).neg_().sort()
    total = lowered.double().square_().cumsum_(0)
    for at in slices(len(total), total.device):
        squares = lowered[at].double().square_()
        # equal scores share the sum of the last of them, which is in this chunk or a later one: not yet overwritten
        last = torch.searchsorted(lowered, lowered[at], right=True).sub_(1)
        sums = total[last].clamp_(min=torch.finfo(torch.float64).tiny)
        total[at] = torch.where(squares > 0, squares / sums, 0.0)
    del lowered
    return torch.empty_like(total).scatter_(0, order, total).view(scores.shape)
