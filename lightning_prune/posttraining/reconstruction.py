"""Reconstruction: the arithmetic of SparseGPT on the rows of one weight, given the second moments of its input."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_prune.models.layer_inputs import wide
from lightning_prune.tensors.ranking import rank_within

_PART = 1 << 22  # entries of unfolded input at a time


class Choice:
    """Chooses the lowest of each span of columns, so many that the fraction of all that were shown is always met.

    Negative saliencies always go; spans that follow make up for it, where they are more than the fraction.

    Args:
        share: The fraction that goes.
        group: Columns that are compared with each other only, of one row at a time; None compares all of a block.
        blocksize: Columns in a block.
    """

    def __init__(self, share: float, group: int | None, blocksize: int) -> None:
        self.share = share
        self.group = group
        self.blocksize = blocksize
        self.shown = self.chosen = 0

    def order(self, inputs: int, places: int) -> tuple[Tensor, list[int]]:
        """Return the order in which columns (inputs, places of the kernel) are visited, and the widths of its spans.

        Groups lie along the inputs, at each place of the kernel. Those that are shorter come last: behind them the
        fraction need not be met by whole numbers.
        """
        columns = torch.arange(inputs * places).view(inputs, places)
        if self.group is None:
            return columns.view(-1), _widths(inputs * places, self.blocksize)
        whole, rest = columns.T.split([inputs - inputs % self.group, inputs % self.group], 1)
        spans = _widths(whole.numel(), self.group) + _widths(rest.numel(), max(1, rest.shape[1]))
        return torch.cat([whole.reshape(-1), rest.reshape(-1)]), spans

    def __call__(self, saliency: Tensor) -> Tensor:
        """Return what goes (bool) of a span, by saliencies of shape (groups, columns of the span, rows)."""
        gone = saliency < 0
        self.shown += saliency.numel()
        count = max(round(self.share * self.shown) - self.chosen, int(gone.sum()))
        if self.group is not None:
            saliency = rank_within(saliency.movedim(1, -1), saliency.shape[1]).movedim(-1, 1)
        picked = torch.zeros(saliency.numel(), dtype=torch.bool, device=saliency.device)
        picked[saliency.reshape(-1).topk(count, largest=False, sorted=False).indices] = True
        picked |= gone.reshape(-1)
        self.chosen += int(picked.sum())
        return picked.view(saliency.shape)


def _widths(total: int, width: int) -> list[int]:
    return [min(width, total - begin) for begin in range(0, total, width)]


def reconstruct(
    rows: Tensor,
    moments: Tensor,
    choose: Callable[[Tensor], Tensor],
    spans: Sequence[int],
    blocksize: int = 128,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Return rows of weights after some are pruned and the others make up for it, and which (bool) are pruned.

    Args:
        rows: Of shape (groups, rows, columns); each group meets inputs of its own. Weights that are 0 stay 0, and those
            of inputs that are always 0 become it.
        moments: Second moments of the inputs, of shape (groups, columns, columns).
        choose: From the saliencies of a span of columns, as it is by then, to what goes (bool): of shape
            (groups, columns of the span, rows). Weights that were 0 from the start have -1.
        spans: Numbers of columns that are chosen from together, in order.
        blocksize: Columns whose errors reach those behind the block together; the same result, sooner.
        damping: Added to the diagonal of the moments, as a fraction of its mean.

    >>> inputs = torch.tensor([[[1.0, 1.0], [2.0, 2.0]]])  # the second input can do the work of the first
    >>> rows, moments = torch.tensor([[[1.0, 3.0]]]), inputs.mT @ inputs
    >>> new, pruned = reconstruct(rows, moments, lambda saliency: saliency == saliency.min(), [2], damping=1e-6)
    >>> new.round(decimals=3).tolist()
    [[[0.0, 4.0]]]
    """
    factor = torch.stack([inverse_factor(group, damping) for group in moments]).to(rows.dtype)
    columns = rows.mT.clone(memory_format=torch.contiguous_format)  # a column at a time is read and written
    zeros = columns == 0
    columns.masked_fill_(moments.diagonal(dim1=1, dim2=2)[..., None] == 0, 0.0)
    pruned = torch.zeros(columns.shape, dtype=torch.bool, device=rows.device)
    begin = 0
    for block in _blocks(spans, blocksize):
        end = begin + sum(block)
        here = slice(begin, end)
        errors = _prune_block(columns[:, here], factor[:, here, here], zeros[:, here], pruned[:, here], choose, block)
        columns[:, end:] -= factor[:, begin:end, end:].mT @ errors
        begin = end
    return columns.masked_fill_(pruned, 0.0).mT, pruned.mT


def _blocks(spans: Sequence[int], blocksize: int) -> Iterator[list[int]]:
    """Yield spans, as many at a time as have no more columns than a block; one at least."""
    block: list[int] = []
    for span in spans:
        if block and sum(block) + span > blocksize:
            yield block
            block = []
        block.append(span)
    yield block


def _prune_block(
    block: Tensor,
    factor: Tensor,
    zeros: Tensor,
    pruned: Tensor,
    choose: Callable[[Tensor], Tensor],
    spans: Sequence[int],
) -> Tensor:
    """Prune a block of columns in place, write down what goes, and return the errors for the columns behind it."""
    scale = factor.diagonal(dim1=1, dim2=2)[..., None]
    errors = torch.empty_like(block)
    end = 0
    for span in spans:
        begin, end = end, end + span
        saliency = (block[:, begin:end] / scale[:, begin:end]).square()
        pruned[:, begin:end] = choose(saliency.masked_fill_(zeros[:, begin:end], -1.0))
        for place in range(begin, end):
            errors[:, place] = block[:, place] / scale[:, place] * pruned[:, place]
            block[:, place:] -= factor[:, place, place:, None] * errors[:, place, None]
    return errors


def inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """Return the upper triangular U with U^T U the inverse of the damped moments; an input that is always 0 is damping.

    Where they are singular all the same, the damping grows until they are not.

    >>> inverse_factor(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), 0.0).diagonal()
    tensor([0.5000, 1.0000])
    """
    eye = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    scale = float(moments.diagonal().mean()) or 1.0
    while True:
        lower, failed = torch.linalg.cholesky_ex((moments + damping * scale * eye).flip(0, 1))
        if not failed:
            inverse: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
            return inverse
        damping = max(10.0 * damping, 1e-8)


def second_moments(seen: Tensor, ndim: int, total: Tensor | None = None) -> Tensor:
    """Return ``total`` plus the sum of x x^T over windows of a layer's input, in float64 where the device has it.

    Args:
        seen: Windows, with as many dimensions of groups, inputs and kernel as the weight has, behind all others.
        ndim: Number of dimensions of the weight.
        total: What other batches gave.

    >>> second_moments(torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]), 2).tolist()
    [[[10.0, 14.0], [14.0, 20.0]]]
    """
    groups, columns = seen.shape[-ndim], seen.shape[1 - ndim :].numel()
    if total is None:
        total = torch.zeros(groups, columns, columns, dtype=wide(seen.device), device=seen.device)
    for part in seen.split(max(1, _PART // max(1, seen[:1].numel()))):
        rows = part.flatten(1 - ndim).flatten(0, -3).transpose(0, 1)  # groups, rows, columns
        total += rows.mT @ rows
    return total
