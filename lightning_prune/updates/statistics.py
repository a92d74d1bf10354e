"""Observation: gathers the statistics of a criterion from the training that is under way, and disturbs nothing."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.criteria import Criterion
from lightning_prune.models.preserving import eager
from lightning_prune.tensors.distributed import Operation, gather, is_sharded, local, over_ranks
from lightning_prune.units.units import Units
from lightning_prune.updates.decision import check_channels


def always() -> bool:
    """Return True: every forward pass counts."""
    return True


def _alone(values: Tensor, operation: Operation) -> Tensor:
    return values


def _finite(units: Sequence[Units], values: Iterable[Tensor]) -> bool:
    """Return whether all values of these units are finite, on all ranks that hold pieces of them."""
    bad = torch.tensor(sum(not all(end.isfinite() for end in v.aminmax()) for v in values if v.numel()))
    return not (over_ranks(bad) if any(is_sharded(unit.parameter) for unit in units) else bad)


def _gradients(units: Sequence[Units]) -> Iterator[Tensor]:
    return (local(unit.parameter.grad) for unit in units if unit.parameter.grad is not None)


@contextmanager
def _dense(units: Sequence[Units]) -> Iterator[None]:
    """Give parameters dense gradients in place of sparse ones, as embeddings have, for a while."""
    sparse = {
        u.parameter: u.parameter.grad for u in units if u.parameter.grad is not None and u.parameter.grad.is_sparse
    }
    try:
        for parameter, gradient in sparse.items():
            parameter.grad = gradient.to_dense()
        yield
    finally:
        for parameter, gradient in sparse.items():
            parameter.grad = gradient


def scorable(
    units: Sequence[Units], criterion: Criterion, unseen: Collection[str] = ()
) -> tuple[list[Units], dict[str, str]]:
    """Return the units that a criterion can score, and the reason for every other target.

    Args:
        units: The targets.
        criterion: Scores them.
        unseen: The names of those of which it has seen nothing in training.

    Raises:
        ValueError: If it can score none of them.
    """
    name = type(criterion).__name__
    seen = f"{name} has seen no {criterion.what_it_sees} of it"
    reasons = {unit.name: seen if unit.name in unseen else criterion.cannot_score(unit) for unit in units}
    left_out = {target: why for target, why in reasons.items() if why is not None}
    left = [unit for unit in units if unit.name not in left_out]
    if units and not left:
        why = "; ".join(f"{target}: {reason}" for target, reason in left_out.items())
        raise ValueError(f"criterion must be able to score a target, got {criterion} ({why})")
    return left, left_out


class Observation:
    """What one criterion has seen of its units since the last update.

    Args:
        criterion: Says what it needs and turns it into statistics.
        units: The targets; their ``statistic`` and ``steps`` are filled.
        active: Whether a forward pass counts at this moment (training does, validation does not).
        several: Whether other ranks see other batches, so that what forward passes show has to be merged.

    Raises:
        ValueError: If the criterion scores output channels, and the units are no parts of these.

    Attributes:
        steps: Number of optimizer steps seen.
    """

    def __init__(
        self,
        criterion: Criterion,
        units: Sequence[Units],
        active: Callable[[], bool] = always,
        several: bool = False,
    ) -> None:
        check_channels(units, criterion)
        self.criterion = criterion
        self.units = list(units)
        self.active = active
        self.several = several and criterion.needs == "forwards"  # gradients are reduced already
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
        """Start to watch forward passes, if the criterion needs them; idempotent."""
        if self.criterion.needs != "forwards" or self._handles:
            return
        for unit in self.units:
            for module in dict.fromkeys(self.criterion.watched(unit)):
                self._handles.append(module.register_forward_hook(_Watch(self, unit)))
        self._eager.enter_context(eager())  # compiled code does not see hooks that came after it

    def close(self) -> None:
        """Stop to watch; the statistics stay."""
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
            check: Whether to leave out gradients that are not finite where the weights still are: a gradient scaler
                skips the step, and a module may zero them.
        """
        if self.criterion.needs != "gradients":
            return
        mine = [u for u in self.units if id(u.parameter) in parameters and u.name not in self._seen]
        mine = [u for u in mine if u.parameter.grad is not None]
        with _dense(mine):
            if check and not _finite(mine, _gradients(mine)) and _finite(mine, (local(u.parameter) for u in mine)):
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
        """Count one optimizer step, if anything was seen of it."""
        # where a layer is not run on every rank, all count the step that some have seen
        if self._seen or (self.several and self._handles):
            self.steps += 1
            self._seen.clear()
            for unit in self.units:
                unit.steps = self.steps

    def finish(self) -> None:
        """Conclude the window: the statistics become those of all ranks together.

        Raises:
            ValueError: If nothing was seen of a unit.
        """
        if not self.needed:
            return
        for unit in self._unseen():
            raise ValueError(
                f"{type(self.criterion).__name__} needs a {self.criterion.what_it_sees} of {unit.name!r}, got none in "
                f"{self.steps} steps: ignore the parameter, or use a criterion that needs less"
            )
        for unit in self.units:
            unit.statistic = self.criterion.conclude(unit, over_ranks if self.several else _alone)

    def _unseen(self) -> list[Units]:
        seen = torch.tensor([int(unit.statistic is not None) for unit in self.units])
        ranks = (over_ranks(seen, "sum") if self.several else seen).tolist()
        return [unit for unit, number in zip(self.units, ranks, strict=True) if not number]

    def leave_out_unseen(self) -> list[str]:
        """Observe no longer the units of which nothing was seen, unless these are all, and return their names."""
        unseen = self._unseen() if self.needed else []
        if len(unseen) == len(self.units):
            return []
        self.units = [unit for unit in self.units if unit not in unseen]
        return [unit.name for unit in unseen]

    def reset(self) -> None:
        """Forget the statistics: an update has used them."""
        self.close()
        self.steps = 0
        self._seen.clear()
        for unit in self.units:
            unit.statistic, unit.steps = None, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics as plain tensors, one a rank where these see other batches; all ranks must call it."""
        found = {unit.name: self._saved(unit) for unit in self.units}
        return {
            "steps": self.steps,
            "seen": sorted(self._seen),
            "statistics": {name: parts for name, parts in found.items() if any(p is not None for p in parts)},
        }

    def _saved(self, unit: Units) -> list[Tensor | None]:
        if self.several:
            return gather(unit.statistic)
        return [None if unit.statistic is None else unit.full(unit.statistic).to("cpu", copy=True)]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the statistics of a run that is resumed; the ranks share out those of more ranks."""
        self.steps, self._seen = int(state["steps"]), set(state["seen"])
        ranks, rank = (torch.distributed.get_world_size(), torch.distributed.get_rank()) if self.several else (1, 0)
        for unit in self.units:
            parts = [part for part in state["statistics"].get(unit.name, [])[rank::ranks] if part is not None]
            found = self.criterion.merge(unit, parts) if len(parts) > 1 else parts[0] if parts else None
            found = found if found is None or self.several else unit.local(found)
            unit.statistic = None if found is None else found.to(unit.parameter.device, copy=True)
            unit.steps = self.steps


class _Watch:
    """The forward hook of one unit; a copy of the module carries a copy that does nothing."""

    def __init__(self, observation: Observation | None = None, unit: Units | None = None) -> None:
        self.observation = observation
        self.unit = unit

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self.observation is not None and self.unit is not None:
            self.observation.forward(self.unit, module, inputs, output)

    def __reduce__(self) -> tuple[type["_Watch"], tuple[()]]:
        return _Watch, ()
