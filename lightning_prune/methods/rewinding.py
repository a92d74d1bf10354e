"""Rewinding: all that training changes, as it was at one moment, and the way back there."""

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.models.parameters import named_parameters, plain_name
from lightning_prune.tensors.distributed import is_sharded
from lightning_prune.training.hooks import training_methods
from lightning_prune.training.scheduled import ScheduledTraining
from lightning_prune.validation.states import ANY, NAMES, TENSOR, items, record, table, whole

_OPTIMIZER = record(state=ANY, param_groups=items(record(params=items(whole()))))
# what a checkpoint has of what ``remember`` returns
MEMORY = record(tensors=table(TENSOR), optimizers=items(_OPTIMIZER), schedulers=items(NAMES))


class Rewinding(ScheduledTraining):
    """The abstract base of the callbacks that put a whole run back to an earlier moment: a run has at most one."""

    @override
    def on_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check(trainer, pl_module)
        others = [type(other).__name__ for other in training_methods(trainer) if isinstance(other, Rewinding)]
        if len(others) > 1:
            raise ValueError(
                f"callbacks must have at most one among them that rewinds the run, which each does for the whole "
                f"model, got {others}: give one of them all targets"
            )
        super().on_start(trainer, pl_module)


def remember(trainer: Trainer, model: nn.Module, weights: bool = True) -> dict[str, Any]:
    """Return copies, on the CPU, of parameters and buffers (if asked for), and of optimizers and schedulers.

    Of weights that a callback trains behind its masks, the copies are those without zeros.
    """
    hidden: dict[str, Tensor] = {}
    for callback in training_methods(trainer):
        hidden.update(callback.hidden_weights())
    return {
        "tensors": _copy({**dict(_tensors(model)), **hidden}) if weights else {},
        "optimizers": [_copy(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "schedulers": [_copy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
    }


@torch.no_grad()
def go_back(trainer: Trainer, model: nn.Module, memory: dict[str, Any]) -> None:
    """Put everything back that was remembered, under the masks of today; the memory stays as it is."""
    for name, tensor in _tensors(model):
        if name in memory["tensors"]:
            tensor.copy_(memory["tensors"][name])
    # optimizers and schedulers go on with the very objects that they are given
    for optimizer, saved in zip(trainer.optimizers, memory["optimizers"], strict=True):
        _restore(optimizer, _copy(saved))
    for config, saved in zip(trainer.lr_scheduler_configs, memory["schedulers"], strict=True):
        config.scheduler.load_state_dict(_copy(saved))
    if memory["tensors"]:
        mask_all(trainer)


def check_memory(owner: str, trainer: Trainer, model: nn.Module, memory: dict[str, Any]) -> None:
    """Refuse a model that cannot go back to what is remembered, since parts of it have been replaced.

    Raises:
        ValueError: If a tensor has another shape, or optimizers and schedulers are not those of then.
    """
    for name, tensor in _tensors(model):
        before = memory["tensors"].get(name, tensor)
        if before.shape != tensor.shape:
            raise ValueError(
                f"the model must be the one that {owner} remembers, to go back to it, got {name!r} of shape "
                f"{tuple(tensor.shape)} in place of {tuple(before.shape)}: use a new {owner} with a new part of a model"
            )
    counts = [[len(group["params"]) for group in saved["param_groups"]] for saved in memory["optimizers"]]
    now = [[len(group["params"]) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
    fits = all(mine[: len(saved)] == saved for saved, mine in zip(counts, now, strict=False))
    if len(counts) != len(now) or not fits or len(memory["schedulers"]) != len(trainer.lr_scheduler_configs):
        raise ValueError(
            f"optimizers must have the parameters that {owner} remembers, to go back to them, got groups of {now} in "
            f"place of {counts}: use a new {owner} with a new part of a model"
        )


def mask_all(trainer: Trainer) -> None:
    """Let every callback that trains under masks take over weights that somebody else has put into the model."""
    for callback in training_methods(trainer):
        callback.reapply_masks()


def _restore(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    # groups that were added since, of layers that were frozen then, stay as they are, with fresh state
    saved["param_groups"] += optimizer.state_dict()["param_groups"][len(saved["param_groups"]) :]
    optimizer.load_state_dict(saved)


def check(trainer: Trainer, model: nn.Module) -> None:
    """Reject a run that cannot go back.

    Raises:
        ValueError: If parameters are sharded, or stochastic weight averaging replaces the schedulers on the way.
    """
    for name, parameter in named_parameters(model).items():
        if is_sharded(parameter):
            raise ValueError(f"parameters must be whole on every rank to be rewound, got shards of {name!r}")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if any(cls.__name__ == "StochasticWeightAveraging" for cls in type(callback).__mro__):
            raise ValueError(
                f"schedulers must stay the same to be rewound, got {type(callback).__name__}, which replaces them: "
                f"use WeightAveraging or EMAWeightAveraging"
            )


def check_resettable(model: nn.Module) -> None:
    """Reject a model that ``reset`` cannot initialise.

    Raises:
        ValueError: If a module has trainable parameters of its own, and no ``reset_parameters``.

    >>> check_resettable(nn.Linear(2, 2))
    """
    for name, module in _trained(model):
        if not _resets(module):
            raise ValueError(
                f"every module with parameters must have reset_parameters to be initialised again, got "
                f"{type(module).__name__} without it at {name or 'the top'!r}"
            )


def reset(model: nn.Module, seed: int) -> None:
    """Initialise every module that is trained again, by its ``reset_parameters``; no global generator is touched.

    >>> one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> reset(one, 7)
    >>> reset(other, 7)
    >>> torch.equal(one.weight, other.weight)
    True
    """
    check_resettable(model)
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # not the seed itself: a user's seed_everything of the same number has drawn the weights that are there
        torch.manual_seed(zlib.crc32(f"reset {seed}".encode()))
        for _, module in _trained(model):
            _resets(module)[0]()


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            yield name, module


def _resets(module: nn.Module) -> list[Any]:
    found = (getattr(module, name, None) for name in ("reset_parameters", "_reset_parameters"))
    return [method for method in found if callable(method)]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from named_parameters(model).items()
    yield from ((plain_name(name), buffer) for name, buffer in model.named_buffers())


def _copy(state: Any) -> Any:
    return apply_to_collection(state, Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))
