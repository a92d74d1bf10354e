"""Learned state: what ``LearnedMasks`` knows of its run, with the logits and the weights without zeros."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.methods.pattern_logits import Draw, PatternLogits, prior_logits
from lightning_prune.methods.replacing_state import ReplacingState
from lightning_prune.tensors.distributed import local
from lightning_prune.training.state import TRANSIENT, on_cpu, saved
from lightning_prune.units.weights import WeightUnits
from lightning_prune.validation.states import TENSOR, table
from lightning_prune.validation.states import whole as whole_number


@dataclass(eq=False)
class LearnedState(ReplacingState):
    """What ``LearnedMasks`` knows of its run.

    Attributes:
        logits: Of the patterns, by the name of their weight.
        dense: The weights without zeros, likewise.
        last: The step at which temperature and scale reach their last values.
        resumed: Whether the run goes on from a checkpoint.
        learned: Both with their parameter, by name.
        draw: The random numbers of the batch that is under way; None between two batches.
        soft: The names of the weights that are under soft masks at this moment.
        manual: Whether a batch may have several optimizer steps.
    """

    logits: dict[str, Tensor] = field(
        default_factory=dict, metadata=saved(table(TENSOR), save=lambda state: on_cpu(state.logits), load=dict)
    )
    dense: dict[str, Tensor] = field(
        default_factory=dict, metadata=saved(table(TENSOR), save=lambda state: on_cpu(state.dense), load=dict)
    )
    last: int = field(default=0, metadata=saved(whole_number()))
    resumed: bool = field(default=False, metadata=TRANSIENT)
    learned: dict[str, PatternLogits] = field(default_factory=dict, metadata=TRANSIENT)
    draw: Draw | None = field(default=None, metadata=TRANSIENT)
    soft: set[str] = field(default_factory=set, metadata=TRANSIENT)
    manual: bool = field(default=False, metadata=TRANSIENT)

    def learn(self, units: Sequence[WeightUnits], n: int, m: int, strength: float) -> None:
        """Take the logits of a checkpoint or of an earlier fit, or start with those of the masks."""
        for unit in units:
            if unit.name not in self.logits:
                # small steps would be lost in bfloat16
                dtype = torch.promote_types(unit.parameter.dtype, torch.float32)
                mask = self.masks[unit.name].to(unit.parameter.device)
                self.logits[unit.name] = prior_logits(mask, unit.inputs, n, m, strength, dtype)
            logits = nn.Parameter(self.logits[unit.name].detach().to(unit.parameter.device, copy=True))
            self.logits[unit.name] = logits
            dense = self.dense.get(unit.name, local(unit.parameter))
            self.learned[unit.name] = PatternLogits(unit.name, unit.parameter, unit.inputs, n, m, logits, dense)

    def begin(self) -> None:
        """Take the weights of the model as those without zeros, or go on with those of this run, masked by then."""
        for name, each in self.learned.items():
            weight, known = local(each.weight), self.dense.get(name)
            if known is not None:
                known = known.to(weight)
            if known is None or not (self.resumed or bool(((weight == known) | (weight == 0)).all())):
                known = weight.clone()
            self.dense[name] = each.dense = known

    def take_gradient(self, name: str, regularization: float) -> None:
        """Turn the gradient of a weight into that of its logits; other parameters lose theirs."""
        if name in self.learned and self.draw is not None:
            self.learned[name].take_gradient(self.draw, regularization)
        self.held[name].grad = None

    def soften(self, names: Sequence[str]) -> dict[nn.Parameter, Tensor]:
        """Put weights under soft masks, and return masks by which everything is kept."""
        if self.draw is None:
            return {}
        self.soft.update(names)
        for name in names:
            self.learned[name].soften(self.draw, self.masks[name])
        weights = [self.learned[name].weight for name in names]
        return {weight: torch.ones((), dtype=torch.bool, device=weight.device) for weight in weights}

    def harden(self, names: Sequence[str]) -> dict[nn.Parameter, Tensor]:
        """Put weights under their masks, and return these."""
        for name in names:
            self.learned[name].harden(self.masks[name])
        self.soft.difference_update(names)
        return {self.learned[name].weight: self.masks[name] for name in names}

    def drop(self, names: Sequence[str]) -> None:
        """Forget weights that the model does not have any more."""
        for name in names:
            for known in (self.logits, self.dense, self.learned):
                known.pop(name, None)

    @property
    @override
    def settled(self) -> bool:
        return not self.soft

    @override
    def release(self) -> None:
        super().release()
        self.learned = {}

    @classmethod
    @override
    def check(cls, owner: str, values: Mapping[str, Any]) -> None:
        super().check(owner, values)
        masked = values["masks"]["shapes"].keys()
        if not values["logits"].keys() == values["dense"].keys() <= masked:
            names = sorted(values["logits"])
            raise ValueError(f"the state of {owner} must have masks and weights for 'logits', got {names}")
