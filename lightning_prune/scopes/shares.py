"""Scopes: unit scores and one sparsity to how many units each target keeps."""

from collections.abc import Callable, Mapping
from typing import Literal

from lightning_prune.scopes.erdos_renyi import ERK
from lightning_prune.tensors.ranking import tail_share
from lightning_prune.tensors.selection import Scores
from lightning_prune.validation.instances import named

Scope = Callable[[Scores, float], Mapping[str, int]]
ScopeName = Literal["global", "local", "erk", "lamp"]


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
    return ERK()(scores, sparsity)


def lamp(scores: Scores, sparsity: float) -> dict[str, int]:
    """Rank the units of all targets by the square of their score over that of all in the target that are no less.

    So every target keeps its highest one. Negative scores count as 0. Each target is sorted, and gathered where ranks
    hold it in pieces, one at a time.

    Reference: Lee et al., 2021, "Layer-adaptive Sparsity for the Magnitude-based Pruning", arXiv:2010.07611.

    >>> import torch
    >>> lamp(Scores.of({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([30.0, 40.0])}), 0.5)
    {'a': 1, 'b': 1}
    """
    return global_(scores.within_targets(tail_share), sparsity)


def at_least(scores: Scores, sparsity: float, scope: Scope, density: float, strict: bool = True) -> dict[str, int]:
    """Share out by a scope, but keep this fraction of every target, rounded down, and one unit, at least.

    Targets that would keep less are held there, and the scope shares out the rest over the others. If that is more
    than the sparsity leaves in all and it is not strict, the scope decides alone.

    Raises:
        ValueError: If that is more than the sparsity leaves in all, and it is strict.

    >>> import torch
    >>> at_least(Scores.of({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}), 0.5, global_, 0.1)
    {'a': 1, 'b': 1}
    """
    sizes = scores.sizes
    floor = {name: max(1, int(density * size)) for name, size in sizes.items()}
    keep = dict(scope(scores, sparsity))
    total, held = sum(keep.values()), {}
    if sum(floor.values()) > total:
        if not strict:
            return keep
        raise ValueError(
            f"min_density must leave room for the sparsity, got {density}, which keeps {sum(floor.values())} units of "
            f"{total} that are to be left"
        )
    while any(keep[name] < floor[name] for name in keep):
        held.update({name: floor[name] for name in keep if keep[name] < floor[name]})
        others = [name for name in sizes if name not in held]
        left = sum(sizes[name] for name in others)
        keep = dict(scope(scores.only(others), 1.0 - (total - sum(held.values())) / left)) if left else {}
    return {name: held[name] if name in held else keep[name] for name in sizes}


SCOPES: dict[str, Scope] = {"global": global_, "local": local, "erk": erk, "lamp": lamp}


def resolve(scope: str | Scope) -> Scope:
    """Return the scope of that name, or the callable itself.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If it is neither a name nor a callable of two arguments.

    >>> resolve("global").__name__
    'global_'
    """
    if isinstance(scope, str) and scope in SCOPES:
        return SCOPES[scope]
    return named("scope", scope, SCOPES, "scores", "sparsity")


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
