"""OWL: more units for blocks with more outliers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from lightning_prune.scopes.erdos_renyi import whole
from lightning_prune.tensors.selection import Scores
from lightning_prune.validation.arguments import integer, number
from lightning_prune.validation.instances import settle


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
        for names in by_block(scores, self.depth):
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


def by_block(names: Iterable[str], depth: int | None) -> list[list[str]]:
    """Return the names that belong together: those whose first parts are the same.

    >>> by_block(["net.0.h.0.fc1.weight", "net.0.h.0.fc2.weight", "net.0.h.1.fc1.weight", "net.1.weight"], 4)
    [['net.0.h.0.fc1.weight', 'net.0.h.0.fc2.weight'], ['net.0.h.1.fc1.weight'], ['net.1.weight']]
    >>> by_block(["net.0.h.0.fc1.weight", "net.0.h.0.fc2.weight", "net.0.h.1.fc1.weight"], None)
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
