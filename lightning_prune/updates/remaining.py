"""Remaining: the targets of which pruning leaves nothing, or a single unit, so that hardly a signal passes."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_prune.tensors.boolean import count
from lightning_prune.tensors.distributed import counts_here, is_sharded, over_ranks
from lightning_prune.units.units import Units


def scarce(units: Sequence[Units], masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Return by name how many units are left of the targets that keep one at most; all ranks must call it.

    Targets that had no more than one unit, or of which no mask is held, are not among them.

    >>> from torch import nn
    >>> from lightning_prune.granularities import Channel
    >>> from lightning_prune.models.parameters import find
    >>> from lightning_prune.units.finding import make_units
    >>> layer = nn.Linear(2, 3)
    >>> scarce(make_units(find(layer), layer, Channel()), {"weight": torch.zeros(3, 2).bool()})
    {'weight': 0}
    """
    held = [(unit, kept) for unit in units if (kept := unit.kept(masks)) is not None]
    distributed = any(is_sharded(unit.parameter) for unit, _ in held)
    mine = [
        count(kept) if not distributed or counts_here(unit.parameter if unit.split else torch.empty(0)) else 0
        for unit, kept in held
    ]
    left = over_ranks(torch.tensor(mine)).tolist() if distributed else mine
    return {unit.name: number for (unit, _), number in zip(held, left, strict=True) if number <= 1 < unit.size}


def told(owner: str, left: Mapping[str, int]) -> str:
    """Return a warning of targets, at least one, that keep none or one of their units.

    >>> told("Pruning", {"a": 0, "b": 1})[:60]
    "Pruning leaves no unit of ['a'] and one unit of ['b']: hardl"
    """
    empty, single = ([name for name, number in left.items() if number == few] for few in (0, 1))
    found = [f"{what} of {names[:5]}" for what, names in (("no unit", empty), ("one unit", single)) if names]
    return (
        f"{owner} leaves {' and '.join(found)}: hardly any signal passes there. Prune less, or share out by a scope "
        f'that keeps more of it, such as "local" or "erk"'
    )
