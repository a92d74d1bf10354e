"""Erdos-Renyi densities: the smaller a layer, the denser it stays, whatever its scores."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_prune.models.parameters import matches
from lightning_prune.tensors.selection import Scores
from lightning_prune.validation.arguments import flag, number, patterns
from lightning_prune.validation.instances import settle


@dataclass(frozen=True)
class ERK:
    """Keep more of small targets: density in proportion to ``(sum(shape) / prod(shape))**power``, at most 1.

    Args:
        power: 1 is the paper's; 0 keeps the same fraction of every target that is not dense.
        kernel: Whether the shape includes the kernel of a convolution. If not, it is Erdos-Renyi (ER), as in SET.
        dense: Globs (or "re:" and a regular expression) on the names of targets that stay dense.

    Raises:
        ValueError: If the power is negative or not finite; when it shares out, if a pattern matches no target, or the
            others are too small for the sparsity.

    Reference: Evci et al., 2020, "Rigging the Lottery" (Erdos-Renyi-Kernel), arXiv:1911.11134; Mocanu et al., 2018
    (Erdos-Renyi), arXiv:1707.04780.

    >>> import torch
    >>> scores = Scores.of({"a": torch.rand(30, 30), "b": torch.rand(3, 30)})
    >>> ERK()(scores, 0.5), ERK(dense=("b",), power=0.0)(scores, 0.8)
    ({'a': 405, 'b': 90}, {'a': 108, 'b': 90})
    """

    power: float = 1.0
    kernel: bool = True
    dense: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the arguments."""
        settle(self, power=number("power", self.power, "[0, inf)"), kernel=flag("kernel", self.kernel))
        settle(self, dense=patterns("dense", self.dense))

    def __call__(self, scores: Scores, sparsity: float) -> dict[str, int]:
        """Return how many units each target keeps."""
        sizes = scores.sizes
        density = {name: self._density(shape) for name, shape in scores.shapes.items()}
        wanted = sum(sizes.values()) - round(sparsity * sum(sizes.values()))
        full = self._dense(sizes, wanted)
        while True:  # a target that would be more than dense is left dense, and the others share what remains
            free = wanted - sum(sizes[name] for name in full)
            scale = free / max(1e-12, sum(density[name] * sizes[name] for name in sizes if name not in full))
            over = {name for name in sizes if name not in full and density[name] * scale > 1.0}
            if not over:
                break
            full |= over
        keep = {name: float(size) if name in full else density[name] * scale * size for name, size in sizes.items()}
        return whole(keep, wanted)

    def _density(self, shape: tuple[int, ...]) -> float:
        shape = shape if self.kernel else shape[:2]
        return float((sum(shape) / math.prod(shape)) ** self.power)

    def _dense(self, sizes: Mapping[str, int], wanted: int) -> set[str]:
        for pattern in self.dense:
            if not any(matches(pattern, [name]) for name in sizes):
                raise ValueError(f"dense must match targets, got {pattern!r}, which matches none of {list(sizes)[:5]}")
        found = {name for name in sizes if any(matches(pattern, [name]) for pattern in self.dense)}
        held = sum(sizes[name] for name in found)
        if held > wanted:
            raise ValueError(
                f"dense must leave room for the sparsity, got {self.dense}, which keeps {held} units of {wanted} that "
                f"are to be left"
            )
        return found


def whole(keep: Mapping[str, float], total: int) -> dict[str, int]:
    """Round to whole numbers that sum to ``total``: the largest remainders are rounded up.

    >>> whole({"a": 1.2, "b": 2.8}, 4)
    {'a': 1, 'b': 3}
    """
    found = {name: int(amount) for name, amount in keep.items()}
    by_remainder = sorted(keep, key=lambda name: found[name] - keep[name])  # stable: equal ones in target order
    for name in by_remainder[: total - sum(found.values())]:
        found[name] += 1
    return found
