"""Ranking: scores that say where units stand among others: those of their group, or those of their layer."""

import torch
from torch import Tensor

from lightning_prune.radix import keys

_FEW = 16  # of a group: comparing each with each is faster than sorting


def rank_within(scores: Tensor, size: int) -> Tensor:
    """Return float64 scores that order by the place within groups of ``size`` along the last dimension, then by score.

    A place is the middle of what it takes of its group, ``(rank + 0.5) / size``: the k lowest of all are as evenly
    spread over groups as can be, also where the last group is shorter. Equal scores of a group keep their order.

    >>> rank_within(torch.tensor([9.0, 1.0, 5.0, 2.0, 4.0, 3.0]), 4).mul(8).round().tolist()
    [7.0, 1.0, 5.0, 3.0, 6.0, 2.0]
    """
    length = scores.shape[-1]
    whole = length - length % size
    parts = [scores[..., :whole].unflatten(-1, (-1, size)), scores[..., whole:].unsqueeze(-2)]
    places = [(_rank(part).double() + 0.5).div_(part.shape[-1]).flatten(-2) for part in parts if part.numel()]
    # scores of a place differ by less than 2**-30, and places of a group of up to 2**30 by more
    among = keys(scores.reshape(-1)).double().add_(2.0**31).mul_(2.0**-62)
    return torch.cat(places, -1).add_(among.view(scores.shape)) if places else scores.double()


def _rank(groups: Tensor) -> Tensor:
    """Return the rank of each entry along the last dimension, from 0."""
    size = groups.shape[-1]
    if size > _FEW:
        order = groups.argsort(dim=-1, stable=True)
        return torch.empty_like(order).scatter_(-1, order, torch.arange(size, device=order.device).expand_as(order))
    rank = torch.zeros(groups.shape, dtype=torch.uint8, device=groups.device)
    for place in range(size):
        other = groups[..., place : place + 1]
        rank[..., : place + 1] += other < groups[..., : place + 1]
        rank[..., place + 1 :] += other <= groups[..., place + 1 :]
    return rank


def tail_share(scores: Tensor) -> Tensor:
    """Return the square of each score over the sum of the squares of all that are no less; a negative one counts as 0.

    >>> tail_share(torch.tensor([1.0, 3.0, 2.0, 1.0])).tolist()
    [0.06666666666666667, 1.0, 0.3076923076923077, 0.06666666666666667]
    """
    ordered, order = scores.reshape(-1).double().clamp(min=0.0).sort(descending=True)
    squares = ordered.square()
    total = squares.cumsum(0)
    last = torch.searchsorted(ordered.neg(), ordered.neg(), right=True) - 1  # equal ones share the sum with all of them
    shares = torch.where(squares > 0, squares / total[last].clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return torch.empty_like(shares).scatter_(0, order, shares).view(scores.shape)
