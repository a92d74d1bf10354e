"""Finding experts: those of each layer that has several as units, each with its row of the router."""

from collections.abc import Mapping, Sequence

from torch import nn

from lightning_prune.models.forward import Inputs
from lightning_prune.models.parameters import Target, named_parameters
from lightning_prune.structure.expert_groups import expert_groups
from lightning_prune.structure.groups import Group
from lightning_prune.units.coupled import Coupling
from lightning_prune.units.finding import frozen_part, proven, units_of_groups, whole_inputs
from lightning_prune.units.units import Units

_CHANGES = (
    "the outputs of the model change without it, as those do that have a number for each expert "
    "(output_router_logits), or its router does not run with fewer rows"
)
NO_EXPERTS = "it is no part of a layer with experts that a router chooses among"


def expert_units(
    found: Sequence[Target], model: nn.Module, granularity: Coupling, inputs: Inputs, distributed: bool
) -> tuple[list[Units], dict[str, str]]:
    """Return the experts that the targets are part of as units, and why other targets have none.

    Args:
        found: The targets.
        model: The model that they are of; it is left as it is.
        granularity: Says how many experts stay.
        inputs: Example inputs of the model.
        distributed: Whether other ranks look at the same model, perhaps with other inputs.

    Raises:
        ValueError: If there are none, or the model cannot be run.
    """
    inputs = whole_inputs(model, granularity, inputs)
    targets, parameters = {target.name: target for target in found}, named_parameters(model)
    reasons, candidates = dict.fromkeys(targets, NO_EXPERTS), list[Group]()
    for group in expert_groups(model):
        reason = _unfit(group, targets, parameters)
        if reason is None:
            candidates.append(group)
        reasons.update({m.name: reason or _CHANGES for m in group.members})
    kept = proven(model, candidates, inputs, distributed)
    touched = {member.name for group in kept for member in group.members}
    left_out = {name: reason for name, reason in reasons.items() if name in targets and name not in touched}
    if not kept:
        first = sorted(left_out.items(), key=lambda item: item[1] == NO_EXPERTS)  # experts and routers
        why = "; ".join(f"{name}: {reason}" for name, reason in first[:5])
        raise ValueError(
            f"{granularity} must find layers with more experts than a token takes, got none ({why}): prune their "
            f"width by Channel(), or single weights by Weight()"
        )
    return units_of_groups(kept, model, targets, granularity), left_out


def _unfit(group: Group, targets: Mapping[str, Target], parameters: Mapping[str, nn.Parameter]) -> str | None:
    """Return why the experts of a layer cannot be pruned."""
    if others := [member.name for member in group.role("producer") if member.name not in targets]:
        return f"its experts lie in {others[0]} too, which is not among the targets"
    return frozen_part(group, parameters)
