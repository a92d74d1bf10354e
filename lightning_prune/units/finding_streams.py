"""Finding streams: the channels of residual streams as units."""

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from lightning_prune.models.forward import Inputs
from lightning_prune.models.parameters import Target, named_parameters
from lightning_prune.structure.groups import Group
from lightning_prune.structure.streams import find_streams
from lightning_prune.units.coupled import Coupling
from lightning_prune.units.finding import frozen_part, proven, units_of_groups, whole_inputs
from lightning_prune.units.finding_layers import wanted
from lightning_prune.units.units import Units

NO_STREAM = "its channels are no residual stream that norms take statistics over"


def stream_units(
    found: Sequence[Target], model: nn.Module, granularity: Coupling, inputs: Inputs, distributed: bool
) -> tuple[list[Units], dict[str, str]]:
    """Return the channels of the residual streams that the targets add to as units, and why other targets have none.

    Embeddings go along with what is added to them, though they are no targets by default.

    Args:
        found: The targets.
        model: The model that they are of; it is left as it is.
        granularity: Says how many channels stay.
        inputs: Example inputs of the model.
        distributed: Whether other ranks look at the same model, perhaps with other inputs.

    Raises:
        ValueError: If there are none, or the model cannot be run.
    """
    inputs = whole_inputs(model, granularity, inputs)
    graph = find_streams(model, inputs)
    targets, parameters = {target.name: target for target in found}, named_parameters(model)
    needed, candidates = wanted(model), list[Group]()
    reasons: dict[str, str] = {**dict.fromkeys(targets, NO_STREAM), **graph.left_out}
    for group in graph.groups:
        reason = _unfit(group, targets, needed, parameters)
        if reason is None:
            candidates.append(group)
        reasons.update({m.name: reason or "the outputs of the model change" for m in group.role("producer")})
    kept = proven(model, candidates, inputs, distributed)
    touched = {member.name for group in kept for member in group.members}
    left_out = {name: reason for name, reason in reasons.items() if name in targets and name not in touched}
    if not kept:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:5])
        raise ValueError(f"{granularity} must find a residual stream to prune, got none ({why})")
    return units_of_groups(kept, model, targets, granularity), left_out


def _unfit(
    group: Group, targets: Mapping[str, Target], needed: Collection[str], parameters: Mapping[str, nn.Parameter]
) -> str | None:
    """Return why the channels of a stream cannot be pruned."""
    producers = [member.name for member in group.role("producer")]
    if others := [name for name in producers if name in needed and name not in targets]:
        return f"its channels are those of {others[0]} too, which is not among the targets"
    if frozen := frozen_part(group, parameters):
        return frozen
    return None if any(name in targets for name in producers) else "none of what makes its channels is a target"
