"""Experts of a mixture as units."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn
from typing_extensions import override

from lightning_prune.granularities.base import Granularity
from lightning_prune.models.forward import Inputs
from lightning_prune.models.parameters import Target
from lightning_prune.units.finding_experts import expert_units
from lightning_prune.units.units import Units
from lightning_prune.validation.arguments import integer
from lightning_prune.validation.instances import settle


@dataclass(frozen=True)
class Expert(Granularity):
    """A unit is an expert of a mixture: its matrices in the stacks of all experts, and its row of the router.

    The router chooses among the experts that are left, from the moment of pruning on, so that the masked model is the
    one that ``shrink`` makes: no token goes to an expert that is pruned. Forward hooks on the routers see to that, also
    after ``fit``: they are in copies and pickles of the model, and not in its ``state_dict``. Known are modules whose
    class is called ``...Experts`` and that hold their experts in parameters of three dimensions, beside a router with a
    row for each, as in transformers 5. At least as many experts stay as a token takes, by the router's ``top_k``,
    ``num_experts_per_tok`` or ``k``. Where a router chooses among groups of experts first, every group keeps as many.
    It needs an example input.

    Args:
        minimum: How many experts of a layer stay, at least 1.
        round_to: The number of experts that stay in a layer is a multiple of this.

    Raises:
        ValueError: If an argument is out of range; later on, if the model has no experts that can go.

    Reference: Lu et al., 2024, "Not All Experts are Equal: Efficient Expert Pruning and Skipping for Mixture-of-Experts
        Large Language Models", arXiv:2402.14800.

    >>> Expert(minimum=2).coupled
    True
    """

    coupled = True
    measures: ClassVar[Sequence[str]] = ("units",)  # a token takes as many experts as before, and as long
    normalized = True
    default_scope: ClassVar[Literal["global", "local"]] = "local"

    minimum: int = 1
    round_to: int = 1

    def __post_init__(self) -> None:
        """Check the arguments."""
        settle(self, minimum=integer("minimum", self.minimum, 1), round_to=integer("round_to", self.round_to, 1))

    @override
    def find_units(
        self, found: Sequence[Target], model: nn.Module, inputs: Inputs = None, distributed: bool = False
    ) -> tuple[list[Units], dict[str, str]]:
        return expert_units(found, model, self, inputs, distributed)
