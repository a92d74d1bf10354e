"""Straight-through state: what ``SRSTE`` knows of its run, with the weights behind the masks."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self, override

from lightning_prune.training.state import TRANSIENT, RunState, on_cpu, saved
from lightning_prune.units.units import Units
from lightning_prune.validation.states import TENSOR, table


@dataclass(eq=False)
class StraightThroughState(RunState):
    """What ``SRSTE`` knows of its run.

    Attributes:
        dense: The weights without zeros, by name: this rank's shards.
        full: The names of those that come from a checkpoint, as full tensors, and wait for their parameter.
        units: The targets, as groups of m weights.
        open: The targets that are without zeros in the model itself, during a step.
        guard: Rejects forward passes meanwhile.
    """

    dense: dict[str, Tensor] = field(
        default_factory=dict, metadata=saved(table(TENSOR), save=lambda state: state.full_weights(), load=dict)
    )
    full: set[str] = field(default_factory=set)
    units: list[Units] = field(default_factory=list, metadata=TRANSIENT)
    open: set[str] = field(default_factory=set, metadata=TRANSIENT)
    guard: RemovableHandle | None = field(default=None, metadata=TRANSIENT)

    def full_weights(self) -> dict[str, Tensor]:
        """Return the weights without zeros as full tensors on the CPU; all ranks must call it."""
        shards = {name: weight for name, weight in self.dense.items() if name not in self.full}
        return {
            **on_cpu(self.full_tensors(shards)),
            **{name: self.dense[name] for name in self.dense if name in self.full},
        }

    @classmethod
    @override
    def load(cls, owner: str, values: Any) -> Self:
        state = super().load(owner, values)
        state.full = set(state.dense)
        return state

    @property
    @override
    def settled(self) -> bool:
        return not self.open
