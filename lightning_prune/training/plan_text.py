"""Plan: what a pruning run is going to do, as text."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_prune.models.summary import table
from lightning_prune.training.representation import value_text
from lightning_prune.updates.target_sparsity import SparsityTarget


def plan(
    name: str,
    goal: str,
    parameters: Mapping[str, Tensor],
    updates: Sequence[tuple[int, float]],
    interval: str,
    label: str = "level",
    left_out: Mapping[str, str] | None = None,
    shared_out: str = "",
) -> str:
    """Return what a pruning run is going to do: which parameters, when each update falls, and to which level.

    Args:
        name: Who prunes.
        goal: To what.
        parameters: Those that are pruned, by name.
        updates: Their positions, and the level of each.
        interval: What a position counts.
        label: What a level is.
        left_out: Parameters that are left out, and why.
        shared_out: How the goal is shared out over the parameters.

    >>> import torch
    >>> print(plan("Pruning", "sparsity 0.9", {"weight": torch.zeros(3, 4)}, [(2, 0.45), (4, 0.9)], "epoch"))
    Pruning to sparsity 0.9: 1 parameters, 12 weights
      weight  3 x 4  12
    2 updates, epoch (level): 2 (45.0%), 4 (90.0%)
    """
    weights = sum(parameter.numel() for parameter in parameters.values())
    cells = [(f"  {n}", " x ".join(map(str, p.shape)), f"{p.numel():,}") for n, p in parameters.items()]
    when = [f"{position} ({due:.1%})" for position, due in updates]
    if len(when) > 8:
        when = [*when[:4], "...", *when[-3:]]
    return "\n".join(
        [
            f"{name} to {goal}: {len(parameters)} parameters, {weights:,} weights",
            *(table(cells) if cells else []),
            *(f"  left out: {name}: {reason}" for name, reason in (left_out or {}).items()),
            *([shared_out] if shared_out else []),
            f"{len(updates)} updates, {interval} ({label}): {', '.join(when)}" if when else "no updates planned",
        ]
    )


def sharing(scope: object, target: SparsityTarget) -> str:
    """Return how a target is shared out over the parameters, "" where a threshold or patterns decide.

    >>> sharing("local", SparsityTarget(0.5, min_density=0.1))
    'scope: local, at least 10% of the units of each parameter stay'
    """
    if not target.is_single:
        return ""
    least = f", at least {100 * target.floor:.3g}% of the units of each parameter stay" if target.floor else ""
    return f"scope: {value_text(scope).strip(chr(39))}{least}"
