"""Criteria of the residual stream."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.criteria.criterion import Criterion
from lightning_prune.models.layer_inputs import wide
from lightning_prune.tensors.distributed import local
from lightning_prune.units.coupled import CoupledUnits
from lightning_prune.units.units import Units
from lightning_prune.validation.arguments import integer
from lightning_prune.validation.instances import settle
from lightning_prune.validation.values import optional


@dataclass(frozen=True)
class ActivationNorm(Criterion):
    """How large a channel of the residual stream is: the mean absolute value that norms make of it, summed over norms.

    The mean is over all tokens of the window, padding included. Only for ``ResidualChannel()``. Needs activations.

    Args:
        window: Number of optimizer steps, or batches, observed; None is 16 steps, or all batches of ``prune``.

    Raises:
        ValueError: If the window is shorter than one step; later on, if units are no channels of a residual stream.

    Reference: Muralidharan et al., 2024, "Compact Language Models via Pruning and Knowledge Distillation",
        arXiv:2407.14679.
    """

    needs: ClassVar[Literal["weights", "gradients", "forwards"]] = "forwards"

    window: int | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        settle(self, window=optional(integer, "window", self.window, 1))

    @override
    def cannot_score(self, units: Units) -> str | None:
        return None if _norms(units) else "no norm takes statistics over it: use granularity=ResidualChannel()"

    @override
    def watched(self, units: Units) -> Sequence[nn.Module]:
        return list(_norms(units).values())

    @override
    def observe(self, units: Units, inputs: tuple[Any, ...] = (), output: Any = None) -> Tensor:
        seen = self.empty_state(units)
        values = local(output).detach().flatten(0, -2).abs()
        place = next(number for number, norm in enumerate(_norms(units).values()) if norm is units.module)
        seen[place, 0], seen[place, 1] = len(values), self._of_units(units, place, values.sum(0, dtype=seen.dtype))
        return units.add(seen)

    @override
    def empty_state(self, units: Units) -> Tensor:
        device = units.parameter.device
        return torch.zeros(len(_norms(units)), 2, units.size, dtype=wide(device), device=device)

    @override
    def scores(self, units: Units) -> Tensor:
        assert units.statistic is not None
        count, total = units.statistic.unbind(1)
        return (total / count.clamp(min=1)).sum(0)

    def _of_units(self, units: Units, place: int, channels: Tensor) -> Tensor:
        assert isinstance(units, CoupledUnits)
        name = list(units.over)[place]
        index = next(member.index for member in units.group.members if member.name == name)
        return channels[index.to(channels.device)].sum(1)


def _norms(units: Units) -> dict[str, nn.Module]:
    """Return the norms over a residual stream, by the name of their weight."""
    return units.over if isinstance(units, CoupledUnits) else {}
