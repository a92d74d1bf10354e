"""Smaller copies: a model with fewer units, to see what its parts take then."""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from lightning_prune.export.fast import in_fastest_forms
from lightning_prune.models.copying import hookless_copy
from lightning_prune.models.forward import Inputs
from lightning_prune.models.parameters import named_parameters, plain_name
from lightning_prune.structure.cut_record import CutRecord
from lightning_prune.structure.surgery import cut, kept_by
from lightning_prune.units.coupled import CoupledUnits
from lightning_prune.units.layers import LayerUnits
from lightning_prune.units.pooled import PooledUnits
from lightning_prune.units.units import Units
from lightning_prune.updates.decision import round_keep
from lightning_prune.updates.parts import Parts, parts_left
from lightning_prune.updates.timed_layers import Spot, layer_spots


@dataclass(frozen=True)
class SmallerCopy:
    """A model with fewer units.

    Args:
        model: The copy, in eval mode.
        parts: What is left of the model.
        spots: What of it can be timed: its layers, or the blocks of which some have been taken out.
        dense: The weights of layers that keep their shape and are dense, because no other form is faster.
    """

    model: nn.Module
    parts: Parts
    spots: Mapping[nn.Module, Spot]
    dense: Collection[str] = ()


def smaller_copy(
    model: nn.Module, units: Sequence[Units], levels: Sequence[float], inputs: Inputs = None
) -> SmallerCopy:
    """Return a copy of a model with a part of the units of each target.

    Args:
        model: The model.
        units: Its targets.
        levels: Which fraction of each target is left; at least one unit is.
        inputs: Example inputs, for which layers that keep their shape take the form that is fastest.

    Raises:
        ValueError: If units cannot be taken out of it.
    """
    keep = {unit.name: round_keep(unit, max(1, round(k * unit.size))) for unit, k in zip(units, levels, strict=True)}
    stacks = [unit for unit in units if isinstance(unit, LayerUnits)]
    if stacks:
        return _shallower(model, stacks, keep)
    copy = hookless_copy(model).eval()
    parts = parts_left({unit.name: unit for unit in units}, {unit.name: unit.shares for unit in units}, keep)
    whole = SmallerCopy(copy, parts, layer_spots(copy, parts))
    groups = [unit for unit in units if isinstance(unit, PooledUnits) and unit.even]
    if groups:
        return _sparser(whole, groups, keep, inputs)
    coupled = [unit for unit in units if isinstance(unit, CoupledUnits)]
    if len(coupled) < len(units):
        raise ValueError(
            'of="latency" needs units that shrink takes out, got channels of single layers: use Channel(coupled=True)'
        )
    cut(copy, kept_by(copy, [(unit.group, torch.arange(unit.size) < keep[unit.name]) for unit in coupled]))
    return whole


def _sparser(whole: SmallerCopy, units: Sequence[PooledUnits], keep: Mapping[str, int], inputs: Inputs) -> SmallerCopy:
    """Return a copy with random units at zero, whose layers are in their fastest form."""
    copy, spots = whole.model, whole.spots
    named = {name: (module, spots[module]) for name, module in copy.named_modules() if module in spots}
    parameters, generator = named_parameters(copy), torch.Generator().manual_seed(0)
    for unit in units:
        order = torch.rand(unit.groups, unit.size // unit.groups, generator=generator).argsort(1).argsort(1)
        mask = unit.masks((order < keep[unit.name] // unit.groups).flatten())[unit.name]
        parameters[unit.name].data.mul_(mask)
    pruned = any(keep[unit.name] < unit.size for unit in units)
    running = in_fastest_forms(copy, inputs)[0] if pruned else copy
    targets, found, dense = {unit.name for unit in units}, {}, set[str]()
    for name, (module, spot) in named.items():
        form = running.get_submodule(name)
        found[form] = replace(spot, keeps_shape=spot.weight in targets)
        dense |= {spot.weight} if type(form) is type(module) else set()
    return SmallerCopy(running, whole.parts, found, frozenset(dense))


def _shallower(model: nn.Module, stacks: Sequence[LayerUnits], keep: Mapping[str, int]) -> SmallerCopy:
    """Return a copy without some blocks, chosen at random, that are the spots of it."""
    copy = hookless_copy(model).eval()
    names = {module: plain_name(name) for name, module in model.named_modules()}
    blocks = {plain_name(name): module for name, module in copy.named_modules()}
    parts, spots, removed = {}, {}, list[str]()
    for stack in stacks:
        kept = set(random.Random(keep[stack.name]).sample(range(stack.size), keep[stack.name]))
        for place, (block, own) in enumerate(zip(stack.modules, stack.blocks, strict=True)):
            weight = next(iter(own))
            parts[weight, 0] = float(place in kept)
            spots[blocks[names[block]]] = Spot(weight, (0, None))
            removed += [] if place in kept else [names[block]]
    cut(copy, CutRecord(removed=tuple(removed)))
    return SmallerCopy(copy, parts, spots)
