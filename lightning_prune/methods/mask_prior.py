"""Mask prior: the N:M masks that learning starts from."""

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_prune.criteria import Criterion
from lightning_prune.granularities import NM
from lightning_prune.masks import Masks
from lightning_prune.methods.pattern_logits import groups
from lightning_prune.units.weights import WeightUnits
from lightning_prune.updates.decision import score
from lightning_prune.validation.arguments import numbers
from lightning_prune.validation.instances import instance


def check_prior(prior: Criterion | Masks) -> Criterion | Masks:
    """Return a prior if it needs no data, as masks and criteria that score by the weights alone.

    Raises:
        ValueError: If it is a criterion that observes training.
        TypeError: If it is neither.
    """
    if isinstance(prior, Masks):
        return prior
    if instance("prior", prior, Criterion).needs != "weights":
        raise ValueError(
            f"prior must score by the weights alone, got {prior}: give the masks that "
            f"prune(copy.deepcopy(model), ..., criterion={prior}, data=...) returns"
        )
    return prior


def two_numbers(argument: str, values: Sequence[float]) -> tuple[int | float, ...]:
    """Return the first and the last value of what changes during a run.

    >>> two_numbers("scale", [100.0, 500.0])
    (100.0, 500.0)
    """
    found = numbers(argument, values, "(0, inf)")
    if len(found) != 2:
        raise ValueError(f"{argument} must be two numbers, the first and the last, got {found}")
    return found


@torch.no_grad()
def first_masks(prior: Criterion | Masks, units: Sequence[WeightUnits], granularity: NM) -> Masks:
    """Return the masks of a prior for these units, on their devices.

    Args:
        prior: Masks, or a criterion whose masks are taken.
        units: The targets, in groups.
        granularity: How many weights of each group are kept.

    Raises:
        ValueError: If masks of a unit are missing, have another shape, or keep another number of a group.
    """
    if isinstance(prior, Criterion):
        places = score(units, prior, dict.fromkeys(unit.name for unit in units))
        return Masks({name: places.at_least(name, granularity.least) for name in places})
    for unit in units:
        shape = tuple(prior[unit.name].shape) if unit.name in prior else "none"
        if shape != tuple(unit.parameter.shape):
            wanted = f"{unit.name!r} of shape {tuple(unit.parameter.shape)}"
            raise ValueError(f"prior must have a mask for {wanted}, got {shape}: leave other weights out by ignore")
        kept = groups(prior[unit.name], unit.inputs, granularity.m).sum(-1)
        if bool((kept != granularity.n).any()):
            pattern, counts = f"{granularity.n} of every {granularity.m}", sorted(set(kept.flatten().tolist()))
            raise ValueError(f"prior must keep {pattern} weights, got a mask that keeps {counts} of {unit.name!r}")
    return Masks({unit.name: prior[unit.name].to(unit.parameter.device, torch.bool, copy=True) for unit in units})


def warn_of_zeros(dense: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Warn of weights that are pruned already, so that there is nothing to choose from."""
    hidden = {name: weight[~masks[name]] for name, weight in dense.items()}
    if pruned := [name for name, values in hidden.items() if values.numel() and not values.any()]:
        rank_zero_warn(
            f"LearnedMasks finds that what its first masks prune is zero already in {pruned[:5]}: begin with the model "
            f"before it was pruned, and give the masks as prior"
        )
