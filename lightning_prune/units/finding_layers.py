"""Finding layers: the residual blocks of a model as units, those of one container and shape together."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from lightning_prune.models.forward import Inputs
from lightning_prune.models.parameters import Target, find, named_parameters, plain_name
from lightning_prune.structure.block_names import is_inside
from lightning_prune.structure.blocks import find_blocks
from lightning_prune.tensors.distributed import over_ranks
from lightning_prune.units.finding import whole_inputs
from lightning_prune.units.layers import Block, LayerUnits
from lightning_prune.units.units import Units

NO_BLOCK = "it is in no residual block of a ModuleList or Sequential"


class Stacks(Protocol):
    """What a granularity says about blocks."""

    @property
    def minimum(self) -> int:
        """How many blocks of a container stay."""


def layer_units(
    found: Sequence[Target], model: nn.Module, granularity: Stacks, inputs: Inputs, distributed: bool
) -> tuple[list[Units], dict[str, str]]:
    """Return the blocks that hold the targets as units, and the reason for every target without any.

    Args:
        found: The targets.
        model: The model that they are of; it is left as it is.
        granularity: Says how many blocks stay.
        inputs: Example inputs of the model.
        distributed: Whether other ranks look at the same model, perhaps with other inputs.

    Raises:
        ValueError: If there are none, or the model cannot be run.
    """
    blocks, reasons = find_blocks(model, whole_inputs(model, granularity, inputs))
    blocks = _agreed(model, blocks) if distributed else blocks
    targets, parameters = {target.name: target for target in found}, named_parameters(model)
    needed = wanted(model)
    members = {block: {n: p for n, p in parameters.items() if is_inside(n, [block])} for block in blocks}
    for block, own in list(members.items()):
        if reason := _unfit(own, targets, needed):
            reasons[block] = reason
            del members[block]
    left_out = {name: _reason(name, reasons) for name in targets if not is_inside(name, members)}
    if not members:
        raise ValueError(f"{granularity} must find residual blocks to prune, got none ({_summed_up(left_out)})")
    modules = {plain_name(name): module for name, module in model.named_modules()}
    return [_units_of(stack, modules, members, targets, granularity) for stack in _stacks(members)], left_out


def _agreed(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Return the blocks that all ranks have found."""
    names = [plain_name(name) for name, _ in model.named_modules()]
    votes = over_ranks(torch.tensor([int(name in blocks) for name in names]), "min").tolist()
    return [name for name, vote in zip(names, votes, strict=True) if vote]


def wanted(model: nn.Module) -> set[str]:
    """Return the names of the weights that are pruned unless they are ignored."""
    try:
        return {target.name for target in find(model)}
    except ValueError:  # all are named by the user
        return set()


def _unfit(block: Block, targets: Mapping[str, Target], needed: set[str]) -> str | None:
    """Return why a block cannot be pruned."""
    if fixed := [name for name, parameter in block.items() if not parameter.requires_grad]:
        return f"what belongs to its block is frozen: {fixed[0]}"
    if others := [name for name in block if name in needed and name not in targets]:
        return f"its block is pruned as a whole, and {others[0]} is not among the targets"
    return None if any(name in targets for name in block) else NO_BLOCK


def _reason(name: str, reasons: Mapping[str, str]) -> str:
    """Return the reason for a target: that of the innermost block that holds it."""
    holding = [block for block in reasons if is_inside(name, [block])]
    return reasons[max(holding, key=len)] if holding else NO_BLOCK


def _summed_up(left_out: Mapping[str, str]) -> str:
    """Return reasons, each once, with the first target that it is the reason for."""
    first: dict[str, str] = {}
    for name, reason in left_out.items():
        first.setdefault(reason, name)
    return "; ".join(f"{name}: {reason}" for reason, name in list(first.items())[:5])


def _stacks(members: Mapping[str, Block]) -> Iterator[list[str]]:
    """Yield the blocks that lie in one container and have parameters of the same names and shapes."""
    stacks: dict[object, list[str]] = {}
    for block, own in members.items():
        shapes = tuple((name.removeprefix(block), tuple(parameter.shape)) for name, parameter in own.items())
        stacks.setdefault((block.rpartition(".")[0], shapes), []).append(block)
    yield from stacks.values()


def _units_of(
    stack: Sequence[str],
    modules: Mapping[str, nn.Module],
    members: Mapping[str, Block],
    targets: Mapping[str, Target],
    granularity: Stacks,
) -> LayerUnits:
    others = len(list(modules[stack[0].rpartition(".")[0]].children())) - len(stack)
    minimum = max(0, min(granularity.minimum, len(stack)) - others)
    own = [members[block] for block in stack]
    first = next(targets[name] for name in own[0] if name in targets)
    return LayerUnits(first, [modules[block] for block in stack], own, targets, minimum, str(granularity))
