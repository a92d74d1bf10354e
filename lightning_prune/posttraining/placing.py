"""Placing: an allocation as zeros in the model, after another one, until the weights come back bit for bit."""

from collections.abc import Mapping, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_prune.models.parameters import named_parameters
from lightning_prune.tensors.selection import Scores
from lightning_prune.units.units import Units


class Placed:
    """Sets the zeros of one allocation after another; only targets whose numbers differ are selected again.

    The order of the units of each target is found once. It takes 4 bytes a unit beside a copy of the weights.

    Args:
        model: The model; on exit it has its weights back.
        units: The targets.
        scores: The scores of all units.
    """

    def __init__(self, model: nn.Module, units: Sequence[Units], scores: Scores) -> None:
        self._parameters = named_parameters(model)
        self._units = {unit.name: unit for unit in units}
        self._places = {name: _places(scores[name]) for name in self._units}
        self._kept: dict[str, int] = {}
        self._owners: dict[str, list[str]] = {}  # the targets that have units in a parameter
        for name, unit in self._units.items():
            for parameter in unit.masks(self._places[name] >= 0):
                self._owners.setdefault(parameter, []).append(name)
        self._dense = {name: self._parameters[name].detach().clone() for name in self._owners}

    def __enter__(self) -> Self:
        """Return itself: the weights are still those of the model."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the weights."""
        for name, dense in self._dense.items():
            self._parameters[name].detach().copy_(dense)

    @torch.no_grad()
    def keep(self, keep: Mapping[str, int]) -> None:
        """Keep so many units of each target, those that score highest, and no others."""
        changed = {name for name, number in keep.items() if self._kept.get(name) != number}
        self._kept = dict(keep)
        touched = {name for name, owners in self._owners.items() if changed.intersection(owners)}
        for name in touched:
            self._parameters[name].detach().copy_(self._dense[name])
        for owner in dict.fromkeys(owner for name in touched for owner in self._owners[name]):
            stays = self._places[owner] >= self._units[owner].size - keep[owner]
            for name, mask in self._units[owner].masks(stays).items():
                if name in touched:
                    self._parameters[name].detach().masked_fill_(~mask, 0.0)


def _places(scores: Tensor) -> Tensor:
    """Return the place of each unit in the order in which units are pruned; equal ones fall in flat order.

    >>> _places(torch.tensor([[0.3, 0.1], [0.2, 0.1]])).tolist()
    [[3, 0], [2, 1]]
    """
    order = scores.reshape(-1).argsort(stable=True)
    found = torch.empty_like(order, dtype=torch.int32)
    found[order] = torch.arange(len(order), dtype=torch.int32, device=order.device)
    return found.view(scores.shape)
