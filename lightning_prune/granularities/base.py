"""The base of all granularities: which weights form a unit, so that they are scored and pruned together."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_prune.models.forward import Inputs
from lightning_prune.models.norms import no_norms
from lightning_prune.models.parameters import Target
from lightning_prune.units.finding import separate_units
from lightning_prune.units.pooled import PooledUnits
from lightning_prune.units.scored import Norms
from lightning_prune.units.units import Units, check_target


class Granularity:
    """How the elements of a weight form units: a subclass with ``pool``, ``expand`` and ``count`` is a new granularity.

    ``pool`` and ``expand`` are inverse to each other in this sense: expanding the decision on pooled units
    gives a mask of the weight's shape. ``dim`` is always the dimension of the output channels.

    Dimension 0 has the output channels and 1 the inputs, or the reverse in transposed layers, and others are a kernel.
    Parameters of three dimensions that hold the matrices of experts have no output channels: only single weights and
    N:M are found in them, and others leave them out.

    Attributes:
        single: Whether every weight is a unit of its own.
        follows: Whether a unit is an output channel, whose bias and norm entries are pruned with it.
        crosses: Whether a unit has weights of every output channel, so that scores of these cannot tell units apart.
        group: How many units, that follow each other along the inputs, are compared with one another only; None: all.
        least: The lowest sparsity, 0 to 1, that this granularity can be asked for.
        coupled: Whether units follow the dependency graph of the model; None: where an example input is given.
        round_to: The number of units that stay in a target is a multiple of this, as far as it is pruned.
        even: Whether units are compared within groups, all of which lose as many as the others.
        measures: What a sparsity may be a fraction of; all but "units" need a model that gets smaller or faster.
        within_blocks: Whether units lie within blocks of a model, which ``prune(sequential=)`` takes one by one.
        normalized: Whether norms take statistics over the units, from then on over those that are left.
        default_scope: The scope where none is given.
        default_min_density: The fraction of every target that stays where none is given, as far as there is room.
    """

    single: ClassVar[bool] = False
    follows: ClassVar[bool] = False
    crosses: ClassVar[bool] = False
    even: bool = False
    measures: ClassVar[Sequence[str]] = ("units", "parameters", "flops", "latency")
    within_blocks: ClassVar[bool] = True
    normalized: ClassVar[bool] = False
    default_scope: ClassVar[Literal["global", "local"]] = "global"
    default_min_density: ClassVar[float] = 0.0
    group: int | None = None
    least: float = 0.0
    coupled: bool | None = False
    round_to: int = 1

    def pool(self, values: Tensor, dim: int) -> Tensor:
        """Return the sum of the values over each unit."""
        raise NotImplementedError

    def expand(self, keep: Tensor, shape: torch.Size, dim: int) -> Tensor:
        """Return the mask, of that shape, of a decision on units (bool, True = kept); it may be a view."""
        raise NotImplementedError

    def count(self, shape: torch.Size, dim: int) -> int:
        """Return the number of units of a weight of that shape."""
        raise NotImplementedError

    def groups(self, shape: torch.Size, dim: int) -> int:
        """Return how many groups the units of a weight of that shape form, each as large, and each to keep as many."""
        return 1

    def units(
        self, target: Target, followers: Mapping[str, nn.Parameter] | None = None, norms: Norms = no_norms
    ) -> Units:
        """Return the units of one target.

        Args:
            target: The parameter.
            followers: Parameters with one entry per output channel that are pruned with it (bias, norm), by name.
            norms: Finds the norm behind every layer of the model that has one.
        """
        check_target(target, norms)
        return PooledUnits(target, self, followers, norms)

    def find_units(
        self, found: Sequence[Target], model: nn.Module, inputs: Inputs = None, distributed: bool = False
    ) -> tuple[list[Units], dict[str, str]]:
        """Return the units of all targets, and the reason for every target without any.

        Args:
            found: The targets.
            model: The model that they are of; it is left as it is.
            inputs: Example inputs of the model; None if there are none.
            distributed: Whether other ranks look at the same model, perhaps with other inputs.

        Raises:
            ValueError: If there are none, or they have to be coupled, and cannot.
            ImportError: If they have to be coupled, and torch-pruning is not installed.
        """
        return separate_units(found, model, self)
