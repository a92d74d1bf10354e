"""Sparsity target: how much is to be pruned, as a sparsity, a sparsity per layer, or a threshold on the scores."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from lightning_prune import schedules, scopes
from lightning_prune.criteria import Criterion
from lightning_prune.granularities import Granularity
from lightning_prune.models.forward import Inputs
from lightning_prune.models.parameters import Target, find
from lightning_prune.models.parameters import fractions as decided_by
from lightning_prune.scopes import Scope
from lightning_prune.tensors.selection import Scores
from lightning_prune.units.units import Units
from lightning_prune.updates.budget import Budget, Measure, make_budget
from lightning_prune.updates.latency import LatencyTable, measure_name
from lightning_prune.updates.latency_measuring import check_measure, latency_table
from lightning_prune.validation.arguments import choice, fractions, number
from lightning_prune.validation.instances import instance
from lightning_prune.validation.values import shown

Sparsity = float | Mapping[str, float]

# each scores all units again: a number of steps, given by mistake, would run for days
MOST_ROUNDS = 10_000


@dataclass(frozen=True)
class SparsityTarget:
    """What is to be reached: a sparsity, a sparsity per layer, or a threshold on the scores.

    Args:
        sparsity: Fraction of zeros among the targets, in [0, 1), or ``{pattern: fraction}`` per layer.
        threshold: Instead of a sparsity: every unit that scores below it is pruned.
        min_density: Fraction of every target that is kept at least; None is that of the granularity.
        of: What the sparsity is a fraction of: the "units" of the targets, all "parameters" or "flops" of the model,
            its "latency", or the latency that a table says.
        default_density: What None means: less is kept where there is no room.

    Raises:
        ValueError: If both or neither of sparsity and threshold are given, or an argument is out of range.

    >>> SparsityTarget(90)
    Traceback (most recent call last):
    ValueError: sparsity must be in [0, 1), got 90: did you mean 0.9?
    """

    sparsity: Sparsity | None = None
    threshold: float | None = None
    min_density: float | None = None
    of: Measure | LatencyTable = "units"
    default_density: float = 0.0
    floor: float = field(init=False, repr=False)  # the fraction of every target that is kept at least

    def __post_init__(self) -> None:
        """Check the arguments, and keep them as plain numbers."""
        if (self.sparsity is None) == (self.threshold is None):
            given = f"sparsity={shown(self.sparsity)} and threshold={shown(self.threshold)}"
            raise ValueError(f"give either sparsity or threshold, got {given}")
        checks: dict[str, Callable[[Any], Any]] = {
            "min_density": lambda given: number("min_density", given, "[0, 1]"),
            "sparsity": partial(fractions, "sparsity"),
            "threshold": partial(number, "threshold"),
        }
        for name, check in checks.items():
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, check(given))
        object.__setattr__(self, "floor", self.default_density if self.min_density is None else self.min_density)
        if not isinstance(self.of, LatencyTable):
            choice("of", self.of, ("units", "parameters", "flops", "latency"))
        if self.min_density and not self.is_single:
            raise ValueError(
                f"min_density must go with one sparsity for all targets, got min_density={self.min_density}"
            )
        if self.of != "units" and not self.is_single:
            raise ValueError(f'of must be "units" for a threshold or a sparsity per layer, got {self.of!r}')
        if (self.min_density or 0.0) > 1.0 - self.final + 1e-9 and self.is_single:
            raise ValueError(
                f"min_density must be at most 1 - sparsity, got {self.min_density} for a sparsity of {self.sparsity}"
            )

    @property
    def is_single(self) -> bool:
        """Whether it is one sparsity for all targets."""
        return isinstance(self.sparsity, int | float)

    @property
    def final(self) -> float:
        """The sparsity that masks reach in the end; 1 where that is no single one."""
        return self.sparsity if isinstance(self.sparsity, int | float) else 1.0

    def for_granularity(self, granularity: Granularity) -> "SparsityTarget":
        """Return it for units of a granularity, with the fraction of every target that is kept by default.

        That is at most half of what the sparsity leaves, so that the scope has something to share out; none of a
        threshold or a sparsity per layer.

        Raises:
            TypeError: If it is not a granularity.
            ValueError: If a sparsity is lower than N:M needs, or it cannot be counted in what ``of`` says.
        """
        if not isinstance(granularity, Granularity):
            instance("granularity", granularity, Granularity)  # raises
        levels = self.sparsity.items() if isinstance(self.sparsity, Mapping) else [("", self.sparsity)]
        for pattern, level in levels:
            if level is not None and 0.0 < level < granularity.least - 1e-9:
                argument = f"sparsity[{pattern!r}]" if pattern else "sparsity"
                raise ValueError(f"{argument} must be at least {granularity.least:g} for {granularity}, got {level}")
        if self.threshold is not None and granularity.even:
            raise ValueError(
                f"threshold must be None for {granularity}, which compares within groups, got {self.threshold}"
            )
        if self.of != "units":
            check_measure(self.of, granularity)
        room = round((1.0 - self.final) / 2, 6) if self.is_single else 0.0
        return replace(self, default_density=min(granularity.default_min_density, room))

    def find(
        self, model: nn.Module, targets: Sequence[str] = (), ignore: Sequence[str] = (), later: bool = False
    ) -> list[Target]:
        """Return the parameters to prune; with a sparsity per layer, those that one of its patterns matches.

        Args:
            model: The model.
            targets: Globs (or "re:" and a regular expression) on parameter names.
            ignore: Names to leave out.
            later: Whether frozen parameters may be trained later on, so that it is no error if there are no others.

        Raises:
            ValueError: If a pattern matches nothing, or nothing is left to prune.
        """
        if not isinstance(self.sparsity, Mapping):
            return find(model, targets, ignore, later=later)
        try:
            found = find(model, targets or tuple(self.sparsity), ignore, later=later)
        except ValueError as error:
            given, told = "targets" if targets else "sparsity", str(error).replace("targets must", "each must")
            raise ValueError(f"{given} must hold patterns of what is to be pruned: {told}") from error
        decided = decided_by(self.sparsity, found) if found else {}
        return [target for target in found if target.name in decided]

    def round(self, done: float) -> tuple["SparsityTarget", float]:
        """Return the target when a fraction of the rounds is done, and which fraction of it is due.

        Each round keeps the same part of what is left; of a threshold, rounds prune more and more units below it.

        >>> SparsityTarget(0.75).round(0.5)
        (SparsityTarget(sparsity=0.5, threshold=None, min_density=None, of='units', default_density=0.0), 1.0)
        """
        if done == 1.0:
            return self, 1.0
        if self.sparsity is None:
            return self, schedules.exponential(done)
        if isinstance(self.sparsity, Mapping):
            left = {pattern: schedules.after(done, fraction) for pattern, fraction in self.sparsity.items()}
            return replace(self, sparsity=left), 1.0
        return replace(self, sparsity=schedules.after(done, self.sparsity)), 1.0

    def budget(
        self,
        granularity: Granularity,
        units: Sequence[Units],
        model: nn.Module,
        inputs: Inputs,
        distributed: bool = False,
        table: LatencyTable | None = None,
    ) -> Budget | None:
        """Return what it is counted in; None where it is a count of units that a scope can share out exactly.

        Of the latency it is counted in a table, or else in what is measured now.

        Raises:
            ValueError: If the units cannot reach it.
        """
        if not self.is_single or (self.of == "units" and granularity.round_to == 1):
            return None
        given = (units, granularity, model, inputs, distributed)
        measured = latency_table(*given) if table is None and self.of == "latency" else table
        free = make_budget(self.of if measured is None else measured, units, model, inputs, distributed)
        return free.reaching(self.final, self.floor, self.min_density, measure_name(self.of), granularity)

    def allocate(
        self,
        scores: Scores,
        found: Sequence[Target],
        criterion: Criterion,
        scope: Scope,
        due: float = 1.0,
        budget: Budget | None = None,
    ) -> Mapping[str, int]:
        """Return how many units each target keeps when this fraction of the target is due.

        Args:
            scores: Those of all units.
            found: The targets.
            criterion: Says what a threshold means.
            scope: Shares the sparsity out.
            due: The fraction, 0 to 1.
            budget: What the sparsity is a fraction of, where that is not the number of units.
        """
        if self.threshold is not None:
            return scopes.below(scores, criterion.level(self.threshold), due)
        if isinstance(self.sparsity, Mapping):
            return scopes.per_layer(scores, decided_by(self.sparsity, found), due)
        amount = self.final * due
        if budget is not None:
            return budget.keep(scores, scope, amount)
        if self.floor:
            return scopes.at_least(scores, amount, scope, self.floor, strict=self.min_density is not None)
        return scope(scores, amount)

    def by_target(self, found: Sequence[Target]) -> dict[str, float]:
        """Return the sparsity of each target by name, where they have one each; else nothing."""
        return decided_by(self.sparsity, found) if found and isinstance(self.sparsity, Mapping) else {}

    def of_all(self, found: Sequence[Target], without: Collection[str] = ()) -> float:
        """Return the sparsity of all targets together that masks reach in the end; 1 for a threshold.

        Args:
            found: The targets.
            without: The names of those that are left out.

        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
        >>> target = SparsityTarget({"0.*": 0.75, "1.*": 0.25})
        >>> target.of_all(target.find(model))
        0.5
        """
        levels = self.by_target(found)
        if not levels:
            return self.final
        sizes = {target.name: target.parameter.numel() for target in found if target.name not in without}
        return sum(levels[name] * size for name, size in sizes.items()) / max(1, sum(sizes.values()))

    @property
    def label(self) -> str:
        """What the number of an update means: the sparsity, or how much of what is below a threshold is pruned."""
        return "sparsity" if self.threshold is None else "part of what is below the threshold"

    def __str__(self) -> str:
        """Return it in words."""
        if self.threshold is not None:
            return f"threshold {self.threshold}"
        of = "" if self.of == "units" else f" of the {measure_name(self.of)}"
        if isinstance(self.sparsity, Mapping):
            return "sparsity " + ", ".join(f"{part} of {pattern!r}" for pattern, part in self.sparsity.items())
        return f"sparsity {self.sparsity}{of}"
