"""What is compared: ways to share out a sparsity over layers, with a floor under each and without, and criteria."""

from typing import Any

from torch import Tensor

from lightning_prune import Magnitude, Sensitivity
from lightning_prune.scopes import global_
from lightning_prune.tensors.selection import Scores


def by_mean(scores: Scores, sparsity: float) -> dict[str, int]:
    """Rank all units together, by scores divided by the mean of their layer: the default of Torch-Pruning."""
    return global_(scores.within_targets(_over_mean), sparsity)


def by_norm(scores: Scores, sparsity: float) -> dict[str, int]:
    """Rank all units together, by scores divided by the L2 norm of those of their layer (Molchanov et al., 2017)."""
    return global_(scores.within_targets(_over_norm), sparsity)


def _over_mean(scores: Tensor) -> Tensor:
    return scores.double() / scores.double().abs().mean().clamp(min=1e-30)


def _over_norm(scores: Tensor) -> Tensor:
    return scores.double() / scores.double().norm().clamp(min=1e-30)


SCOPES: dict[str, Any] = {
    "global": "global",
    "by L2 norm": by_norm,
    "by mean": by_mean,
    "local": "local",
}
VARIANTS: dict[str, dict[str, Any]] = {
    name + suffix: {"scope": scope, "min_density": floor}
    for name, scope in SCOPES.items()
    for suffix, floor in (("", 0.0), (", floor", 0.1))
}
CRITERIA = {"magnitude": Magnitude, "Taylor": Sensitivity}
