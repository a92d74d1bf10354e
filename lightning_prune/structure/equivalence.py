"""The equivalence check: whether the outputs of a model stay the same without some of its units, tried on a copy."""

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
    """Return the names of the groups whose units can be removed, as a trial with random weights shows."""
    decisions = [(group, torch.arange(group.size) % 2 == 0) for group in groups]
    trial = hookless_copy(model)
    _randomize(trial)
    zero_units(trial, decisions)
    return {group.name for group, _ in equivalent_cuts(trial, decisions, inputs)}


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    """Give a model random weights, since zeros or ones would hide dependencies."""
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
    """Return the decisions that leave the outputs of a model as they are; the units that go must already be zero.

    All decisions are tried together first, then halves of them where the outputs differ. The model is left as it is.
    """
    precise, inputs = _precise(model, inputs)
    expected = run(precise, inputs)

    def equivalent(part: Sequence[Decision]) -> bool:
        trial = copied(precise)
        try:
            cut(trial, kept_by(trial, part))
            return difference(expected, run(trial, inputs)) <= TOLERANCE
        except Exception:  # the user's forward may rely on its sizes
            return False

    found = _bisect(list(decisions), equivalent)
    if len(found) < len(decisions) and not equivalent(found):  # decisions that are safe alone may not be so together
        together: list[Decision] = []
        for decision in found:
            together = [*together, decision] if equivalent([*together, decision]) else together
        return together
    return found


def _bisect(part: list[Decision], equivalent: Callable[[Sequence[Decision]], bool]) -> list[Decision]:
    if not part or equivalent(part):
        return part
    middle = len(part) // 2
    return _bisect(part[:middle], equivalent) + _bisect(part[middle:], equivalent) if middle else []


def _precise(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """Return a copy of the model and the inputs in double precision, or in their own if it does not run in that."""
    copy, device = hookless_copy(model), device_of(model)
    try:
        wide = convert(inputs, device, torch.float64)
        run(copy.double(), wide)
    except Exception:  # the user's forward may need its own dtype
        return hookless_copy(model), inputs
    return copy, wide
