"""Exchanging: weak weights make way for as many new ones, which start from zero or from somewhere near it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_prune.criteria import Criterion, Magnitude
from lightning_prune.masks import Masks
from lightning_prune.tensors.distributed import is_sharded, local, over_ranks
from lightning_prune.tensors.selection import Scores
from lightning_prune.units.units import Units
from lightning_prune.updates.decision import score


@torch.no_grad()
def exchange(
    units: Sequence[Units], masks: Mapping[str, Tensor], fraction: float, growth: Criterion, regrow: bool = False
) -> Masks:
    """Return masks in which the smallest units of every target made way for as many that were pruned.

    Args:
        units: The targets.
        masks: The masks until now.
        fraction: Of the units of a target, the part that is exchanged, as far as there are pruned ones to grow; where
            units are in groups that keep as many each, the nearest number that all groups can exchange.
        growth: Scores the pruned units; the highest grow.
        regrow: Whether units that have just been dropped may be among them.

    >>> from lightning_prune.criteria import Random
    >>> from lightning_prune.granularities import Weight
    >>> from lightning_prune.models.parameters import find
    >>> from lightning_prune.units.finding import make_units
    >>> layer = torch.nn.Linear(4, 1)
    >>> layer.weight.data = torch.tensor([[0.1, 0.2, 0.0, 0.0]])
    >>> units = make_units(find(layer), layer, Weight())
    >>> exchange(units, {"weight": layer.weight != 0}, 0.5, Random())
    {'weight': tensor([[False,  True, False,  True]])}
    """
    kept = {unit.name: unit.kept(masks) for unit in units}
    magnitudes = score(units, Magnitude(), kept)
    zeros = magnitudes.pruned()
    steps = {unit.name: unit.round_to for unit in units}
    number = {u.name: round(fraction * (u.size - zeros[u.name]) / steps[u.name]) * steps[u.name] for u in units}
    if not regrow:
        number = {name: min(zeros[name], n) for name, n in number.items()}
    left = {name: ~magnitudes.lowest(name, zeros[name] + n) for name, n in number.items()}
    gains = score(units, growth, {name: None if m is None else ~m for name, m in (left if regrow else kept).items()})
    exchanged = Masks()
    for unit in units:
        exchanged.update(unit.masks(left[unit.name] | _highest(gains, unit, number[unit.name])))
    return exchanged


def _highest(scores: Scores, unit: Units, number: int) -> Tensor:
    return ~scores.lowest(unit.name, unit.size - number)


def uniform(units: Units, grown: Tensor, noise: Criterion, held: Mapping[str, Tensor]) -> Tensor:
    """Return what new weights start with: at most, either way, the mean size of those that are held.

    Args:
        units: The target.
        grown: Which of its weights (bool) are new.
        noise: Scores every weight with a number in [0, 1).
        held: The masks until now.
    """
    weight, mask = local(units.parameter), held[units.name]
    sums = torch.stack([weight.abs().sum(dtype=torch.float64), mask.sum()])  # what is not held is zero
    total, number = (over_ranks(sums) if is_sharded(units.parameter) else sums).tolist()
    drawn = noise.scores(units).view(grown.shape)[grown]
    return drawn.mul(2.0).sub(1.0).mul(total / max(1.0, number))


def steps(units: Units, grown: Tensor) -> Tensor:
    """Return the mean gradient of new weights, reversed: at the learning rate, a step of plain gradient descent."""
    assert units.statistic is not None
    return units.statistic.view(grown.shape)[grown] / -float(units.steps)
