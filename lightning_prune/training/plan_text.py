"""Plan: what a pruning run is going to do, as text."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_prune.models.summary import table


def plan(
    name: str,
    goal: str,
    parameters: Mapping[str, Tensor],
    updates: Sequence[tuple[int, float]],
    interval: str,
    label: str = "level",
    left_out: Mapping[str, str] | None = None,
) -> str:
    """Return what a pruning run is going to do: which parameters, when each update falls, and to which level.

    Parameters that are left out are named with the reason.

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
            f"{len(updates)} updates, {interval} ({label}): {', '.join(when)}" if when else "no updates planned",
        ]
    )
