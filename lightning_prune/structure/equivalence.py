"""Proof: a trial on a copy of a model shows whether its outputs stay the same without some of its units."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_prune.models.copying import copied, hookless_copy
from lightning_prune.models.forward import Inputs, convert, device_of, difference, run
from lightning_prune.structure.groups import Group
from lightning_prune.structure.surgery import Decision, cut, kept_by, zero_units

Model = TypeVar("Model", bound=nn.Module)
TOLERANCE = 1e-5


def removable_groups(model: nn.Module, groups: Sequence[Group], inputs: Inputs) -> set[str]:
    """Return the names of the groups of which units can be removed, as a trial with random weights shows."""
    decisions = [(group, torch.arange(group.size) % 2 == 0) for group in groups]
    trial = hookless_copy(model)
    _randomize(trial)
    zero_units(trial, decisions)
    return {group.name for group, _ in equivalent_cuts(trial, decisions, inputs)}


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    """Give a model weights of no special value: zeros or ones would hide what depends on what."""
    generator = torch.Generator().manual_seed(0)

    def draw(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    for parameter in model.parameters():
        bound = (3.0 * len(parameter) / parameter.numel()) ** 0.5 if parameter.ndim > 1 else 0.0
        draw(parameter, -bound, bound) if bound else draw(parameter, 0.5, 1.5)
    for module in model.modules():
        statistics: Any = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        for statistic in statistics:
            if isinstance(statistic, Tensor):
                draw(statistic, 0.5, 1.5)


def equivalent_cuts(model: nn.Module, decisions: Sequence[Decision], inputs: Inputs) -> list[Decision]:
    """Return the decisions after which a model, whose units that are not kept are zero, puts out what it did before.

    All of them are tried together first, and halves of them where they do not agree. The model is left as it is.
    """
    precise, inputs = _precise(model, inputs)
    expected = run(precise, inputs)

    def agree(part: Sequence[Decision]) -> bool:
        trial = copied(precise)
        try:
            cut(trial, kept_by(trial, part))
            return difference(expected, run(trial, inputs)) <= TOLERANCE
        except Exception:  # the forward of the user, which may well insist on its sizes
            return False

    found = _search(list(decisions), agree)
    if len(found) < len(decisions) and not agree(found):  # what agrees alone may not agree together
        together: list[Decision] = []
        for decision in found:
            together = [*together, decision] if agree([*together, decision]) else together
        return together
    return found


def _search(part: list[Decision], agree: Callable[[Sequence[Decision]], bool]) -> list[Decision]:
    if not part or agree(part):
        return part
    middle = len(part) // 2
    return _search(part[:middle], agree) + _search(part[middle:], agree) if middle else []


def _precise(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """Return a copy of the model and inputs in double precision, if it runs in that."""
    copy, device = hookless_copy(model), device_of(model)
    try:
        wide = convert(inputs, device, torch.float64)
        run(copy.double(), wide)
    except Exception:  # a forward with a type of its own
        return hookless_copy(model), inputs
    return copy, wide
