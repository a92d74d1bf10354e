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


class Criterion:
    """A score for every unit; a subclass with the one method ``scores`` is a new criterion.

    A criterion holds no state: what it observes is kept as ``units.statistic`` by whoever drives it.

    Attributes:
        needs: What it observes during ``window`` optimizer steps before an update: nothing beyond the weights, the
            gradients (``observe`` is called once a step), or forward passes (once a forward of what it has ``watched``,
            the weight's module).
        window: How many optimizer steps it observes, or batches in ``prune``; None is 16 steps, and all batches.
        elementwise: Whether the score of a single weight follows from that weight and its entry of the statistic, so
            that ``scores`` may be asked for a piece of them at a time.
        accumulates: Whether what it observes adds up from ``window`` steps before the first update to the last one, and
            does not begin anew after each; for gradients.
        batch_statistics: Whether batch norms normalise by the batch where ``prune`` observes: for networks at their
            initialisation, of which running statistics say nothing.
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
        """Let a subclass with scores of its own say anew whether they are elementwise."""
        super().__init_subclass__()
        if "scores" in vars(cls):
            own = vars(cls)
            cls.elementwise = own.get("elementwise", own.get("entrywise", False))

    @property
    def steps(self) -> int:
        """How many optimizer steps it observes."""
        return _STEPS if self.window is None else self.window

    @property
    def what_it_sees(self) -> str:
        """What it observes of a unit, in words."""
        return "gradient" if self.needs == "gradients" else "forward pass"

    def cannot_score(self, units: Units) -> str | None:
        """Return why it never can score these units, as known before the first step; None if it may be able to."""
        return None

    def scores(self, units: Units) -> Tensor:
        """Return a finite score for each unit: ``units.sum`` and ``units.mean`` pool values of single weights."""
        raise NotImplementedError

    def watched(self, units: Units) -> Sequence[nn.Module]:
        """Return the modules whose forward passes it observes: those that the weight belongs to."""
        return units.modules

    def observe(self, units: Units, inputs: tuple[Any, ...] = (), output: Any = None) -> Tensor:
        """Return the new ``units.statistic``; inputs and output are those of the module, for forward passes."""
        raise NotImplementedError

    def backward(self, model: nn.Module, batch: Any, loss: Loss) -> None:
        """Fill the gradients that are to be observed: those of the loss.

        A criterion that overrides this, or ``passes``, needs passes of its own, which no training step makes: it is for
        ``prune`` and ``PruningAtInit``.
        """
        loss(model, batch).backward()

    @torch.enable_grad()
    def passes(
        self, model: nn.Module, batches: Iterable[Any], loss: Loss, average: Callable[[nn.Module], None]
    ) -> Iterator[None]:
        """Fill the gradients that are to be observed, for one batch after another; ``average`` does so over ranks."""
        for batch in batches:
            model.zero_grad(set_to_none=True)
            self.backward(model, batch, loss)
            average(model)
            yield

    def conclude(self, units: Units, over_ranks: OverRanks) -> Tensor:
        """Return the statistic at the end of the window, over what all ranks have seen of their batches.

        ``over_ranks(values, "sum" | "min" | "max")`` reduces a tensor over the ranks; gradients are reduced already.
        """
        seen = self.nothing(units) if units.statistic is None else units.statistic
        return over_ranks(seen, "sum") if self.needs == "forwards" else seen

    def nothing(self, units: Units) -> Tensor:
        """Return the statistic of a rank that has seen no forward pass where others have."""
        raise NotImplementedError

    def merge(self, units: Units, statistics: list[Tensor]) -> Tensor:
        """Return one statistic for those of several ranks, of which fewer go on after a checkpoint."""
        return torch.stack(statistics).sum(0)

    def level(self, threshold: float) -> float:
        """Return the score below which a unit is pruned, for a threshold in the unit of measure of the criterion."""
        return threshold
