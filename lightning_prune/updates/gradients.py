"""Gradients: those of units, as a criterion can look at them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_prune.tensors.distributed import is_sharded, local, over_ranks
from lightning_prune.units.units import Units


def all_finite(units: Sequence[Units], values: Iterable[Tensor]) -> bool:
    """Return whether all values of these units are finite, on all ranks that have shards of them."""
    bad = torch.tensor(sum(not all(end.isfinite() for end in v.aminmax()) for v in values if v.numel()))
    return not (over_ranks(bad) if any(is_sharded(unit.parameter) for unit in units) else bad)


def gradients_of(units: Sequence[Units]) -> Iterator[Tensor]:
    """Return the local shards of the gradients of these units."""
    return (local(unit.parameter.grad) for unit in units if unit.parameter.grad is not None)


@contextmanager
def dense_gradients(units: Sequence[Units]) -> Iterator[None]:
    """Give parameters dense gradients in place of sparse ones, as embeddings have, inside the context."""
    sparse = {
        u.parameter: u.parameter.grad for u in units if u.parameter.grad is not None and u.parameter.grad.is_sparse
    }
    try:
        for parameter, gradient in sparse.items():
            parameter.grad = gradient.to_dense()
        yield
    finally:
        for parameter, gradient in sparse.items():
            parameter.grad = gradient
