"""Splitting state: what ``ADMM`` knows of its run, with the variables that it splits off the weights."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self, override

from lightning_prune.masks import Masks
from lightning_prune.tensors.distributed import local, local_shard
from lightning_prune.tensors.packing import pack_all, unpack_all
from lightning_prune.training.scheduled_state import ScheduledState
from lightning_prune.training.state import TRANSIENT, on_cpu, saved
from lightning_prune.validation.states import MASKS, TENSOR, table


@dataclass(eq=False)
class SplittingState(ScheduledState):
    """What ``ADMM`` knows of its run.

    The sparse copy z of the weights and the scaled dual variable u are never both other than zero, since a projection
    leaves z what it keeps and u what it prunes. So one tensor holds z - u, and a mask says which of them an element is.

    Attributes:
        centers: z - u by parameter name, what the weights are pulled to: this rank's shards.
        chosen: Where z is not zero, likewise.
        full: Whether both come from a checkpoint, as full tensors.
        pulled: The parameters, by name.
    """

    centers: dict[str, Tensor] = field(
        default_factory=dict,
        metadata=saved(
            table(TENSOR),
            save=lambda state: on_cpu(state.whole(state.centers)),
            load=dict,
        ),
    )
    chosen: Masks = field(
        default_factory=Masks,
        metadata=saved(
            MASKS,
            save=lambda state: pack_all(state.whole(state.chosen)),
            load=lambda packed: Masks(unpack_all(packed)),
        ),
    )
    full: bool = False
    pulled: dict[str, nn.Parameter] = field(default_factory=dict, metadata=TRANSIENT)

    def whole(self, shards: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return full tensors; all ranks must call it."""
        return shards if self.full else self.full_tensors(shards)

    def place(self, parameters: dict[str, nn.Parameter]) -> None:
        """Put what a checkpoint had beside the parameters, and forget what the model has no parameter for."""
        known = {name: parameter for name, parameter in parameters.items() if name in self.centers}
        for shards in (self.centers, self.chosen):
            found = dict(shards)
            shards.clear()
            for name, parameter in known.items():
                shard = local_shard(found[name], parameter) if self.full else found[name]
                if shard.shape == local(parameter).shape:
                    shards[name] = shard.to(local(parameter).device, copy=self.full)
        self.full = False
        self.pulled = {name: known[name] for name in self.centers}

    def dual(self, name: str) -> Tensor:
        """Return u, the running sum of what the projections took from a weight."""
        return (-self.centers[name]).masked_fill_(self.chosen[name], 0.0)

    @classmethod
    @override
    def load(cls, owner: str, values: Any) -> Self:
        state = super().load(owner, values)
        state.full = True
        return state
