"""The base of all criteria: how much each unit matters. The units with the lowest scores are pruned first."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_prune.tensors.distributed import Operation
from lightning_prune.units.units import Units

OverRanks = Callable[[Tensor, Operation], Tensor]
Loss = Callable[[nn.Module, Any], Tensor]

_STEPS = 16


_FORMER_NAMES = {  # of what a subclass may define, by the name of now
    "elementwise": "entrywise",
    "finalize": "conclude",
    "empty_state": "nothing",
    "merge_states": "merge",
}


class Criterion:
    """A score for every unit; a subclass with the one method ``scores`` is a new criterion.

    A criterion has no state: what it observes is kept in ``units.statistic``.

    Attributes:
        needs: What it observes during ``window`` optimizer steps before an update: nothing beyond the "weights", the
            "gradients" (``observe`` is called once a step), or the activations of "forwards" (``observe`` is called
            once for each forward pass of the modules in ``watched``: by default, those that own the weight).
        window: How many optimizer steps it observes, or batches in ``prune``; None is 16 steps, and all batches.
        elementwise: Whether the score of a single weight depends on that weight and its element of the statistic only.
            Of large models, ``scores`` is then called for a part of a weight at a time. A subclass that defines
            ``scores`` has to say so itself.
        accumulates: Whether what it observes adds up from ``window`` steps before the first update until the last one,
            instead of starting from nothing after each; for gradients.
        batch_statistics: Whether batch norms normalise by the batch while ``prune`` observes: for networks at
            initialisation, whose running statistics say nothing yet.
        by_channel: Whether it scores output channels, whatever the unit.
        by_row: Whether weights are compared with those of their output channel only; larger units never are.

    >>> class Squared(Criterion):
    ...     def scores(self, units):
    ...         return units.mean(torch.square)
    """

    needs: ClassVar[Literal["weights", "gradients", "forwards"]] = "weights"
    elementwise: ClassVar[bool] = False
    window: int | None = 0
    accumulates: ClassVar[bool] = False
    batch_statistics: ClassVar[bool] = False
    by_channel: ClassVar[bool] = False
    by_row: bool = False

    def __init_subclass__(cls) -> None:
        """Reset ``elementwise`` where ``scores`` is overridden, and accept the names of version 0.1."""
        super().__init_subclass__()
        own = vars(cls)
        for name, former in _FORMER_NAMES.items():
            if former in own and name not in own:
                setattr(cls, name, own[former])
        if "scores" in own:
            cls.elementwise = own.get("elementwise", False)

    @property
    def steps(self) -> int:
        """How many optimizer steps it observes."""
        return _STEPS if self.window is None else self.window

    @property
    def what_it_sees(self) -> str:
        """What it observes of a unit, in words."""
        return "gradient" if self.needs == "gradients" else "forward pass"

    def cannot_score(self, units: Units) -> str | None:
        """Return why it can never score these units, if that is known before the first step; None otherwise."""
        return None

    def scores(self, units: Units) -> Tensor:
        """Return a finite score for each unit: ``units.sum`` and ``units.mean`` pool values of single weights.

        It is called once an update for each target of a model with up to 262,144 units, and several times in larger
        models, whose scores are not kept in memory: it has to return the same each time.
        """
        raise NotImplementedError

    def watched(self, units: Units) -> Sequence[nn.Module]:
        """Return the modules whose forward passes it observes: by default, those that own the weight."""
        return units.modules

    def observe(self, units: Units, inputs: tuple[Any, ...] = (), output: Any = None) -> Tensor:
        """Return the new ``units.statistic``; inputs and output are those of the module, for forward passes."""
        raise NotImplementedError

    def backward(self, model: nn.Module, batch: Any, loss: Loss) -> None:
        """Fill the gradients to observe: those of the loss.

        A criterion that overrides this or ``passes`` needs passes of its own, which no training step makes: use it with
        ``prune`` or ``PruningAtInit``.
        """
        loss(model, batch).backward()

    @torch.enable_grad()
    def passes(
        self, model: nn.Module, batches: Iterable[Any], loss: Loss, average: Callable[[nn.Module], None]
    ) -> Iterator[None]:
        """Fill the gradients to observe, for one batch after another; ``average`` averages them over ranks."""
        for batch in batches:
            model.zero_grad(set_to_none=True)
            self.backward(model, batch, loss)
            average(model)
            yield

    def finalize(self, units: Units, over_ranks: OverRanks) -> Tensor:
        """Return the statistic at the end of the window, over what all ranks have observed.

        ``over_ranks(values, "sum" | "min" | "max")`` reduces a tensor over the ranks; gradients are reduced already.
        """
        seen = self.empty_state(units) if units.statistic is None else units.statistic
        return over_ranks(seen, "sum") if self.needs == "forwards" else seen

    def empty_state(self, units: Units) -> Tensor:
        """Return the statistic of a rank that has observed no forward pass while others have."""
        raise NotImplementedError

    def merge_states(self, units: Units, statistics: list[Tensor]) -> Tensor:
        """Merge the statistics of several ranks, for a run that is resumed on fewer."""
        return torch.stack(statistics).sum(0)

    def level(self, threshold: float) -> float:
        """Return the score below which a unit is pruned, for a threshold in the units of the criterion."""
        return threshold
