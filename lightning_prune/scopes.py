"""Scopes: unit scores and one sparsity to how many units each target keeps."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from lightning_prune.arguments import integer, number
from lightning_prune.erdos_renyi import ERK, whole
from lightning_prune.instances import named, settle
from lightning_prune.ranking import tail_share
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


@dataclass(frozen=True)
class OWL:
    """Keep more of blocks with more outliers: scores that are many times the mean of their block. Made for ``Wanda``.

    The targets of a block have one density. Densities lie around that of the whole, no further apart than
    ``2 * spread``. Where blocks are pruned one after another (``sequential``), the scores of the model before that
    decide, of one more pass over the data.

    Args:
        outliers: How many times the mean a score has to exceed, to be an outlier.
        spread: The most, a fraction, that densities may lie above or below the middle of theirs.
        depth: Parts of a name, between dots, that targets of one block share: 3 for
            "model.layers.7.mlp.up_proj.weight". None goes to the first number that is not the same for all targets,
            as that of a block in a ``ModuleList`` is ("model.layers.7"). 0 gives every target its own density.

    Raises:
        ValueError: If an argument is out of range.

    Reference: Yin et al., 2023, "Outlier Weighed Layerwise Sparsity", arXiv:2310.05175.

    >>> import torch
    >>> OWL(outliers=3.0, spread=0.1)(Scores.of({"a": torch.ones(10), "b": torch.tensor([1.0] * 9 + [50.0])}), 0.5)
    {'a': 4, 'b': 6}
    """

    compares_blocks: ClassVar[bool] = True

    outliers: float = 5.0
    spread: float = 0.08
    depth: int | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        settle(self, outliers=number("outliers", self.outliers, "(0, inf)"))
        depth = None if self.depth is None else integer("depth", self.depth, 0)
        settle(self, spread=number("spread", self.spread, "[0, 1)"), depth=depth)

    def __call__(self, scores: Scores, sparsity: float) -> dict[str, int]:
        """Return how many units each target keeps."""
        share: dict[str, float] = {}
        for names in _blocks(scores, self.depth):
            share.update(dict.fromkeys(names, self._outliers(scores, names)))
        low, high = min(share.values()), max(share.values())
        wide = {name: 2 * self.spread * (ratio - low) / (high - low or 1.0) for name, ratio in share.items()}
        return _shifted(wide, scores.sizes, sparsity)

    def _outliers(self, scores: Scores, names: Iterable[str]) -> float:
        """Return which fraction of the scores of a block are outliers."""
        sizes = {name: scores.sizes[name] for name in names}  # scores are had twice, and never held together
        mean = sum(float(scores.raw(name).mean()) * size for name, size in sizes.items()) / sum(sizes.values())
        found = sum(int((scores.raw(name) > self.outliers * mean).sum()) for name in sizes)
        return found / sum(sizes.values())


def _blocks(names: Iterable[str], depth: int | None) -> list[list[str]]:
    """Return the names that belong together: those whose first parts are the same.

    >>> _blocks(["net.0.h.0.fc1.weight", "net.0.h.0.fc2.weight", "net.0.h.1.fc1.weight", "net.1.weight"], 4)
    [['net.0.h.0.fc1.weight', 'net.0.h.0.fc2.weight'], ['net.0.h.1.fc1.weight'], ['net.1.weight']]
    >>> _blocks(["net.0.h.0.fc1.weight", "net.0.h.0.fc2.weight", "net.0.h.1.fc1.weight"], None)
    [['net.0.h.0.fc1.weight', 'net.0.h.0.fc2.weight'], ['net.0.h.1.fc1.weight']]
    """
    parts = {name: name.split(".") for name in names}
    columns = list(zip(*parts.values(), strict=False))
    common = next((place for place, column in enumerate(columns) if len(set(column)) > 1), len(columns))
    found: dict[str, list[str]] = {}
    for name, words in parts.items():
        number = next((place for place in range(common, len(words)) if words[place].isdigit()), len(words))
        found.setdefault(".".join(words[: number + 1 if depth is None else depth or None]), []).append(name)
    return list(found.values())


def _shifted(density: Mapping[str, float], sizes: Mapping[str, int], sparsity: float) -> dict[str, int]:
    """Shift densities by one number, within 0 and 1, until as many units are kept in all as the sparsity leaves."""
    wanted = sum(sizes.values()) - round(sparsity * sum(sizes.values()))
    low, high = -2.0, 2.0
    keep: dict[str, float] = {}
    for _ in range(60):
        shift = (low + high) / 2
        keep = {name: min(1.0, max(0.0, density[name] + shift)) * size for name, size in sizes.items()}
        low, high = (low, shift) if sum(keep.values()) > wanted else (shift, high)
    return whole(keep, wanted)


def at_least(scores: Scores, sparsity: float, scope: Scope, density: float) -> dict[str, int]:
    """Share out by a scope, but keep this fraction of every target, rounded down, and one unit, at least.

    Targets that would keep less are held there, and the scope shares out the rest over the others.

    Raises:
        ValueError: If that is more than the sparsity leaves in all.

    >>> import torch
    >>> at_least(Scores.of({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}), 0.5, global_, 0.1)
    {'a': 1, 'b': 1}
    """
    sizes = scores.sizes
    floor = {name: max(1, int(density * size)) for name, size in sizes.items()}
    keep = dict(scope(scores, sparsity))
    total, held = sum(keep.values()), {}
    if sum(floor.values()) > total:
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
