"""Channels of the residual stream as units: the hidden width."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn
from typing_extensions import override

from lightning_prune.granularities.base import Granularity
from lightning_prune.granularities.channels import FLOOR
from lightning_prune.models.forward import Inputs
from lightning_prune.models.parameters import Target
from lightning_prune.units.finding_streams import stream_units
from lightning_prune.units.units import Units
from lightning_prune.validation.arguments import integer
from lightning_prune.validation.instances import settle


@dataclass(frozen=True)
class ResidualChannel(Granularity):
    """A unit is a channel of the residual stream, the hidden width: with it goes its place in every layer of the model.

    These are its entries in embeddings, in all layers that add to the stream or read it, and in every LayerNorm and
    RMSNorm over it. Norms take their statistics over the channels that are left, from the moment of pruning on, so that
    the masked model is the one that ``shrink`` makes. Forward hooks on the norms see to that, also after ``fit``: they
    are in copies and pickles of the model, and not in its ``state_dict``. It needs an example input. Embeddings are
    pruned along, though they are no targets.

    Args:
        minimum: How many channels stay, at least 1.
        round_to: The number of channels that stay is a multiple of this.

    Raises:
        ValueError: If an argument is out of range; later on, if the model has no residual stream that can be narrowed.

    Reference: Muralidharan et al., 2024, "Compact Language Models via Pruning and Knowledge Distillation",
        arXiv:2407.14679.

    >>> ResidualChannel(round_to=8).coupled
    True
    """

    coupled = True
    within_blocks = False
    normalized = True
    default_scope: ClassVar[Literal["global", "local"]] = "local"
    default_min_density: ClassVar[float] = FLOOR

    minimum: int = 1
    round_to: int = 1

    def __post_init__(self) -> None:
        """Check the arguments."""
        settle(self, minimum=integer("minimum", self.minimum, 1), round_to=integer("round_to", self.round_to, 1))

    @override
    def find_units(
        self, found: Sequence[Target], model: nn.Module, inputs: Inputs = None, distributed: bool = False
    ) -> tuple[list[Units], dict[str, str]]:
        return stream_units(found, model, self, inputs, distributed)
