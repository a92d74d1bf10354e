"""Whole layers as units: depth."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from typing_extensions import override

from lightning_prune.granularities.base import Granularity
from lightning_prune.models.forward import Inputs
from lightning_prune.models.parameters import Target
from lightning_prune.units.finding_layers import layer_units
from lightning_prune.units.units import Units
from lightning_prune.validation.arguments import integer
from lightning_prune.validation.instances import settle


@dataclass(frozen=True)
class Layer(Granularity):
    """A unit is a residual block, such as a layer of a transformer: without it, what enters it goes straight on.

    Known are the children of a ``ModuleList`` or ``Sequential`` that hand on what enters them once all of their
    parameters are zero, as a trial on a copy shows: transformers with norms inside their branches, residual networks.
    Others are left out, such as layers of BERT, whose norms act on the sum. A masked block adds nothing, and ``shrink``
    takes it out. It needs an example input, as coupled channels do.

    Args:
        minimum: How many blocks of a container stay, where none of another shape or kind do.

    Raises:
        ValueError: If an argument is out of range; later on, if the model has no such block.

    Reference: Men et al., 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
        arXiv:2403.03853.

    >>> Layer(minimum=2).coupled
    True
    """

    within_blocks = False
    coupled = True

    minimum: int = 1

    def __post_init__(self) -> None:
        """Check the arguments."""
        settle(self, minimum=integer("minimum", self.minimum, 0))

    @override
    def find_units(
        self, found: Sequence[Target], model: nn.Module, inputs: Inputs = None, distributed: bool = False
    ) -> tuple[list[Units], dict[str, str]]:
        return layer_units(found, model, self, inputs, distributed)
