"""Swaps: in each group of weights a pruned one takes the place of a kept one for as long as the layer's error falls."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_prune.granularities import Granularity, SharedFanIn

_CHUNK = 1 << 22  # pairs of columns at a time
_SHORT = 32  # of the kept and of the pruned units of a set, those that cost least are tried first


class Grouped(NamedTuple):
    """A layer as groups of rows that keep the same columns.

    Args:
        rows: The weights before pruning, of shape (groups, rows, columns).
        keep: Which columns each group keeps: bool, of shape (groups, columns).
        moments: Second moments of the inputs, of shape (columns, columns).
        sets: Columns that may take each other's place, of shape (sets, columns of each); -1 fills a shorter set.
    """

    rows: Tensor
    keep: Tensor
    moments: Tensor
    sets: Tensor


class Swap(NamedTuple):
    """The best swap of each group: how much the error changes, which column goes and which comes back."""

    change: Tensor
    goes: Tensor
    comes: Tensor


def refined(weight: Tensor, mask: Tensor, moments: Tensor, granularity: Granularity, most: int) -> Tensor:
    """Return a mask with as many weights in every row, or group, and at most the error of the layer's outputs.

    Args:
        weight: The weight before pruning, output channels first.
        mask: Which of its elements are kept.
        moments: Second moments of the inputs, of shape (groups of the layer, columns, columns).
        granularity: ``Weight``, ``NM`` or ``SharedFanIn``.
        most: How many swaps are made in a row, or group, at most.

    >>> from lightning_prune.granularities import Weight
    >>> inputs = torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 1.0]])  # the errors of the first two cancel
    >>> weight, mask = torch.tensor([[2.0, -2.0, 1.0]]), torch.tensor([[True, False, False]])
    >>> refined(weight, mask, (inputs.mT @ inputs)[None], Weight(), most=1).tolist()
    [[False, False, True]]
    """
    inner, columns = len(moments), moments.shape[1]
    height = granularity.rows if isinstance(granularity, SharedFanIn) else 1
    sets = _sets(weight.shape[1], weight.shape[2:].numel(), granularity.group).to(weight.device)
    parts = zip(weight.reshape(inner, -1, columns), mask.reshape(inner, -1, columns), moments, strict=True)
    found = []
    for rows, keep, own in parts:
        short = -len(rows) % height  # a last group of fewer rows
        rows = torch.nn.functional.pad(rows.to(own.dtype), (0, 0, 0, short)).view(-1, height, columns)
        new = swapped(Grouped(rows, keep[::height], own, sets), most)
        found.append(new.repeat_interleave(height, 0)[: len(keep)])
    return torch.cat(found).view(mask.shape)


def _sets(inputs: int, kernel: int, group: int | None) -> Tensor:
    """Return columns (inputs, positions of the kernel) in sets within which they are compared."""
    columns = torch.arange(inputs * kernel).view(inputs, kernel)
    if group is None:
        return columns.view(1, -1)
    padded = torch.nn.functional.pad(columns.T, (0, -inputs % group), value=-1)
    return padded.reshape(-1, group)


def swapped(layer: Grouped, most: int) -> Tensor:
    """Return which columns each group keeps after at most so many swaps, each the best one of its group."""
    keep = layer.keep.clone()
    errors = (layer.rows * ~keep[:, None]) @ layer.moments  # the moments of the inputs with the error of each row
    active = torch.arange(len(keep), device=keep.device)
    for _ in range(most):
        swap = _best(layer, keep, errors, active, _SHORT)
        error = ((layer.rows[active] * ~keep[active, None]) * errors[active]).sum((1, 2))
        least = -1e3 * torch.finfo(error.dtype).eps * error
        stuck = (swap.change >= least).nonzero()[:, 0]
        if len(stuck) and layer.sets.shape[1] > _SHORT:
            closer = _best(layer, keep, errors, active[stuck], layer.sets.shape[1])
            for old, new in zip(swap, closer, strict=True):
                old[stuck] = new
        moving = swap.change < least
        active, goes, comes = active[moving], swap.goes[moving], swap.comes[moving]
        if not len(active):
            break
        keep[active, goes], keep[active, comes] = False, True
        errors[active] += layer.rows[active, :, goes][..., None] * layer.moments[goes][:, None]
        errors[active] -= layer.rows[active, :, comes][..., None] * layer.moments[comes][:, None]
    return keep


def _best(layer: Grouped, keep: Tensor, errors: Tensor, active: Tensor, short: int) -> Swap:
    """Return the best swap of some groups, among so many columns of each set that cost least by themselves."""
    width = min(short, layer.sets.shape[1])
    size = max(1, _CHUNK // (len(layer.sets) * width * width))
    parts = [_best_of(layer, keep, errors, some, width) for some in active.split(size)]
    return Swap(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _best_of(layer: Grouped, keep: Tensor, errors: Tensor, active: Tensor, width: int) -> Swap:
    rows, kept, sets = layer.rows[active], keep[active], layer.sets
    cross = 2 * (rows * errors[active]).sum(1)
    own = rows.square().sum(1)
    alone = own * layer.moments.diagonal()
    infinity = torch.full_like(alone, torch.inf)
    prune = torch.where(kept, alone + cross, infinity)[:, sets]  # groups, sets, columns of each
    restore = torch.where(kept | (own == 0), infinity, alone - cross)[:, sets]  # zeros stay pruned
    filled = sets < 0
    prune, at = prune.masked_fill(filled, torch.inf).topk(width, dim=2, largest=False, sorted=False)
    restore, back = restore.masked_fill(filled, torch.inf).topk(width, dim=2, largest=False, sorted=False)
    number = torch.arange(len(sets), device=sets.device)[None, :, None]
    goes, comes = sets[number, at].clamp(min=0), sets[number, back].clamp(min=0)
    group = torch.arange(len(active), device=sets.device)[:, None, None]
    products = torch.einsum("gsur,gspr->gsup", rows.mT[group, goes], rows.mT[group, comes])
    products = products * layer.moments[goes[..., :, None], comes[..., None, :]]
    change = (prune[..., :, None] + restore[..., None, :] - 2 * products).flatten(1)
    lowest, where = change.min(1)
    first = where // width  # of all sets
    last = where // (width * width) * width + where % width
    return Swap(
        lowest, goes.flatten(1).gather(1, first[:, None])[:, 0], comes.flatten(1).gather(1, last[:, None])[:, 0]
    )
