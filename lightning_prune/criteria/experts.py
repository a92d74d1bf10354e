"""Criteria of the experts of a mixture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.criteria.criterion import Criterion
from lightning_prune.criteria.means import means, no_sums
from lightning_prune.units.coupled import CoupledUnits
from lightning_prune.units.units import Units
from lightning_prune.validation.arguments import integer
from lightning_prune.validation.instances import settle
from lightning_prune.validation.values import optional


@dataclass(frozen=True)
class REAP(Criterion):
    """What an expert adds to the tokens that the router sends to it: its gate times the norm of its output, on average.

    The mean is over these tokens alone, padding included, so that an expert that few tokens need may matter as much as
    one that many do; one that gets no token scores 0. The experts run a second time for it. Only for ``Expert()``.
    Needs activations.

    Args:
        window: Number of optimizer steps, or batches, observed; None is 16 steps, or all batches of ``prune``.

    Raises:
        ValueError: If the window is shorter than one step; later on, if units are no experts.

    Reference: Lasby et al., 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression",
        arXiv:2510.13999.
    """

    needs: ClassVar[Literal["weights", "gradients", "forwards"]] = "forwards"

    window: int | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        settle(self, window=optional(integer, "window", self.window, 1))

    @override
    def cannot_score(self, units: Units) -> str | None:
        experts = isinstance(units, CoupledUnits) and units.group.router
        return None if experts else "it is no expert of a mixture: use granularity=Expert()"

    @override
    def observe(self, units: Units, inputs: tuple[Any, ...] = (), output: Any = None) -> Tensor:
        assert units.module is not None
        hidden, chosen, gates = _routed(units, inputs)
        seen = self.empty_state(units)
        for place in range(chosen.shape[-1]):  # the output of each expert alone, and not their sum
            one = slice(place, place + 1)
            # forward, since hooks are there for the pass that counts
            added = units.module.forward(hidden, chosen[..., one], gates[..., one])
            norms = added.flatten(0, -2).norm(dim=-1, dtype=seen.dtype)
            expert = chosen[..., place].flatten()
            there = expert < units.size  # the number behind the last one stands for none
            seen[0].index_add_(0, expert[there], norms[there])
            seen[1].index_add_(0, expert[there], torch.ones_like(norms[there]))
        return units.add(seen)

    @override
    def empty_state(self, units: Units) -> Tensor:
        return no_sums(units)

    @override
    def scores(self, units: Units) -> Tensor:
        return means(units)


def _routed(units: Units, inputs: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return what experts are called with: hidden states, and for each token its experts and their gates."""
    found = [value for value in inputs if isinstance(value, Tensor)]
    if len(found) != 3 or found[1].is_floating_point() or found[1].shape != found[2].shape:
        raise ValueError(
            f"the experts of {units.name!r} must be called with the hidden states, the experts of each token and their "
            f"gates as positional arguments, got {[_kind(value) for value in inputs]}: use another criterion"
        )
    hidden, chosen, gates = found
    return hidden.detach(), chosen, gates.detach()


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
