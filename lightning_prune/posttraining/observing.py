"""Observing over data: what a criterion needs of a model, from the batches of a loader instead of a training run."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.criteria.criterion import Criterion, Loss
from lightning_prune.granularities import Granularity
from lightning_prune.models.forward import by_keyword, example_of, feed
from lightning_prune.models.parameters import Target
from lightning_prune.posttraining.calibration import Stage, forward, stages, take, undisturbed
from lightning_prune.tensors.distributed import average_gradients
from lightning_prune.units.units import Units
from lightning_prune.updates.statistics import Observation
from lightning_prune.validation.instances import batches as iterable
from lightning_prune.validation.instances import flag, function, text
from lightning_prune.validation.values import optional, shown
from lightning_prune.validation.warning import warn


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
    check_data(criterion, data)
    units, _ = granularity.find_units(found, model, example_of(model, None))
    with undisturbed(model, criterion.batch_statistics):
        stages = stages_of(criterion, model, batches_of(criterion, data, model), loss)
        for _ in observed(units, criterion, stages):
            pass
    return units


def observed(
    units: Sequence[Units], criterion: Criterion, stages: Iterable[Stage], distributed: bool = False
) -> Iterator[Sequence[Units]]:
    """Yield the units of one stage after another, when the criterion has observed them."""
    left = list(units)
    for stage in stages:
        inside = set(stage.part.parameters())
        now = [unit for unit in left if unit.parameter in inside]
        left = [unit for unit in left if unit.parameter not in inside]
        if now:
            observe(now, criterion, stage, distributed)
            yield now


def check_data(
    criterion: Criterion,
    data: Any,
    loss: Any = None,
    sequential: Any = None,
    recalibrate: int = 0,
    distributed: Any = False,
    recovers: bool = False,
) -> None:
    """Reject data, a loss or blocks that do not go with a criterion, or with a recovery after it.

    Raises:
        ValueError: If something is missing, or of no use.
        TypeError: If an argument is of another type.
    """
    optional(iterable, "data", data)
    optional(function, "loss", loss, "model", "batch")
    optional(text, "sequential", sequential, "the name of a container of blocks")
    if flag("distributed", distributed) and not torch.distributed.is_initialized():
        raise ValueError(f"distributed must be False where there is no process group, got {distributed}")
    if recalibrate and data is None:
        raise ValueError(f"data must be given to recalibrate batch norms, got recalibrate={recalibrate} and data=None")
    name, needs = type(criterion).__name__, criterion.needs
    if data is None and recovers:
        raise ValueError("data must be given to refine masks or to reconstruct, got None")
    if data is None and needs != "weights":
        raise ValueError(f"data must be given: {name} needs {needs}, got None")
    if recovers and (recalibrate or distributed):
        raise ValueError(
            f"recalibrate and distributed must be left out with refine and reconstruct, got {recalibrate} and "
            f"{distributed}"
        )
    if sequential is not None and needs != "forwards" and not recovers:
        raise ValueError(f"sequential must go with a criterion that needs forwards, got {name}, which needs {needs}")


def batches_of(criterion: Criterion, data: Iterable[Any] | None, model: nn.Module) -> Iterable[Any]:
    """Return as many batches as the criterion looks at."""
    field, window = getattr(type(criterion), "__dataclass_fields__", {}).get("window"), criterion.window
    given = 0 if data is None else length_hint(data)
    if window is not None and field is not None and field.default == window < given:
        name = type(criterion).__name__
        warn(f"{name} takes {window} of the {given} batches of data: say {name}(window={given}) for all of them")
    return take(data, window, model)


def stages_of(
    criterion: Criterion,
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None,
    distributed: bool = False,
    sequential: str | None = None,
    fitted: Collection[nn.Parameter] = (),
) -> Iterator[Stage]:
    """Yield the parts of a model, with the passes that the criterion observes."""
    if criterion.needs == "gradients":
        average = average_gradients if distributed else _alone
        yield Stage(model, partial(criterion.passes, model, batches, partial(_loss_of, loss or _default_loss), average))
    else:
        yield from forward_stages(model, batches, loss, sequential, fitted)


def forward_stages(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None,
    sequential: str | None = None,
    fitted: Collection[nn.Parameter] = (),
) -> Iterator[Stage]:
    """Yield the parts of a model, with passes of a batch as its input, or through the loss."""
    run = partial(forward, model) if loss is None else partial(loss, model)
    yield from stages(model, batches, run, sequential, fitted)


def _alone(model: nn.Module) -> None:
    """Leave the gradients, which are those of all ranks."""


def observe(units: Sequence[Units], criterion: Criterion, stage: Stage, distributed: bool = False) -> None:
    """Let the criterion observe these units while a stage is run."""
    observation = Observation(criterion, units, distributed=distributed)
    if not observation.needed:
        return
    observation.reset()
    ids = {id(unit.parameter) for unit in units}
    observation.open()
    try:
        for _ in stage.passes():
            observation.gradients(ids)
            observation.step()
        if not observation.steps:
            raise ValueError("data, or samples, must have a batch, got none")
        observation.finish()
    finally:
        observation.close()


def _loss_of(loss: Loss, model: nn.Module, batch: Any) -> Tensor:
    found: Any = loss(model, batch)
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise TypeError(f"loss must return one number, a tensor, got {shown(found)}")
    return found


def _default_loss(model: nn.Module, batch: Any) -> Tensor:
    if by_keyword(model, batch):
        return _own_loss(model, batch)
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise ValueError(f"loss must be given where a batch is not (inputs, targets), got a {type(batch).__name__}")
    output, target = feed(model, batch[0]), batch[1]
    output = getattr(output, "logits", output)
    return (
        nn.functional.mse_loss(output, target)
        if target.is_floating_point()
        else nn.functional.cross_entropy(output, target)
    )


def _own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the loss that a model computes itself from a batch with labels, as those of transformers do."""
    output = feed(model, batch)
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"loss must be given where the model returns none, got the batch {list(batch)} and an output of "
            f"{type(output).__name__}: add labels to the batch, or pass loss=lambda model, batch: ..."
        )
    return found
