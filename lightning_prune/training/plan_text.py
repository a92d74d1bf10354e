"""Plan: what a pruning run is going to do, as text of a few lines for a model of any size."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_prune.models.summary import counted_as, shape_text, shortened, table
from lightning_prune.training.representation import value_text
from lightning_prune.updates.target_sparsity import SparsityTarget

_LINES = 20  # a plan has no more
_LEFT_OUT = 6  # of these, about what is left out


def plan(
    name: str,
    goal: str,
    parameters: Mapping[str, Tensor],
    updates: Sequence[tuple[int, float]],
    interval: str,
    label: str = "sparsity",
    left_out: Mapping[str, str] | None = None,
    levels: Mapping[str, float] | None = None,
    shared_out: str = "",
) -> str:
    """Return what a pruning run is going to do: which parameters, when each update falls, and to which sparsity.

    Parameters that are left out are named with the reason. Of many parameters the first and the last are shown.

    Args:
        name: What prunes.
        goal: What it prunes to.
        parameters: What is pruned, by name.
        updates: Position and sparsity of each update.
        interval: What positions count.
        label: What the number of an update means.
        left_out: Why parameters are left out, by name.
        levels: The sparsity of each parameter, by name, where they have one each.
        shared_out: How the goal is shared out over the parameters.

    >>> import torch
    >>> print(plan("Pruning", "sparsity 0.9", {"weight": torch.zeros(3, 4)}, [(2, 0.45), (4, 0.9)], "epoch"))
    Pruning to sparsity 0.9: 1 parameter, 12 weights
      weight  3 x 4  12
    2 updates, epoch (sparsity): 2 (45.0%), 4 (90.0%)
    """
    when = [f"{position} ({due:.1%})" for position, due in updates]
    if len(when) > 8:
        when = [*when[:4], "...", *when[-3:]]
    last = f"{counted_as(len(updates), 'update')}, {interval} ({label}): {', '.join(when)}"
    last = "\n".join([*([shared_out] if shared_out else []), last if when else "no updates planned"])
    return listing(f"{name} to {goal}", parameters, last, left_out, levels)


def listing(
    title: str,
    parameters: Mapping[str, Tensor],
    last: str,
    left_out: Mapping[str, str] | None = None,
    levels: Mapping[str, float] | None = None,
) -> str:
    """Return a title, the parameters that are pruned, those that are left out, and a last line.

    Args:
        title: What is done.
        parameters: What is pruned, by name.
        last: The last line or lines.
        left_out: Why parameters are left out, by name.
        levels: The sparsity of each parameter, by name, where they have one each.

    >>> import torch
    >>> print(listing("Pruning", {"a": torch.zeros(3)}, "one update", {"b": "it is frozen"}, {"a": 0.5}))
    Pruning: 1 parameter, 3 weights
      a  3  3  50.0%
      left out: b: it is frozen
    one update
    """
    weights = sum(parameter.numel() for parameter in parameters.values())
    others = [f"  left out: {name}: {reason}" for name, reason in (left_out or {}).items()]
    if len(others) > _LEFT_OUT:
        others = [*others[: _LEFT_OUT - 1], f"  left out: {len(others) - _LEFT_OUT + 1} more"]
    cells = [_cells(name, parameter, levels) for name, parameter in parameters.items()]
    return "\n".join(
        [
            f"{title}: {counted_as(len(parameters), 'parameter')}, {counted_as(weights, 'weight')}",
            *shortened(table(cells) if cells else [], _LINES - 2 - len(others) - last.count("\n")),
            *others,
            last,
        ]
    )


def _cells(name: str, parameter: Tensor, levels: Mapping[str, float] | None) -> tuple[str, ...]:
    cells = f"  {name}", shape_text(parameter.shape), f"{parameter.numel():,}"
    if not levels:
        return cells
    return (*cells, f"{levels[name]:.1%}" if name in levels else "")


def sharing(scope: object, target: SparsityTarget) -> str:
    """Return how a target is shared out over the parameters, "" where a threshold or patterns decide.

    >>> sharing("local", SparsityTarget(0.5, min_density=0.1))
    'scope: local, at least 10% of the units of each parameter stay'
    """
    if not target.is_single:
        return ""
    least = f", at least {100 * target.floor:.3g}% of the units of each parameter stay" if target.floor else ""
    return f"scope: {value_text(scope).strip(chr(39))}{least}"
