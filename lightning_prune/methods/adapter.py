"""Adapter: a low-rank correction of one weight, which is trained in its place and always merged into it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_prune.models.layer_kinds import holds_experts
from lightning_prune.models.parameters import Target
from lightning_prune.tensors.distributed import local
from lightning_prune.tensors.masking import zero_pruned


@dataclass(eq=False)
class Adapter:
    """The weight is ``base + scale * up @ down`` wherever its mask keeps it.

    Args:
        weight: The weight, which no optimizer may step.
        down: From the inputs to the rank, (rank, inputs).
        up: From the rank to the outputs, (outputs, rank).
        base: The weight that training started from; None until it is known.
    """

    weight: nn.Parameter
    down: nn.Parameter
    up: nn.Parameter
    base: Tensor | None = None

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        """The two factors, by what they add to the name of the weight."""
        return {"down": self.down, "up": self.up}

    def take_gradient(self, mask: Tensor, scale: float) -> None:
        """Turn the gradient of the weight into those of the two factors."""
        gradient, self.weight.grad = self.weight.grad, None
        if gradient is None:
            self.down.grad = self.up.grad = None
            return
        gradient = local(gradient)
        zero_pruned([(gradient, mask)])
        gradient = gradient.reshape(*self.up.shape[:-1], self.down.shape[-1]).to(self.up.dtype)
        self.down.grad = scale * (local(self.up).mT @ gradient)
        self.up.grad = scale * (gradient @ local(self.down).mT)

    def merge(self, scale: float) -> None:
        """Write what was learned into the weight; what its mask prunes has to be zeroed after that."""
        assert self.base is not None
        product = (local(self.up) @ local(self.down)).view(self.weight.shape)
        local(self.weight).copy_(self.base.to(product.dtype).add(product, alpha=scale))


def sides(target: Target) -> tuple[int, ...]:
    """Return the outputs and inputs of a weight as a matrix; those of experts come after the number of experts.

    >>> layer = nn.Conv2d(3, 8, 5)
    >>> sides(Target("weight", layer.weight, (layer,)))
    (8, 75)
    """
    shape = tuple(target.parameter.shape)
    if holds_experts(target.parameter, target.modules):
        return shape
    return shape[0], target.parameter.numel() // shape[0]


def new_factors(target: Target, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return factors as LoRA has them at first: ``down`` at random and ``up`` zero, so that their product is zero.

    >>> layer = nn.Linear(6, 4)
    >>> down, up = new_factors(Target("weight", layer.weight, (layer,)), 16, torch.Generator())
    >>> tuple(down.shape), tuple(up.shape)
    ((4, 6), (4, 4))
    """
    *experts, rows, columns = sides(target)
    rank = min(rank, rows, columns)
    dtype = torch.promote_types(target.parameter.dtype, torch.float32)  # small steps would be lost in bfloat16
    down = torch.rand(*experts, rank, columns, generator=generator, dtype=dtype).mul_(2).sub_(1).div_(columns**0.5)
    return down, down.new_zeros(*experts, rows, rank)
