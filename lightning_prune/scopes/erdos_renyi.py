"""Erdos-Renyi densities: the smaller a layer, the denser it stays, whatever its scores."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_prune.models.patterns import matches
from lightning_prune.tensors.selection import Scores
from lightning_prune.validation.arguments import fractions, number, patterns
from lightning_prune.validation.instances import flag, settle
from lightning_prune.validation.values import shown


@dataclass(frozen=True)
class ERK:
    """Keep more of small targets: density in proportion to ``(sum(shape) / prod(shape))**power``, at most 1.

    Args:
        power: 1 is the paper's; 0 keeps the same fraction of every target that is not dense.
        kernel: Whether the shape includes the kernel of a convolution. If not, it is Erdos-Renyi (ER), as in SET.
        dense: Globs (or "re:" and a regular expression) on the names of targets that stay dense.
        overrides: ``{pattern: fraction}``: targets with a sparsity of their own; the first pattern that matches
            decides. The others share what these leave of the sparsity in all. Before so much is due, as along a
            schedule, these targets have all that is. Where blocks are pruned one after another (``sequential``), "in
            all" is in each block, and a pattern has to match a target of any.

    Raises:
        ValueError: If an argument is out of range; when it shares out, if a pattern matches no target, or targets of
            which ``dense`` and ``overrides`` say the sparsity keep more than is to be left in all.

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
    overrides: dict[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Check the arguments."""
        settle(self, power=number("power", self.power, "[0, inf)"), kernel=flag("kernel", self.kernel))
        settle(self, dense=patterns("dense", self.dense))
        if not isinstance(self.overrides, Mapping):
            raise ValueError(f"overrides must map patterns to fractions, got {shown(self.overrides)}")
        settle(self, overrides=fractions("overrides", self.overrides) if self.overrides else {})

    def __call__(self, scores: Scores, sparsity: float) -> dict[str, int]:
        """Return how many units each target keeps."""
        sizes = scores.sizes
        density = {name: self._density(shape) for name, shape in scores.shapes.items()}
        wanted = sum(sizes.values()) - round(sparsity * sum(sizes.values()))
        keep = self._held(scores, wanted)
        while True:  # a target that would be more than dense is left dense, and the others share what remains
            others = [name for name in sizes if name not in keep]
            scale = (wanted - sum(keep.values())) / max(1e-12, sum(density[name] * sizes[name] for name in others))
            over = [name for name in others if density[name] * scale > 1.0]
            if not over:
                break
            keep.update({name: float(sizes[name]) for name in over})
        keep.update({name: density[name] * scale * sizes[name] for name in others})
        return whole({name: keep[name] for name in sizes}, wanted)

    def _density(self, shape: tuple[int, ...]) -> float:
        shape = shape if self.kernel else shape[:2]
        return float((sum(shape) / math.prod(shape)) ** self.power)

    def _held(self, scores: Scores, wanted: int) -> dict[str, float]:
        """Return how many units those targets keep whose sparsity is given, 0 for dense ones."""
        sizes = scores.sizes
        given = {**dict.fromkeys(self.dense, 0.0), **{p: s for p, s in self.overrides.items() if p not in self.dense}}
        for pattern in given:
            if not matches(pattern, list(scores.names)):
                argument = "dense" if pattern in self.dense else "overrides"
                raise ValueError(
                    f"{argument} must match targets, got {pattern!r}, which matches none of {list(scores.names)[:5]}"
                )
        first = {name: next((p for p in given if matches(p, [name])), None) for name in sizes}
        zeros = {name: given[pattern] * sizes[name] for name, pattern in first.items() if pattern is not None}
        due = min(1.0, (sum(sizes.values()) - wanted) / max(1e-12, sum(zeros.values())))
        keep = {name: sizes[name] - due * count for name, count in zeros.items()}
        if (held := sum(keep.values())) > wanted + 1e-6:
            argument, value = ("overrides", self.overrides) if self.overrides else ("dense", self.dense)
            raise ValueError(
                f"{argument} must leave room for the sparsity, got {value}, which keeps {held:g} units of {wanted} "
                f"that are to be left"
            )
        return keep


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
