"""Summary: the sparsity of a model, layer by layer, as a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from typing_extensions import override

from lightning_prune.models.parameters import Target, find
from lightning_prune.tensors.distributed import counts_here, is_sharded, local, over_ranks
from lightning_prune.validation.instances import instance


@dataclass(frozen=True)
class Row:
    """One parameter: its name, shape, number of weights, number of zeros among them."""

    name: str
    shape: tuple[int, ...]
    weights: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """The fraction of zeros, 0 to 1."""
        return self.zeros / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Summary:
    """The sparsity of the prunable weights of a model, a row each; ``str`` returns a table.

    Args:
        rows: One row a parameter.
    """

    rows: tuple[Row, ...]

    @property
    def total(self) -> Row:
        """All rows together."""
        return Row("total", (), sum(row.weights for row in self.rows), sum(row.zeros for row in self.rows))

    @override
    def __str__(self) -> str:
        cells = [("name", "shape", "weights", "zeros", "sparsity")]
        for row in (*self.rows, self.total):
            cells.append((row.name, shape_text(row.shape), f"{row.weights:,}", f"{row.zeros:,}", f"{row.sparsity:.2%}"))
        return "\n".join(ruled(cells))


def scarcity(row: Row, total: Row) -> Literal["", "nearly empty", "empty"]:
    """Return whether a layer is empty, or keeps at most 2 % of its weights and less than half of what others keep.

    >>> total = Row("total", (), 1000, 500)
    >>> [scarcity(Row("layer", (10, 10), 100, zeros), total) for zeros in (50, 97, 98, 100)]
    ['', '', 'nearly empty', 'empty']
    """
    if row.weights and row.zeros == row.weights:
        return "empty"
    kept, kept_of_all = row.weights - row.zeros, total.weights - total.zeros
    less_than_others = 2 * kept * total.weights < kept_of_all * row.weights
    return "nearly empty" if 50 * kept <= row.weights and less_than_others else ""


def table(cells: Sequence[tuple[str, ...]]) -> list[str]:
    """Return rows of cells as aligned lines: the first two columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]


def ruled(cells: Sequence[tuple[str, ...]]) -> list[str]:
    """Return a table with a line below its header and one above its last row."""
    lines = table(cells)
    rule = "-" * len(lines[0])
    return [lines[0], rule, *lines[1:-1], rule, lines[-1]]


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape as tables show it.

    >>> shape_text((3, 4))
    '3 x 4'
    """
    return " x ".join(map(str, shape))


def shortened(lines: Sequence[str], most: int) -> list[str]:
    """Return lines as they are, or, if there are more than so many, the first and the last of them.

    >>> shortened(["a", "b", "c", "d", "e"], 3)
    ['a', '  ... 3 more', 'e']
    """
    if len(lines) <= most:
        return list(lines)
    first, last = most // 2, (most - 1) // 2
    return [*lines[:first], f"  ... {len(lines) - first - last} more", *lines[len(lines) - last :]]


def counted_as(number: int, what: str) -> str:
    """Return a number of things in words.

    >>> counted_as(1, "update"), counted_as(1200, "weight")
    ('1 update', '1,200 weights')
    """
    return f"{number:,} {what}{'s' * (number != 1)}"


def summary(model: nn.Module, targets: Sequence[str] = (), ignore: Sequence[str] = ()) -> Summary:
    """Print and return the sparsity of every prunable weight and their total.

    Args:
        model: Any module.
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out.

    >>> model = nn.Linear(4, 2)
    >>> _ = nn.init.eye_(model.weight)
    >>> result = summary(model)
    name    shape  weights  zeros  sparsity
    ---------------------------------------
    weight  2 x 4        8      6    75.00%
    ---------------------------------------
    total                8      6    75.00%
    """
    instance("model", model, nn.Module)
    result = Summary(tuple(rows(model, targets, ignore)))
    print(result)
    return result


def sparsity(model: nn.Module, targets: Sequence[str] = (), ignore: Sequence[str] = ()) -> float:
    """Return the fraction of zeros, 0 to 1, among the prunable weights.

    Args:
        model: Any module.
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out.

    >>> model = nn.Linear(4, 2)
    >>> _ = nn.init.eye_(model.weight)
    >>> sparsity(model)
    0.75
    """
    instance("model", model, nn.Module)
    return Summary(tuple(rows(model, targets, ignore))).total.sparsity


def zeros(parameter: Tensor) -> int:
    """Return the number of zeros, on all ranks.

    >>> import torch
    >>> zeros(torch.tensor([0.0, 1.0, -0.0]))
    2
    """
    kept = _values(local(parameter)).count_nonzero()
    if is_sharded(parameter):
        kept = over_ranks(kept * counts_here(parameter))
    return parameter.numel() - int(kept)


def _values(tensor: Tensor) -> Tensor:
    """Return the values of a quantized tensor; any other tensor as it is."""
    return tensor.dequantize() if is_traceable_wrapper_subclass(tensor) else tensor


def rows(model: nn.Module, targets: Sequence[str], ignore: Sequence[str]) -> list[Row]:
    """Return a row for every prunable weight; a collective if parameters are sharded."""
    return [
        Row(target.name, tuple(target.parameter.shape), target.parameter.numel(), zeros(target.parameter))
        for target in counted(model, targets, ignore)
    ]


def counted(model: nn.Module, targets: Sequence[str] = (), ignore: Sequence[str] = ()) -> list[Target]:
    """Return the weights whose zeros count: the prunable ones, or the frozen ones if all weights are frozen.

    All weights are frozen in a model for inference, and in a quantized one, where only biases are trainable.

    >>> [target.name for target in counted(nn.Linear(4, 2).requires_grad_(False))]
    ['weight']
    """
    frozen = not any(p.requires_grad and (is_lazy(p) or p.ndim >= 2) for p in model.parameters())
    return find(model, targets, ignore, frozen)
