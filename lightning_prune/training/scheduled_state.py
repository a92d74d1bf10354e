"""Scheduled state: what a callback whose masks follow a plan knows of its run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from lightning_prune.criteria import Criterion
from lightning_prune.granularities import Granularity
from lightning_prune.models.forward import Inputs
from lightning_prune.models.parameters import Target
from lightning_prune.training.state import TRANSIENT, RunState, saved
from lightning_prune.units.units import Units
from lightning_prune.updates.budget import Budget
from lightning_prune.updates.latency import TABLE, LatencyTable
from lightning_prune.updates.output_neurons import without_outputs
from lightning_prune.updates.statistics import Observation, always, scorable
from lightning_prune.validation.states import IN_ORDER, TENSOR, TEXT, every, items, optional, record, row, table, whole

_STATISTICS = record(steps=whole(), seen=items(TEXT), statistics=table(items(optional(TENSOR))))


def _observed(state: "ScheduledState") -> dict[str, Any]:
    """Return the statistics to save; all ranks must call it."""
    if state.observed is not None:
        return state.observed
    return {"steps": 0, "seen": [], "statistics": {}} if state.observation is None else state.observation.state_dict()


def _observed_alone(state: "ScheduledState") -> dict[str, Any] | None:
    # a copy may be made on one rank alone, which cannot ask the others
    return state.observed if torch.distributed.is_initialized() else _observed(state)


@dataclass(eq=False)
class ScheduledState(RunState):
    """What a callback whose masks follow a plan knows of its run.

    Attributes:
        applied: Position of the last update; -1 before the first.
        window: First and last position, resolved once: a longer resumed run must not move them.
        unseen: Names of targets that were left out since the criterion saw nothing of them.
        observed: Restored statistics, until there are units for them.
        latency: What the layers took when it was measured, of a sparsity that is a fraction of that.
        updates: The planned updates, as (position, amount).
        replanned: Whether a resumed run has other arguments than it had, and so another plan.
        outputs_too: Whether neurons that are outputs of the model are pruned like others, as in earlier versions.
        outputs_known: Whether it is known which neurons are outputs of the model, as far as that matters.
        scarce: Targets of which a warning has said how few units are left.
        parameters: Of all parameters of the model, when targets were last looked up, what decides over that.
        targets: The targets that were found last.
        units: Their units.
        inputs: Example inputs of the model, where they are needed.
        waits: Whether units or a budget need example inputs that are still to come, with the first batch.
        budget: What the sparsity is counted in, where that is not single units.
        observation: What the criterion has seen of the units.
        outcome: What was planned, and what was cut when training ended, as text.
    """

    applied: int = field(default=-1, metadata=saved(whole(-1)))
    window: tuple[int, int] | None = field(
        default=None,
        metadata=saved(
            optional(every(row(whole(), whole()), IN_ORDER)),
            save=lambda state: state.window and list(state.window),
            load=lambda window: window and tuple(window),
        ),
    )
    unseen: list[str] = field(
        default_factory=list, metadata=saved(items(TEXT), save=lambda state: list(state.unseen), load=list, absent=())
    )
    observed: dict[str, Any] | None = field(
        default=None, metadata=saved(_STATISTICS, save=_observed, copied=_observed_alone)
    )
    latency: LatencyTable | None = field(
        default=None,
        metadata=saved(
            optional(TABLE),
            save=lambda state: state.latency and state.latency.to_dict(),
            load=lambda values: values and LatencyTable.from_dict(values),
            absent=None,
        ),
    )
    updates: list[tuple[int, float]] = field(default_factory=list)
    replanned: bool = field(default=False, metadata=TRANSIENT)
    outputs_too: bool = False
    outputs_known: bool = True
    scarce: dict[str, int] = field(default_factory=dict)
    parameters: list[tuple[int, bool, bool]] = field(default_factory=list, metadata=TRANSIENT)
    targets: list[Target] = field(default_factory=list, metadata=TRANSIENT)
    units: list[Units] = field(default_factory=list, metadata=TRANSIENT)
    inputs: Inputs = field(default=None, metadata=TRANSIENT)
    waits: bool = field(default=False, metadata=TRANSIENT)
    budget: Budget | None = field(default=None, metadata=TRANSIENT)
    observation: Observation | None = field(default=None, metadata=TRANSIENT)
    outcome: str = ""

    def take_up(
        self,
        found: list[Target],
        model: nn.Module,
        criterion: Criterion,
        granularity: Granularity,
        distributed: bool,
        named: bool = True,
    ) -> dict[str, str]:
        """Take up these targets, with an observation of their units, and return why some of them are left out.

        Args:
            found: The targets.
            model: The model that they are of.
            criterion: Scores their units.
            granularity: Says what a unit is.
            distributed: Whether other ranks do the same.
            named: Whether the user has named them, so that neurons that are outputs of the model are not left out.
        """
        active = always
        if self.observation is not None:
            self.observation.close()
            active = self.observation.active
        units, without = granularity.find_units(found, model, self.inputs, distributed) if found else ([], {})
        outputs, self.outputs_known = dict[str, str](), True
        if not named and not self.outputs_too:
            units, outputs, self.outputs_known = without_outputs(units, model, granularity)
        self.units, unscored = scorable(units, criterion, self.unseen)
        self.targets = found
        self.observation = Observation(criterion, self.units, active, distributed)
        if self.observed is not None:
            self.observation.load_state_dict(self.observed)
            self.observed = None
        return {**without, **outputs, **unscored}

    @override
    def release(self) -> None:
        if self.observation is not None:
            self.observation.close()

    @classmethod
    @override
    def check(cls, owner: str, values: Mapping[str, Any]) -> None:
        super().check(owner, values)
        last = cls.last_position(values)
        if values["applied"] > last:
            raise ValueError(
                f"the state of {owner} must have the position of an update in 'applied', at most {last} according to "
                f"'window' and 'planned', got {values['applied']}"
            )

    @classmethod
    def last_position(cls, values: Mapping[str, Any]) -> int:
        """Return the position of the last update that saved values allow."""
        return max([-1, *map(int, values["window"] or ())])
