"""Layers: residual blocks of one shape as units, each masked as a whole."""

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.models.norms import no_norms
from lightning_prune.models.parameters import Target
from lightning_prune.tensors.distributed import local
from lightning_prune.units.gates import weight_times_gradient
from lightning_prune.units.scored import Values
from lightning_prune.units.units import Units
from lightning_prune.units.weights import weight_of

Block = Mapping[str, nn.Parameter]  # all parameters of a block, by name


@final
class LayerUnits(Units):
    """The blocks of one container that have the same shape: scored by their weights, masked with all parameters.

    Args:
        target: The first weight of the first block.
        blocks: The modules, in order.
        parameters: The parameters of each block.
        counted: The names of the weights whose zeros count as sparsity.
        minimum: How many blocks stay.
        label: What kind of units they are, for messages.
    """

    crosses = True

    def __init__(
        self,
        target: Target,
        blocks: Sequence[nn.Module],
        parameters: Sequence[Block],
        counted: Mapping[str, Target],
        minimum: int,
        label: str,
    ) -> None:
        super().__init__(target.name, target.parameter, tuple(blocks), 0, len(blocks), False, no_norms)
        self.blocks = list(parameters)
        self.weights = {name: own for block in self.blocks for name, own in block.items() if name in counted}
        self.scored = [[own for name, own in block.items() if name in counted] for block in self.blocks]
        self.minimum = minimum
        self.label = label

    @override
    def weight(self) -> Tensor:
        return torch.cat([weight_of(own).flatten() for block in self.scored for own in block]).view(self.size, -1)

    @override
    def sum(self, values: Values) -> Tensor:
        found = [[values(weight_of(own, self.grad_scale)) for own in block] for block in self.scored]
        return self._stacked([[part.sum() for part in block] for block in found])

    @override
    def per_weight(self, total: Tensor) -> Tensor:
        return total / sum(own.numel() for own in self.scored[0])

    @override
    def maximum(self, values: Values) -> Tensor:
        found = [[values(weight_of(own, self.grad_scale)).amax() for own in block] for block in self.scored]
        return torch.stack([torch.stack(block).amax() for block in found])

    @override
    def contribution(self) -> Tensor:
        # with biases and norms, since the scale of what a norm follows does not matter to the loss
        found = [[weight_of(own, self.grad_scale) for own in block.values()] for block in self.blocks]
        return self._stacked([[weight_times_gradient(weight).sum() for weight in block] for block in found])

    def _stacked(self, parts: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return the sum over the parts of each block."""
        return torch.stack([torch.stack([part.to(self.parameter.device) for part in block]).sum() for block in parts])

    @property
    @override
    def shares(self) -> dict[tuple[str, int], float]:
        return {(name, 0): 1.0 / self.size for block in self.blocks for name in block}

    @override
    def compared(self, scores: Tensor, kept: Tensor | None, by_row: bool) -> Tensor:
        # those of the blocks that have to stay are above all others
        alive = scores if kept is None else scores.masked_fill(~kept, -torch.inf)
        return scores.index_fill(0, alive.topk(self.minimum).indices, torch.inf) if self.minimum else scores

    @override
    def kept(self, masks: Mapping[str, Tensor]) -> Tensor | None:
        if any(name not in masks for block in self.blocks for name in block):
            return None
        kept = [any(bool(masks[name].any()) for name in block) for block in self.blocks]
        return torch.tensor(kept, device=self.parameter.device)

    @override
    def masks(self, keep: Tensor) -> dict[str, Tensor]:
        return {
            name: torch.full_like(local(own), stays, dtype=torch.bool)
            for block, stays in zip(self.blocks, keep.tolist(), strict=True)
            for name, own in block.items()
        }
