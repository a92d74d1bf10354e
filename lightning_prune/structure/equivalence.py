"""The equivalence check: whether the outputs of a model stay the same without some of its units, tried on a copy."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_prune.models.copying import copied, hookless_copy
from lightning_prune.models.forward import Inputs, convert, device_of, difference, run
from lightning_prune.models.kept_norms import follow_masks
from lightning_prune.structure.cut_record import CutRecord
from lightning_prune.structure.groups import Group
from lightning_prune.structure.surgery import Decision, Order, cut, kept_by, reorder, zero_units

Part = TypeVar("Part")
TOLERANCE = 1e-5


def removable_groups(model: nn.Module, groups: Sequence[Group], inputs: Inputs) -> set[str]:
    """Return the names of the groups whose units can be removed, as a trial with random weights shows."""
    compared = [group for group in groups if group.compared_by]
    running = bisect(compared, lambda some: _runs(model, some, inputs))
    if len(running) < len(compared):
        run(hookless_copy(model), inputs)  # what fails here is no fault of a group
        groups = [group for group in groups if group in running or not group.compared_by]
    decisions = [(group, _half(group)) for group in groups]
    trial = hookless_copy(model)
    _randomize(trial)
    zero_units(trial, decisions)
    places = kept_by(trial, decisions).places
    follow_masks(trial, {name: places[name, 0] for group, _ in decisions for name in group.compared_by})
    return {group.name for group, _ in equivalent_cuts(trial, decisions, inputs)}


def _runs(model: nn.Module, groups: Sequence[Group], inputs: Inputs) -> bool:
    """Return whether a model runs while norms or routers see half of the units of groups."""
    trial = hookless_copy(model)
    places = kept_by(trial, [(group, _half(group)) for group in groups]).places
    try:
        follow_masks(trial, {name: places[name, 0] for group in groups for name in group.compared_by})
        run(trial, inputs)
    except Exception:  # the user's forward may rely on its sizes
        return False
    return True


def _half(group: Group) -> Tensor:
    """Return a decision that keeps every other unit of each part, or as many as have to stay."""
    places = torch.arange(group.size) % (group.size // group.parts)  # in its part
    return (places % 2 == 0) | (places < -(-group.least // group.parts))


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
    return _equivalent(model, decisions, inputs, lambda trial, part: cut(trial, kept_by(trial, part)))


def equivalent_removals(model: nn.Module, blocks: Sequence[str], inputs: Inputs) -> list[str]:
    """Return the blocks, by name, without which the outputs of a model are as they are; likewise."""
    return _equivalent(model, blocks, inputs, lambda trial, part: cut(trial, CutRecord(removed=tuple(part))))


def equivalent_orders(model: nn.Module, orders: Sequence[Order], inputs: Inputs) -> list[Order]:
    """Return the orders of units that leave the outputs of a model as they are; likewise."""
    return _equivalent(model, orders, inputs, reorder)


def _equivalent(
    model: nn.Module,
    parts: Sequence[Part],
    inputs: Inputs,
    change: Callable[[nn.Module, Sequence[Part]], None],
) -> list[Part]:
    """Return the parts of a change that leave the outputs of a model as they are."""
    exact, inputs = precise(model, inputs)
    expected = run(exact, inputs)

    def equivalent(some: Sequence[Part]) -> bool:
        trial = copied(exact)
        try:
            change(trial, some)
            return difference(expected, run(trial, inputs)) <= TOLERANCE
        except Exception:  # the user's forward may rely on its sizes
            return False

    found = bisect(list(parts), equivalent)
    if len(found) < len(parts) and not equivalent(found):  # what is safe alone may not be so together
        together: list[Part] = []
        for part in found:
            together = [*together, part] if equivalent([*together, part]) else together
        return together
    return found


def bisect(parts: list[Part], holds: Callable[[Sequence[Part]], bool]) -> list[Part]:
    """Return the parts of which something holds, tried for all together first, then for halves.

    >>> bisect([2, 4, 5, 6], lambda numbers: all(number % 2 == 0 for number in numbers))
    [2, 4, 6]
    """
    if not parts or holds(parts):
        return parts
    middle = len(parts) // 2
    return bisect(parts[:middle], holds) + bisect(parts[middle:], holds) if middle else []


def precise(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """Return a copy of the model and the inputs in double precision, or in their own if it does not run in that."""
    copy, device = hookless_copy(model), device_of(model)
    try:
        wide = convert(inputs, device, torch.float64)
        run(copy.double(), wide)
    except Exception:  # the user's forward may need its own dtype
        return hookless_copy(model), inputs
    return copy, wide
