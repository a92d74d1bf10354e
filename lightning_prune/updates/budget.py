"""Budget: what a model costs once so many units of each target are left, and how many may stay to meet a goal."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import nn

from lightning_prune.models.copying import hookless_copy
from lightning_prune.models.flops import dense_flops
from lightning_prune.models.forward import Inputs, fitting
from lightning_prune.models.parameters import named_parameters
from lightning_prune.scopes import Scope
from lightning_prune.scopes.knapsack import Knapsack
from lightning_prune.tensors.distributed import over_ranks
from lightning_prune.tensors.selection import Scores
from lightning_prune.units.units import Units
from lightning_prune.updates.decision import round_keep
from lightning_prune.updates.latency import LatencyTable
from lightning_prune.updates.parts import Parts, Shares, parts_left

Measure = Literal["units", "parameters", "flops", "latency"]
Cost = Callable[[Parts], float]  # from what is left of a model to the fraction of its cost that is left, 0 to 1


class Budget:
    """The cost of a model as a function of how many units of each target stay.

    Args:
        units: The targets.
        cost: Which fraction of the cost is left of a smaller model; the less there is of it, the less.
        shares: By name of a target: the share, 0 to 1, that one unit has of a dimension of a part.
        floor: The fraction of every target, rounded down, that stays at least.

    >>> from lightning_prune.granularities import Channel
    >>> from lightning_prune.models.parameters import find
    >>> from lightning_prune.units.finding import make_units
    >>> layer = nn.Linear(4, 2)
    >>> units = make_units(find(layer), layer, Channel())
    >>> cost = partial(summed, {"weight": 8.0, "bias": 2.0})
    >>> Budget(units, cost, {"weight": units[0].shares}).left({"weight": 1})
    0.5
    """

    def __init__(self, units: Sequence[Units], cost: Cost, shares: Shares, floor: float = 0.0) -> None:
        self._units = {unit.name: unit for unit in units}
        self._cost = cost
        self._shares = shares
        self._floor = {unit.name: max(1, int(floor * unit.size)) if floor else 0 for unit in units}

    def left(self, keep: Mapping[str, int]) -> float:
        """Return the fraction of the cost, 0 to 1, that is left when so many units of each target stay."""
        return self._cost(parts_left(self._units, self._shares, keep))

    def reaching(
        self, sparsity: float, floor: float, min_density: float | None, what: str, granularity: object
    ) -> "Budget":
        """Return the same cost with a floor, which gives way to the sparsity unless it is one that the user wants.

        Args:
            sparsity: The fraction of the cost that has to go.
            floor: The fraction of every target that stays at least.
            min_density: The floor that the user wants, if any.
            what: What the cost is counted in.
            granularity: What the units are of.

        Raises:
            ValueError: If the units cannot reach it.
        """
        budget = Budget(list(self._units.values()), self._cost, self._shares, floor) if floor else self
        if budget.max_sparsity < sparsity - 1e-9 and min_density is None:
            budget = self
        if budget.max_sparsity < sparsity - 1e-9:
            raise ValueError(
                f"sparsity must be at most {budget.max_sparsity:.4f} of the {what}, since {granularity} leaves some "
                f"units in each target and others are not targets, got {sparsity}"
                f"{f' with min_density={min_density}' if min_density else ''}"
            )
        return budget

    @property
    def max_sparsity(self) -> float:
        """The greatest fraction of the cost, 0 to 1, that pruning can take away."""
        return 1.0 - self.left({name: round_keep(unit, self._floor[name]) for name, unit in self._units.items()})

    def keep(self, scores: Scores, scope: Scope, amount: float) -> dict[str, int]:
        """Return how many units of each target stay: as many as the scope allows when this fraction has to go.

        If it cannot be reached, as few stay as can. A scope such as "local" takes units from several targets together:
        those that need not go, in the order of the targets, stay.
        """
        total, pruned = sum(scores.sizes.values()), scores.pruned()

        def stays(name: str, count: int) -> int:
            most = scores.sizes[name] - pruned[name]
            return min(round_keep(self._units[name], max(count, self._floor[name])), most)

        share_out = scope.priced(scores, stays, self.left) if isinstance(scope, Knapsack) else scope

        def at(count: int) -> dict[str, int]:
            return {name: stays(name, int(k)) for name, k in share_out(scores, count / total).items()}

        low, high = 0, total  # the search is for the first count that is enough
        while low < high:
            middle = (low + high) // 2
            enough = self.left(at(middle)) <= 1.0 - amount + 1e-9
            low, high = (low, middle) if enough else (middle + 1, high)
        found, before = at(low), at(max(0, low - 1))
        for name in found:
            more = {**found, name: max(found[name], before[name])}
            found = more if self.left(more) <= 1.0 - amount + 1e-9 else found
        return found


def summed(costs: Mapping[str, float], parts: Parts) -> float:
    """Return the fraction that is left of costs by name, each in proportion to what is left of its dimensions.

    >>> summed({"weight": 8.0, "bias": 2.0}, {("weight", 0): 0.5, ("weight", 1): 0.5})
    0.4
    """
    left = dict(costs)
    for (name, _), part in parts.items():
        left[name] = left.get(name, 0.0) * part
    return sum(left.values()) / sum(costs.values())


def make_budget(
    measure: Measure | LatencyTable,
    units: Sequence[Units],
    model: nn.Module,
    inputs: Inputs,
    distributed: bool = False,
) -> Budget:
    """Return the budget of a model, in units, parameters, FLOPs or time.

    Args:
        measure: What counts; a time by its table.
        units: The targets.
        model: Their model; it is left as it is.
        inputs: Example inputs, for FLOPs.
        distributed: Whether other ranks count the same model, perhaps with other inputs.

    Raises:
        ValueError: If FLOPs are to be counted without example inputs, there are none, or a table is of another model.
    """
    if measure == "units":
        alone = {unit.name: {(unit.name, 0): 1.0 / unit.size} for unit in units}
        return Budget(units, partial(summed, {unit.name: float(unit.size) for unit in units}), alone)
    parameters, shares = named_parameters(model), {unit.name: unit.shares for unit in units}
    if measure == "parameters":
        return Budget(units, partial(summed, {name: float(p.numel()) for name, p in parameters.items()}), shares)
    if isinstance(measure, LatencyTable):
        measure.check(units, {name: parameter.shape for name, parameter in parameters.items()})
        return Budget(units, measure.left, shares)
    if inputs is None:
        raise ValueError('of="flops" needs example inputs: example_input_array, or example_inputs of prune()')
    counted = dense_flops(hookless_copy(model), fitting(inputs, model))
    names = [*parameters, *(name for name in counted if name not in parameters)]
    flops = torch.tensor([counted.get(name, 0) for name in names], dtype=torch.float64)
    found = over_ranks(flops) if distributed else flops
    if not found.sum():
        raise ValueError('of="flops" needs a model with products of matrices or convolutions, got none')
    return Budget(units, partial(summed, dict(zip(names, found.tolist(), strict=True))), shares)
