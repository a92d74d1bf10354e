"""Reconstruction: the SparseGPT update of a weight, given the second moments of its input."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_prune.granularities import Granularity
from lightning_prune.models.layer_inputs import wide
from lightning_prune.tensors.ranking import rank_within

_CHUNK = 1 << 22  # elements of unfolded input at a time


class Choice:
    """Chooses the lowest saliencies in each span of columns, so that the running fraction is always the target.

    Negative saliencies are always pruned; if they exceed the fraction, later spans compensate.

    Args:
        share: The fraction to prune.
        group: Number of columns in a group within which the weights of one row are compared; None compares a whole
            block.
        blocksize: Number of columns in a block.
    """

    def __init__(self, share: float, group: int | None, blocksize: int) -> None:
        self.share = share
        self.group = group
        self.blocksize = blocksize
        self.seen = self.chosen = 0

    def order(self, inputs: int, kernel: int) -> tuple[Tensor, list[int]]:
        """Return the order in which columns (inputs, positions of the kernel) are visited, and the widths of the spans.

        Groups run along the inputs, at each position of the kernel. Shorter groups come last, since the fraction may
        not be a whole number of their weights.
        """
        columns = torch.arange(inputs * kernel).view(inputs, kernel)
        if self.group is None:
            return columns.view(-1), _widths(inputs * kernel, self.blocksize)
        full, rest = columns.T.split([inputs - inputs % self.group, inputs % self.group], 1)
        spans = _widths(full.numel(), self.group) + _widths(rest.numel(), max(1, rest.shape[1]))
        return torch.cat([full.reshape(-1), rest.reshape(-1)]), spans

    def __call__(self, saliency: Tensor) -> Tensor:
        """Return what to prune (bool) in a span, by saliencies of shape (groups, columns of the span, rows)."""
        forced = saliency < 0
        self.seen += saliency.numel()
        count = max(round(self.share * self.seen) - self.chosen, int(forced.sum()))
        if self.group is not None:
            saliency = rank_within(saliency.movedim(1, -1), saliency.shape[1]).movedim(-1, 1)
        picked = torch.zeros(saliency.numel(), dtype=torch.bool, device=saliency.device)
        picked[saliency.reshape(-1).topk(count, largest=False, sorted=False).indices] = True
        picked |= forced.reshape(-1)
        self.chosen += int(picked.sum())
        return picked.view(saliency.shape)


class EvenChoice:
    """Chooses units of several rows in each span of columns: every group of rows loses as many as the others.

    Units that are all zero from the start are always pruned; if they exceed the fraction, later spans compensate. Every
    group keeps one column at least.

    Args:
        share: The fraction to prune.
        granularity: Pools rows to units of one column.
        blocksize: Number of columns in a block.
    """

    def __init__(self, share: float, granularity: Granularity, blocksize: int) -> None:
        self.share = share
        self.granularity = granularity
        self.blocksize = blocksize
        self.most = self.seen = 0
        self.chosen: Tensor | int = 0  # of every group

    def order(self, inputs: int, kernel: int) -> tuple[Tensor, list[int]]:
        """Return the order in which columns are visited, input by input, and the widths of the spans."""
        self.most = inputs * kernel - 1
        return torch.arange(inputs * kernel), _widths(inputs * kernel, self.blocksize)

    def __call__(self, saliency: Tensor) -> Tensor:
        """Return what to prune (bool) in a span, by saliencies of shape (groups, columns of the span, rows)."""
        matrix = saliency.movedim(1, -1).flatten(0, 1)
        groups, columns = self.granularity.groups(matrix.shape, 0), matrix.shape[1]
        pooled = self.granularity.pool(matrix.clamp(min=0.0), 0).view(groups, columns)
        alive = self.granularity.pool((matrix >= 0).to(matrix.dtype), 0).view(groups, columns) > 0
        self.seen += columns
        wanted = min(round(self.share * self.seen), self.most) - self.chosen
        count = torch.maximum((~alive).sum(1), torch.as_tensor(wanted, device=matrix.device))
        rank = pooled.masked_fill(~alive, -1.0).argsort(dim=1, stable=True).argsort(dim=1)
        picked = rank < count[:, None]
        self.chosen = self.chosen + picked.sum(1)
        pruned = self.granularity.expand(picked.view(-1), matrix.shape, 0)
        spread: Tensor = pruned.unflatten(0, (len(saliency), -1)).movedim(-1, 1)
        return spread


def make_choice(share: float, granularity: Granularity, blocksize: int) -> Choice | EvenChoice:
    """Return what chooses this fraction of the units of a granularity."""
    if granularity.single:
        return Choice(share, granularity.group, blocksize)
    return EvenChoice(share, granularity, blocksize)


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
    """Prune rows of weights and update the remaining ones to compensate; return both, the pruned as bools.

    Args:
        rows: Of shape (groups, rows, columns); each group has its own inputs. Weights that are 0 stay 0; weights of
            inputs that are always 0 become 0.
        moments: Second moments of the inputs, of shape (groups, columns, columns).
        choose: Maps the current saliencies of a span of columns to what to prune (bool), both of shape
            (groups, columns of the span, rows). Weights that were 0 from the start have -1.
        spans: Numbers of columns to choose from together, in order.
        blocksize: Number of columns whose errors are propagated together; affects speed only.
        damping: Added to the diagonal of the moments, as a fraction of its mean.

    >>> inputs = torch.tensor([[[1.0, 1.0], [2.0, 2.0]]])  # the second input can replace the first
    >>> rows, moments = torch.tensor([[[1.0, 3.0]]]), inputs.mT @ inputs
    >>> new, pruned = reconstruct(rows, moments, lambda saliency: saliency == saliency.min(), [2], damping=1e-6)
    >>> new.round(decimals=3).tolist()
    [[[0.0, 4.0]]]
    """
    factor = torch.stack([inverse_factor(group, damping) for group in moments]).to(rows.dtype)
    columns = rows.mT.clone(memory_format=torch.contiguous_format)  # columns are read and written one at a time
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
    """Yield the spans in blocks of at most ``blocksize`` columns, at least one span each."""
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
    """Prune a block of columns in place, mark what is pruned, and return the errors for the columns after it."""
    scale = factor.diagonal(dim1=1, dim2=2)[..., None]
    errors = torch.empty_like(block)
    end = 0
    for span in spans:
        begin, end = end, end + span
        saliency = (block[:, begin:end] / scale[:, begin:end]).square()
        pruned[:, begin:end] = choose(saliency.masked_fill_(zeros[:, begin:end], -1.0))
        for column in range(begin, end):
            errors[:, column] = block[:, column] / scale[:, column] * pruned[:, column]
            block[:, column:] -= factor[:, column, column:, None] * errors[:, column, None]
    return errors


def inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """Return the upper triangular U with U^T U the inverse of the damped moments.

    The damping grows for as long as they are singular.

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
    """Return ``total`` plus the sum of x x^T over windows of a layer's input, in float64 if the device has it.

    Args:
        seen: Windows, whose last ``ndim`` dimensions are groups, inputs and kernel.
        ndim: Number of dimensions of the weight.
        total: The sum over earlier batches; None is zero.

    >>> second_moments(torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]), 2).tolist()
    [[[10.0, 14.0], [14.0, 20.0]]]
    """
    groups, columns = seen.shape[-ndim], seen.shape[1 - ndim :].numel()
    if total is None:
        total = torch.zeros(groups, columns, columns, dtype=wide(seen.device), device=seen.device)
    for part in seen.split(max(1, _CHUNK // max(1, seen[:1].numel()))):
        rows = part.flatten(1 - ndim).flatten(0, -3).transpose(0, 1)  # groups, rows, columns
        total += rows.mT @ rows
    return total
