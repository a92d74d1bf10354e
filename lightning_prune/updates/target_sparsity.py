"""Goal: how much is to be pruned, as a sparsity, a sparsity per layer, or a threshold on the scores."""

from collections.abc import Mapping, Sequence

from torch import nn

from lightning_prune import schedules, scopes
from lightning_prune.criteria import Criterion
from lightning_prune.granularities import NM, Block, Granularity, Weight
from lightning_prune.models.forward import Inputs
from lightning_prune.models.parameters import Target, find
from lightning_prune.models.parameters import fractions as decided_by
from lightning_prune.scopes import Scope
from lightning_prune.units.units import Units
from lightning_prune.updates.budget import Budget, Measure, make_budget
from lightning_prune.updates.decision import Allocate
from lightning_prune.validation.arguments import choice, fractions, number
from lightning_prune.validation.instances import instance
from lightning_prune.validation.values import shown

Sparsity = float | Mapping[str, float]

# each scores all units again: a number of steps, given by mistake, would run for days
MOST_ROUNDS = 10_000


def check(
    sparsity: Sparsity | None,
    threshold: float | None,
    granularity: Granularity = Weight(),
    min_density: float = 0.0,
    of: Measure = "units",
) -> None:
    """Refuse a goal that is none, or that the granularity cannot serve.

    Raises:
        ValueError: If both or neither are given, a sparsity is outside [0, 1), or lower than N:M needs, or the density
            that every target is to keep leaves no room for it, or it cannot be counted in what ``of`` says.

    >>> check(90, None)
    Traceback (most recent call last):
    ValueError: sparsity must be in [0, 1), got 90: did you mean 0.9?
    """
    instance("granularity", granularity, Granularity)
    if (sparsity is None) == (threshold is None):
        given = f"sparsity={shown(sparsity)} and threshold={shown(threshold)}"
        raise ValueError(f"give either sparsity or threshold, got {given}")
    sparsity, threshold = amount(sparsity), level(threshold)
    for pattern, fraction in sparsity.items() if isinstance(sparsity, Mapping) else ():
        _check_least(f"sparsity[{pattern!r}]", fraction, granularity)
    if isinstance(sparsity, int | float):
        _check_least("sparsity", sparsity, granularity)
    if threshold is not None and granularity.group is not None:
        raise ValueError(f"threshold must be None for {granularity}, which compares within groups, got {threshold}")
    min_density = density(min_density)
    _check_density(sparsity, min_density)
    _check_measure(sparsity, granularity, min_density, of)


def amount(sparsity: Sparsity | None) -> Sparsity | None:
    """Return a sparsity in plain numbers.

    Raises:
        ValueError: If it is neither a fraction nor a mapping to fractions.

    >>> import torch
    >>> amount(torch.tensor(0.5))
    0.5
    """
    return None if sparsity is None else fractions("sparsity", sparsity)


def level(threshold: float | None) -> float | None:
    """Return a threshold as a plain number.

    Raises:
        ValueError: If it is not finite.
    """
    return None if threshold is None else number("threshold", threshold)


def density(min_density: float) -> float:
    """Return the fraction that every target is to keep as a plain number.

    Raises:
        ValueError: If it is outside [0, 1].
    """
    return number("min_density", min_density, "[0, 1]")


def _check_density(sparsity: Sparsity | None, min_density: float) -> None:
    if min_density and not isinstance(sparsity, int | float):
        raise ValueError(f"min_density must go with one sparsity for all targets, got min_density={min_density}")
    if isinstance(sparsity, int | float) and min_density > 1.0 - sparsity + 1e-9:
        raise ValueError(f"min_density must be at most 1 - sparsity, got {min_density} for a sparsity of {sparsity}")


def _check_measure(sparsity: Sparsity | None, granularity: Granularity, min_density: float, of: Measure) -> None:
    choice("of", of, ("units", "parameters", "flops"))
    if of != "units" and not isinstance(sparsity, int | float):
        raise ValueError(f'of must be "units" for a threshold or a sparsity per layer, got {of!r}')
    if of != "units" and isinstance(granularity, NM | Block):
        raise ValueError(f'of must be "units" for {granularity}, got {of!r}')
    if min_density and (of != "units" or granularity.round_to > 1):
        raise ValueError(f"min_density must be 0 for {granularity} and of={of!r}, got {min_density}")


def _check_least(argument: str, value: float, granularity: Granularity) -> None:
    if 0.0 < value < granularity.least - 1e-9:
        raise ValueError(f"{argument} must be at least {granularity.least:g} for {granularity}, got {value}")


def describe(sparsity: Sparsity | None, threshold: float | None) -> tuple[str, float]:
    """Return the goal in words, and the level that masks reach in the end: 1 where that is no single sparsity.

    >>> describe(0.9, None), describe(None, 0.1)
    (('sparsity 0.9', 0.9), ('threshold 0.1', 1.0))
    """
    what = f"sparsity {sparsity}" if threshold is None else f"threshold {threshold}"
    if isinstance(sparsity, Mapping):
        what = "sparsity " + ", ".join(f"{fraction} of {pattern!r}" for pattern, fraction in sparsity.items())
    return what, sparsity if isinstance(sparsity, float | int) else 1.0


def find_targets(
    model: nn.Module, sparsity: Sparsity | None, targets: Sequence[str], ignore: Sequence[str], later: bool = False
) -> list[Target]:
    """Return the parameters to prune; with a sparsity per layer, those that one of its patterns matches.

    With ``later`` there may be none yet, since all are frozen.

    Raises:
        ValueError: If a pattern matches nothing, or nothing is left to prune.
    """
    if not isinstance(sparsity, Mapping):
        return find(model, targets, ignore, later=later)
    try:
        found = find(model, targets or tuple(sparsity), ignore, later=later)
    except ValueError as error:
        given = "targets" if targets else "sparsity"
        raise ValueError(f"{given} must hold patterns of what is to be pruned: {error}") from error
    decided = decided_by(sparsity, found) if found else {}
    return [target for target in found if target.name in decided]


def after(sparsity: Sparsity, done: float) -> Sparsity:
    """Return the sparsity when a fraction of the rounds is done, each of which keeps the same part of what is left.

    >>> after({"a": 0.75, "b": 0.0}, 0.5)
    {'a': 0.5, 'b': 0.0}
    """
    if isinstance(sparsity, Mapping):
        return {pattern: schedules.after(done, fraction) for pattern, fraction in sparsity.items()}
    return schedules.after(done, sparsity)


def allocation(
    found: Sequence[Target],
    sparsity: Sparsity | None,
    threshold: float | None,
    criterion: Criterion,
    scope: Scope,
    due: float = 1.0,
    min_density: float = 0.0,
    budget: Budget | None = None,
) -> Allocate:
    """Return the function from scores to the units that each target keeps when this fraction of the goal is due.

    With a budget the goal is a fraction of what that counts.
    """
    if threshold is not None:
        level = criterion.level(threshold)
        return lambda scores: scopes.below(scores, level, due)
    if isinstance(sparsity, Mapping):
        decided = decided_by(sparsity, found)
        return lambda scores: scopes.per_layer(scores, decided, due)
    assert sparsity is not None
    amount = sparsity * due
    if budget is not None:
        return lambda scores: budget.keep(scores, scope, amount)
    if min_density:
        return lambda scores: scopes.at_least(scores, amount, scope, min_density)
    return lambda scores: scope(scores, amount)


def budget_of(
    sparsity: Sparsity | None,
    of: Measure,
    granularity: Granularity,
    units: Sequence[Units],
    model: nn.Module,
    inputs: Inputs,
    several: bool = False,
) -> Budget | None:
    """Return what the goal is counted in; None where it is a count of units that a scope can share out exactly.

    Raises:
        ValueError: If the units cannot reach the goal.
    """
    if not isinstance(sparsity, float | int) or (of == "units" and granularity.round_to == 1):
        return None
    budget = make_budget(of, units, model, inputs, several)
    if budget.reach < sparsity - 1e-9:
        raise ValueError(
            f"sparsity must be at most {budget.reach:.4f} of the {of}, since {granularity} leaves some units in each "
            f"target and others are no targets, got {sparsity}"
        )
    return budget
