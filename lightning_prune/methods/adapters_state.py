"""Adapters' state: what ``MaskedAdapters`` knows of its run, with the factors and the weights it started from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from lightning_prune.methods.adapter import Adapter, new_factors
from lightning_prune.methods.replacing_state import ReplacingState
from lightning_prune.models.parameters import Target
from lightning_prune.tensors.distributed import local
from lightning_prune.tensors.masking import zero_pruned
from lightning_prune.training.state import TRANSIENT, on_cpu, saved
from lightning_prune.validation.states import TENSOR, table


@dataclass(eq=False)
class AdaptersState(ReplacingState):
    """What ``MaskedAdapters`` knows of its run.

    Attributes:
        down: The first factors, by the name of their weight.
        up: The second factors, likewise.
        base: The weights that training started from, likewise; in checkpoints, only what their masks keep.
        packed: Whether the bases come from a checkpoint, and wait for their masks.
        adapters: The adapters of the model, by the name of their weight.
    """

    down: dict[str, Tensor] = field(
        default_factory=dict, metadata=saved(table(TENSOR), save=lambda state: on_cpu(state.down), load=dict)
    )
    up: dict[str, Tensor] = field(
        default_factory=dict, metadata=saved(table(TENSOR), save=lambda state: on_cpu(state.up), load=dict)
    )
    base: dict[str, Tensor] = field(
        default_factory=dict, metadata=saved(table(TENSOR), save=lambda state: on_cpu(state.kept()), load=dict)
    )
    packed: bool = False
    adapters: dict[str, Adapter] = field(default_factory=dict, metadata=TRANSIENT)

    def kept(self) -> dict[str, Tensor]:
        """Return the elements of the bases that their masks keep."""
        return self.base if self.packed else {name: base[self.masks[name]] for name, base in self.base.items()}

    def adapt(self, targets: list[Target], rank: int, seed: int) -> None:
        """Make adapters of these weights: those of a checkpoint, if there is one, otherwise new ones."""
        if self.restored:
            factors = {name: (self.down[name], self.up[name]) for name in self.down}
        else:
            generator = torch.Generator().manual_seed(seed)
            factors = {target.name: new_factors(target, rank, generator) for target in targets}
            self.base, self.packed = {}, False
        self.adapters = {
            target.name: Adapter(target.parameter, *_parameters(factors[target.name], target.parameter.device))
            for target in targets
            if target.name in factors
        }
        self.down = {name: adapter.down for name, adapter in self.adapters.items()}
        self.up = {name: adapter.up for name, adapter in self.adapters.items()}

    def begin(self) -> None:
        """Take the weights for the bases, or those of a checkpoint; the masks are placed by then."""
        for name, adapter in self.adapters.items():
            weight, mask = local(adapter.weight), self.masks[name]
            if self.packed:
                values = self.base[name].to(weight)
                self.base[name] = torch.zeros_like(weight).masked_scatter_(mask, values)
            else:
                self.base[name] = weight.clone()
                zero_pruned([(self.base[name], mask)])
            adapter.base = self.base[name]
        self.packed = False

    def drop(self, names: list[str]) -> None:
        """Forget the adapters of weights that the model does not have any more."""
        for name in names:
            for known in (self.down, self.up, self.base, self.adapters):
                known.pop(name, None)

    @override
    def release(self) -> None:
        super().release()
        self.adapters = {}

    @classmethod
    @override
    def check(cls, owner: str, values: Mapping[str, Any]) -> None:
        super().check(owner, values)
        masked = values["masks"]["shapes"].keys()
        for key in ("down", "up", "base"):
            if not values[key].keys() == values["base"].keys() <= masked:
                names = sorted(values[key])
                raise ValueError(f"the state of {owner} must have masks and bases for {key!r}, got {names}")

    @classmethod
    @override
    def load(cls, owner: str, values: Any) -> Self:
        state = super().load(owner, values)
        state.packed = True
        return state


def _parameters(factors: tuple[Tensor, Tensor], device: torch.device) -> list[nn.Parameter]:
    return [nn.Parameter(factor.to(device, copy=True)) for factor in factors]
