"""Scopes: unit scores and one sparsity to how many units each target keeps."""

import math
from collections.abc import Callable, Mapping

from lightning_prune.selection import Scores

Scope = Callable[[Scores, float], Mapping[str, int]]


def local(scores: Scores, sparsity: float) -> dict[str, int]:
    """Keep the same fraction of every target.

    >>> import torch
    >>> local(Scores.of({"a": torch.rand(10), "b": torch.rand(4)}), 0.5)
    {'a': 5, 'b': 2}
    """
    return {name: size - round(sparsity * size) for name, size in scores.sizes.items()}


def global_(scores: Scores, sparsity: float) -> dict[str, int]:
    """Rank the units of all targets together and keep the highest, wherever they are.

    >>> import torch
    >>> global_(Scores.of({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}), 0.5)
    {'a': 0, 'b': 2}
    """
    counts = scores.counts(round(sparsity * sum(scores.sizes.values())))
    return {name: size - counts[name] for name, size in scores.sizes.items()}


def erk(scores: Scores, sparsity: float) -> dict[str, int]:
    """Keep more of small targets: density in proportion to ``sum(shape) / prod(shape)``, at most 1.

    Reference: Evci et al., 2020, "Rigging the Lottery" (Erdos-Renyi-Kernel), arXiv:1911.11134.

    >>> import torch
    >>> erk(Scores.of({"a": torch.rand(30, 30), "b": torch.rand(3, 30)}), 0.5)
    {'a': 405, 'b': 90}
    """
    sizes = scores.sizes
    density = {name: sum(shape) / math.prod(shape) for name, shape in scores.shapes.items()}
    wanted = sum(sizes.values()) - round(sparsity * sum(sizes.values()))
    full: set[str] = set()
    while True:  # a target that would be more than dense is left dense, and the others share what remains
        free = wanted - sum(sizes[name] for name in full)
        scale = free / max(1e-12, sum(density[name] * sizes[name] for name in sizes if name not in full))
        over = {name for name in sizes if name not in full and density[name] * scale > 1.0}
        if not over:
            break
        full |= over
    keep = {name: float(size) if name in full else density[name] * scale * size for name, size in sizes.items()}
    return _whole(keep, wanted)


SCOPES: dict[str, Scope] = {"global": global_, "local": local, "erk": erk}


def resolve(scope: str | Scope) -> Scope:
    """Return the scope of that name, or the callable itself.

    Raises:
        ValueError: If the name is unknown.

    >>> resolve("global").__name__
    'global_'
    """
    if isinstance(scope, str):
        if scope not in SCOPES:
            raise ValueError(f"scope must be one of {sorted(SCOPES)} or a callable, got {scope!r}")
        return SCOPES[scope]
    return scope


def per_layer(scores: Scores, sparsities: Mapping[str, float], due: float = 1.0) -> dict[str, int]:
    """Keep of each target what its own sparsity, times the fraction of it that is due, leaves.

    >>> import torch
    >>> per_layer(Scores.of({"a": torch.rand(10), "b": torch.rand(4)}), {"a": 0.9, "b": 0.5})
    {'a': 1, 'b': 2}
    """
    return {name: size - round(sparsities[name] * due * size) for name, size in scores.sizes.items()}


def below(scores: Scores, level: float, due: float = 1.0) -> dict[str, int]:
    """Keep every unit that scores ``level`` or more, and of the others all but the lowest fraction that is due.

    >>> import torch
    >>> below(Scores.of({"a": torch.tensor([0.1, 0.2, 0.3])}), 0.3)
    {'a': 1}
    """
    counts = scores.counts(round(due * scores.below(level)))
    return {name: size - counts[name] for name, size in scores.sizes.items()}


def _whole(keep: dict[str, float], total: int) -> dict[str, int]:
    """Round to whole numbers that sum to ``total``: the largest remainders are rounded up."""
    whole = {name: int(amount) for name, amount in keep.items()}
    by_remainder = sorted(keep, key=lambda name: whole[name] - keep[name])  # stable: equal ones in target order
    for name in by_remainder[: total - sum(whole.values())]:
        whole[name] += 1
    return whole
