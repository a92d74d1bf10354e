"""Criteria of whole blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from typing_extensions import override

from lightning_prune.criteria.criterion import Criterion
from lightning_prune.criteria.means import means, no_sums
from lightning_prune.structure.blocks import first_tensor
from lightning_prune.tensors.distributed import local
from lightning_prune.units.layers import LayerUnits
from lightning_prune.units.units import Units
from lightning_prune.validation.arguments import integer
from lightning_prune.validation.instances import settle
from lightning_prune.validation.values import optional


@dataclass(frozen=True)
class BlockInfluence(Criterion):
    """How much a block changes what enters it: one minus the cosine similarity of its input and output.

    The mean is over all tokens, or places of a feature map, of the window, padding included. Only for ``Layer()``.
    Needs activations.

    Args:
        window: Number of optimizer steps, or batches, observed; None is 16 steps, or all batches of ``prune``.

    Raises:
        ValueError: If the window is shorter than one step; later on, if units are no blocks.

    Reference: Men et al., 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
        arXiv:2403.03853.
    """

    needs: ClassVar[Literal["weights", "gradients", "forwards"]] = "forwards"

    window: int | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        settle(self, window=optional(integer, "window", self.window, 1))

    @override
    def cannot_score(self, units: Units) -> str | None:
        return None if isinstance(units, LayerUnits) else "it is no block: use granularity=Layer()"

    @override
    def observe(self, units: Units, inputs: tuple[Any, ...] = (), output: Any = None) -> Tensor:
        assert units.module is not None
        entered, left = (_hidden(values) for values in (inputs, output))
        if entered is None or left is None:
            raise ValueError(
                f"the block of {units.name!r} must be called with the hidden states as a positional argument, got "
                f"{[type(value).__name__ for value in inputs]}: use a criterion that needs no activations"
            )
        similar = nn.functional.cosine_similarity(entered, left, dim=_features(units.module, entered))
        seen = self.empty_state(units)
        place = next(number for number, module in enumerate(units.modules) if module is units.module)
        seen[0, place], seen[1, place] = similar.sum(dtype=seen.dtype), similar.numel()
        return units.add(seen)

    @override
    def empty_state(self, units: Units) -> Tensor:
        return no_sums(units)

    @override
    def scores(self, units: Units) -> Tensor:
        return 1.0 - means(units)


def _hidden(values: Any) -> Tensor | None:
    """Return the hidden states among the inputs or outputs of a block, at least float32."""
    found = first_tensor(values)
    return None if found is None else local(found) if found.dtype == torch.float64 else local(found).float()


def _features(block: nn.Module, values: Tensor) -> int:
    """Return the dimension of the features: the second one where convolutions read it so, else the last one.

    >>> _features(nn.Sequential(nn.Conv2d(3, 3, 1)), torch.ones(2, 3, 8, 8)), _features(nn.Linear(3, 3), torch.ones(3))
    (1, -1)
    """
    convolutions: Sequence[_ConvNd] = [module for module in block.modules() if isinstance(module, _ConvNd)]
    inputs = {conv.in_channels for conv in convolutions if len(conv.kernel_size) == values.ndim - 2}
    maps = values.ndim > 3 or (values.ndim == 3 and values.shape[-1] not in inputs)
    return 1 if maps and values.shape[1] in inputs else -1
