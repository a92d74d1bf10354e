"""The order of rows: which rows should share their inputs, so that groups of them keep as much as they can."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

_ROUNDS = 50  # of choosing inputs and exchanging rows; most searches end after five
_LEAST = 1e-6  # of what is kept, in all or by a row; smaller gains are noise
_POWERS = 20  # of the power iteration: a rough direction is enough to start from


def best_order(layers: Sequence[Tensor], keep: Sequence[int], rows: int) -> Tensor:
    """Return an order (int64) of rows in which groups of them keep more of their scores, or as much.

    Alternates, from two starts, between the best inputs of each group and exchanges of rows between groups. Neither
    step can lose anything; what it ends with is a local optimum.

    Args:
        layers: The scores of layers whose rows come in one order: each of shape (rows, inputs).
        keep: How many inputs a group keeps, for each layer.
        rows: Rows in a group.

    >>> scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    >>> order = best_order([scores], [1], 2)
    >>> kept_by_groups([scores], [1], order, 2)
    4.0
    """
    given = torch.arange(len(layers[0]))
    least = kept_by_groups(layers, keep, given, rows) * (1 + _LEAST)
    found = [_improved(layers, keep, order, rows) for order in (given, _apart(layers))]
    kept, order = max(((kept_by_groups(layers, keep, each, rows), each) for each in found), key=lambda pair: pair[0])
    return order if kept > least else given


def kept_by_groups(layers: Sequence[Tensor], keep: Sequence[int], order: Tensor, rows: int) -> float:
    """Return the scores that groups of rows keep in an order."""
    sums = (_group_sums(scores[order], rows).topk(k, 1).values for scores, k in zip(layers, keep, strict=True))
    return sum(float(kept.double().sum()) for kept in sums)


def _apart(layers: Sequence[Tensor]) -> Tensor:
    """Return the order along the direction in which the rows differ most."""
    scores = torch.cat(list(layers), 1)
    apart = scores - scores.mean(0)
    along = torch.randn(len(scores), generator=torch.Generator().manual_seed(0))
    for _ in range(_POWERS):
        along = normalize(apart @ (apart.mT @ along), dim=0)
    return along.argsort(stable=True)


def _group_sums(scores: Tensor, rows: int) -> Tensor:
    """Return the sums over groups of rows: (groups, inputs)."""
    rows = min(rows, len(scores))
    short = -len(scores) % rows
    return pad(scores, (0, 0, 0, short)).reshape(-1, rows, scores.shape[1]).sum(1)


def _improved(layers: Sequence[Tensor], keep: Sequence[int], order: Tensor, rows: int) -> Tensor:
    best = kept_by_groups(layers, keep, order, rows)
    for _ in range(_ROUNDS):
        kept = _kept_of_rows(layers, keep, order, rows)
        group = _exchanged(kept, torch.arange(len(order)) // rows, _LEAST * best / len(order))
        other = order[group.argsort(stable=True)]
        reached = kept_by_groups(layers, keep, other, rows)
        if reached <= best:
            break
        order, best = other, reached
    return order


def _kept_of_rows(layers: Sequence[Tensor], keep: Sequence[int], order: Tensor, rows: int) -> Tensor:
    """Return what each row would keep of its scores in each group, with the inputs that the group has now."""
    found = torch.zeros(())
    for scores, k in zip(layers, keep, strict=True):
        sums = _group_sums(scores[order], rows)
        inputs = torch.zeros_like(sums).scatter_(1, sums.topk(k, 1).indices, 1.0)
        found = found + scores[order] @ inputs.mT
    return found


def _exchanged(kept: Tensor, group: Tensor, least: float) -> Tensor:
    """Return the group of each row after exchanges of two rows each, as long as any gains more than the least."""
    groups, group = kept.shape[1], group.clone()
    while True:
        gains = kept - kept.gather(1, group[:, None])  # of a row that moves to another group
        best = gains.new_full((groups, groups), -torch.inf)
        best.scatter_reduce_(0, group[:, None].expand_as(gains), gains, "amax")
        pairs = (best + best.mT).triu(1)
        values, flat = pairs.flatten().sort(descending=True, stable=True)
        busy: set[int] = set()
        for pair in flat[: int((values > least).sum())].tolist():
            one, other = divmod(pair, groups)
            if busy.isdisjoint((one, other)):
                goes = _row(gains, group, one, other)
                comes = _row(gains, group, other, one)
                group[goes], group[comes] = other, one
                busy |= {one, other}
        if not busy:
            return group


def _row(gains: Tensor, group: Tensor, origin: int, goal: int) -> int:
    """Return the row of a group that gains most in another one."""
    return int(gains[:, goal].masked_fill(group != origin, -torch.inf).argmax())
