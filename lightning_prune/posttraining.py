"""Pruning without a Trainer: one call, with statistics from a data loader where the criterion needs any."""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune import goal, scopes
from lightning_prune.calling import convert, keeping_gradients, keeping_modes
from lightning_prune.criteria import Criterion, Magnitude
from lightning_prune.granularities import Granularity, Weight
from lightning_prune.masks import Masks, make_masks
from lightning_prune.observation import Observation
from lightning_prune.scopes import Scope
from lightning_prune.targets import Target
from lightning_prune.units import Units, make_units

Loss = Callable[[nn.Module, Any], Tensor]


def prune(
    model: nn.Module,
    sparsity: goal.Sparsity | None = None,
    *,
    criterion: Criterion = Magnitude(),
    granularity: Granularity = Weight(),
    scope: str | Scope = "global",
    targets: Sequence[str] = (),
    ignore: Sequence[str] = (),
    threshold: float | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> Masks:
    """Prune a model in place and return the masks; ``masks.apply(model)`` keeps the zeros while it trains on.

    Args:
        model: Any module.
        sparsity: Fraction of zeros among the targets, in [0, 1), or ``{pattern: fraction}`` per layer.
        criterion: Scores the units; the lowest go.
        granularity: Which weights form a unit.
        scope: How the sparsity is shared out over the targets: "global", "local", "erk" or a callable.
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out.
        threshold: Instead of a sparsity: prune every unit that scores below it.
        data: Batches for a criterion that observes; as many as its ``window`` are taken.
        loss: ``loss(model, batch)`` for a criterion that needs gradients. Without it a batch is (inputs, targets):
            cross-entropy for integer targets, else the mean squared error.

    Raises:
        ValueError: If an argument is out of range, a pattern matches nothing, or a score is not finite.

    >>> model = nn.Linear(10, 10)
    >>> masks = prune(model, 0.75)
    >>> int((model.weight == 0).sum())
    75
    """
    goal.check(sparsity, threshold, granularity)
    allocator = scopes.resolve(scope)
    found = goal.find_targets(model, sparsity, targets, ignore)
    if not found:
        raise ValueError(
            "the model must have a prunable parameter, got uninitialised ones only: run a batch through it"
        )
    units = observed_units(model, found, criterion, granularity, data, loss)
    allocate = goal.allocation(found, sparsity, threshold, criterion, allocator)
    masks = make_masks(units, criterion, allocate, {})
    masks.apply(model)
    return masks


def observed_units(
    model: nn.Module,
    found: Sequence[Target],
    criterion: Criterion,
    granularity: Granularity,
    data: Iterable[Any] | None,
    loss: Loss | None,
) -> list[Units]:
    """Return the units of every target, ready to be scored: the criterion has observed what it needs.

    Raises:
        ValueError: If the criterion needs data, and there are none.
    """
    units = make_units(found, model, granularity)
    observation = Observation(criterion, units)
    if observation.needed:
        _observe(model, observation, data, loss or _default_loss)
    return units


def _observe(model: nn.Module, observation: Observation, data: Iterable[Any] | None, loss: Loss) -> None:
    """Run the model in eval mode over the data and leave it as it was: mode, gradients, buffers."""
    criterion = observation.criterion
    if data is None:
        raise ValueError(f"data must be given: {type(criterion).__name__} needs {criterion.needs}, got None")
    ids = {id(unit.parameter) for unit in observation.units}
    device = next(model.parameters()).device
    drawn = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with keeping_modes(model), keeping_gradients(model):
        model.eval()
        observation.open()
        try:
            with drawn:
                for batch in islice(data, criterion.window):
                    batch = convert(batch, device)
                    if criterion.needs == "gradients":
                        model.zero_grad(set_to_none=True)
                        with torch.enable_grad():
                            loss(model, batch).backward()
                        observation.gradients(ids)
                    else:
                        with torch.no_grad():
                            model(_inputs(batch))
                    observation.step()
            observation.finish()
        finally:
            observation.close()


def _inputs(batch: Any) -> Any:
    return batch[0] if isinstance(batch, list | tuple) else batch


def _default_loss(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise ValueError(f"loss must be given where a batch is not (inputs, targets), got a {type(batch).__name__}")
    output, target = model(batch[0]), batch[1]
    return (
        nn.functional.mse_loss(output, target)
        if target.is_floating_point()
        else nn.functional.cross_entropy(output, target)
    )
