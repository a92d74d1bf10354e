"""Statistics: what a criterion observes of the training that is under way, without side effects."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.criteria import Criterion
from lightning_prune.models.layer_kinds import STACKED
from lightning_prune.models.preserving import eager
from lightning_prune.tensors.distributed import Operation, gather, local, over_ranks
from lightning_prune.units.units import Units
from lightning_prune.updates.decision import check_channels
from lightning_prune.updates.gradients import all_finite, dense_gradients, gradients_of


def always() -> bool:
    """Return True: every forward pass counts."""
    return True


def _alone(values: Tensor, operation: Operation) -> Tensor:
    return values


def scorable(
    units: Sequence[Units], criterion: Criterion, unseen: Collection[str] = ()
) -> tuple[list[Units], dict[str, str]]:
    """Return the units that a criterion can score, and the reason for every other target.

    Args:
        units: The targets.
        criterion: Scores them.
        unseen: The names of those that it has not observed in training.

    Raises:
        ValueError: If it can score none of them.
    """
    name = type(criterion).__name__
    seen = f"{name} has seen no {criterion.what_it_sees} of it"
    reasons = {unit.name: seen if unit.name in unseen else criterion.cannot_score(unit) for unit in units}
    if criterion.by_channel:
        reasons.update({unit.name: STACKED for unit in units if unit.stacked})
    left_out = {target: why for target, why in reasons.items() if why is not None}
    left = [unit for unit in units if unit.name not in left_out]
    if units and not left:
        why = "; ".join(f"{target}: {reason}" for target, reason in left_out.items())
        raise ValueError(f"criterion must be able to score a target, got {criterion} ({why})")
    return left, left_out


class Observation:
    """What one criterion has observed of its units since the last update.

    Args:
        criterion: Says what it needs and turns it into statistics.
        units: The targets; their ``statistic`` and ``steps`` are filled.
        active: Whether a forward pass counts at this moment (training does, validation does not).
        distributed: Whether other ranks see other batches, so that what forward passes show has to be merged.

    Raises:
        ValueError: If the criterion scores output channels, and the units are not parts of these.

    Attributes:
        steps: Number of optimizer steps seen.
    """

    def __init__(
        self,
        criterion: Criterion,
        units: Sequence[Units],
        active: Callable[[], bool] = always,
        distributed: bool = False,
    ) -> None:
        check_channels(units, criterion)
        self.criterion = criterion
        self.units = list(units)
        self.active = active
        self.distributed = distributed and criterion.needs == "forwards"  # gradients are reduced already
        self.steps = 0
        self._handles: list[RemovableHandle] = []
        self._seen: set[str] = set()
        self._eager = ExitStack()

    @property
    def needed(self) -> bool:
        """Whether the criterion observes anything at all."""
        return self.criterion.needs != "weights"

    @property
    def full(self) -> bool:
        """Whether the window is full, so that an update may use the statistics."""
        return not self.needed or self.steps >= self.criterion.steps

    def open(self) -> None:
        """Start observing forward passes, if the criterion needs them; idempotent."""
        if self.criterion.needs != "forwards" or self._handles:
            return
        for unit in self.units:
            for module in dict.fromkeys(self.criterion.watched(unit)):
                self._handles.append(module.register_forward_hook(_Watch(self, unit)))
        self._eager.enter_context(eager())  # compiled code does not see hooks that came after it

    def close(self) -> None:
        """Stop observing; the statistics stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._eager.close()

    @torch.no_grad()
    def gradients(self, parameters: Collection[int], grad_scale: float = 1.0, check: bool = False) -> None:
        """Observe the gradients of these parameters (by id), once between two calls of ``step``.

        Args:
            parameters: Ids of the parameters that are about to be stepped.
            grad_scale: What their gradients are multiplied by.
            check: Whether to skip gradients that are not finite while the weights are: a gradient scaler skips the
                step, or the module zeroes them.
        """
        if self.criterion.needs != "gradients":
            return
        mine = [u for u in self.units if id(u.parameter) in parameters and u.name not in self._seen]
        mine = [u for u in mine if u.parameter.grad is not None]
        with dense_gradients(mine):
            if (
                check
                and not all_finite(mine, gradients_of(mine))
                and all_finite(mine, (local(u.parameter) for u in mine))
            ):
                return
            for unit in mine:
                self._seen.add(unit.name)
                unit.grad_scale = grad_scale
                unit.statistic = self.criterion.observe(unit)

    @torch.no_grad()
    def forward(self, unit: Units, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Observe one forward pass of a module of the unit, unless it is a recomputation inside a backward pass."""
        if self.active() and torch._C._current_graph_task_id() == -1:
            self._seen.add(unit.name)
            unit.module = module
            unit.statistic = self.criterion.observe(unit, inputs, output)

    def step(self) -> None:
        """Count one optimizer step, if anything was observed in it."""
        # where a layer does not run on every rank, all ranks count the step that some have observed
        if self._seen or (self.distributed and self._handles):
            self.steps += 1
            self._seen.clear()
            for unit in self.units:
                unit.steps = self.steps

    def finish(self) -> None:
        """Finalize the window: the statistics become those of all ranks together.

        Raises:
            ValueError: If nothing was observed of a unit.
        """
        if not self.needed:
            return
        for unit in self._unseen():
            raise ValueError(
                f"{type(self.criterion).__name__} needs a {self.criterion.what_it_sees} of {unit.name!r}, got none in "
                f"{self.steps} steps: ignore the parameter, or use a criterion that needs less"
            )
        for unit in self.units:
            unit.statistic = self.criterion.finalize(unit, over_ranks if self.distributed else _alone)

    def _unseen(self) -> list[Units]:
        seen = torch.tensor([int(unit.statistic is not None) for unit in self.units])
        ranks = (over_ranks(seen, "sum") if self.distributed else seen).tolist()
        return [unit for unit, number in zip(self.units, ranks, strict=True) if not number]

    def leave_out_unseen(self) -> list[str]:
        """Drop the units of which nothing was observed, unless these are all, and return their names."""
        unseen = self._unseen() if self.needed else []
        if len(unseen) == len(self.units):
            return []
        self.units = [unit for unit in self.units if unit not in unseen]
        return [unit.name for unit in unseen]

    def reset(self) -> None:
        """Reset the statistics: an update has used them."""
        self.close()
        self.steps = 0
        self._seen.clear()
        for unit in self.units:
            unit.statistic, unit.steps = None, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics as plain tensors, one per rank if their batches differ; all ranks must call it."""
        found = {unit.name: self._saved(unit) for unit in self.units}
        return {
            "steps": self.steps,
            "seen": sorted(self._seen),
            "statistics": {name: parts for name, parts in found.items() if any(p is not None for p in parts)},
        }

    def _saved(self, unit: Units) -> list[Tensor | None]:
        if self.distributed:
            return gather(unit.statistic)
        return [None if unit.statistic is None else unit.full(unit.statistic).to("cpu", copy=True)]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the statistics of a run that is resumed; if it had more ranks, these share them out."""
        self.steps, self._seen = int(state["steps"]), set(state["seen"])
        ranks, rank = (torch.distributed.get_world_size(), torch.distributed.get_rank()) if self.distributed else (1, 0)
        for unit in self.units:
            parts = [part for part in state["statistics"].get(unit.name, [])[rank::ranks] if part is not None]
            found = self.criterion.merge_states(unit, parts) if len(parts) > 1 else parts[0] if parts else None
            found = found if found is None or self.distributed else unit.local(found)
            unit.statistic = None if found is None else found.to(unit.parameter.device, copy=True)
            unit.steps = self.steps


class _Watch:
    """The forward hook of one unit; in a copy of the module it does nothing."""

    def __init__(self, observation: Observation | None = None, unit: Units | None = None) -> None:
        self.observation = observation
        self.unit = unit

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self.observation is not None and self.unit is not None:
            self.observation.forward(self.unit, module, inputs, output)

    def __reduce__(self) -> tuple[type["_Watch"], tuple[()]]:
        return _Watch, ()
