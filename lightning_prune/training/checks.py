"""Checks: whether a run, and its other callbacks, suit a callback that trains under masks."""

from collections.abc import Iterable
from typing import Any, NoReturn

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS, Optimizer

from lightning_prune.models.parameters import Target
from lightning_prune.structure.checkpoints import is_shrunk
from lightning_prune.structure.cut_record import cut_record_of
from lightning_prune.tensors.distributed import is_sharded
from lightning_prune.training.hooks import TrainingMethod, training_methods

_NOT_RUN = "not run the model inside its step"  # what an optimizer must do for some methods
_FLATTENING = ("FSDPStrategy", "DeepSpeedStrategy", "XLAStrategy")


def check_strategy(callback: TrainingMethod, trainer: Trainer) -> None:
    """Reject strategies that flatten parameters, and warn of those from which callbacks do not come back.

    Raises:
        ValueError: If the strategy flattens parameters.
    """
    reject_flattening(trainer)
    launcher = type(getattr(trainer.strategy, "launcher", None))
    if any(cls.__name__ == "_MultiProcessingLauncher" for cls in launcher.__mro__):  # its processes end with the run
        rank_zero_warn(
            f"{type(callback).__name__} holds its masks in the processes that the strategy starts, and what comes back "
            f"is the weights and the logged metrics: count the zeros with sparsity(model), find the masks in a "
            f"checkpoint, and train on with ConstantSparsity()"
        )


def reject_flattening(trainer: Trainer) -> None:
    """Reject strategies that flatten parameters.

    Raises:
        ValueError: If the strategy does.
    """
    names = {cls.__name__ for cls in type(trainer.strategy).__mro__}
    if found := names.intersection(_FLATTENING):
        raise ValueError(
            f"strategy must leave parameters in their shape, got {found.pop()}, which flattens them: "
            f"use ModelParallelStrategy with fully_shard (FSDP2), or DDP"
        )


def reject_lbfgs(owner: str, optimizers: Iterable[Optimizer], rule: str = _NOT_RUN) -> None:
    """Reject LBFGS, which runs the model inside its step and compares losses.

    Args:
        owner: The callback, for the message.
        optimizers: Those of the run.
        rule: What an optimizer must do instead, or not do.

    Raises:
        ValueError: If one is LBFGS.
    """
    if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        raise ValueError(f"optimizer must {rule} for {owner}, got LBFGS")


def reject_running(owner: str, optimizer: str) -> NoReturn:
    """Reject an optimizer that has run the model inside its step.

    Raises:
        ValueError: In any case.
    """
    raise ValueError(f"optimizer must {_NOT_RUN} for {owner}, got {optimizer}")


def reject_lazy(owner: str, model: nn.Module) -> None:
    """Reject a model with uninitialised parameters.

    Raises:
        ValueError: If there are any.
    """
    if any(map(is_lazy, model.parameters())):
        raise ValueError(f"parameters must be whole for {owner}, got uninitialised ones: run a batch through the model")


def reject_shards(owner: str, targets: Iterable[Target]) -> None:
    """Reject targets of which a rank has a shard.

    Raises:
        ValueError: If there are any.
    """
    for target in targets:
        if is_sharded(target.parameter):
            raise ValueError(
                f"parameters must be whole on every rank for {owner}, got shards of {target.name!r}: use DDP"
            )


def reject_sparse_gradient(owner: str, name: str, gradient: Tensor) -> None:
    """Reject a sparse gradient, as embeddings give, of the parameter of that name.

    Raises:
        ValueError: If it is one.
    """
    if gradient.is_sparse:
        raise ValueError(f"{name!r} must have a dense gradient for {owner}, got a sparse one: ignore it")


def explain_mismatch(trainer: Trainer, model: nn.Module, exception: BaseException) -> None:
    """Say so where the model of a run is whole, and the checkpoint that it is loaded from is of a shrunk one."""
    path = trainer.ckpt_path
    mismatch = "size mismatch for" in str(exception) and cut_record_of(model) is None
    if mismatch and path is not None and is_shrunk(path):
        exception.args = (
            f"ckpt_path must be a checkpoint of a whole model, got one of a shrunk model: fit "
            f"load_shrunk({type(model).__name__}, ckpt_path) instead. {exception}",
        )


def check_targets(callback: TrainingMethod, trainer: Trainer) -> None:
    """Reject targets that another callback prunes, too.

    Raises:
        ValueError: If there are any.
    """
    for other in training_methods(trainer):
        both = set(callback.target_names()).intersection(other.target_names() if other is not callback else ())
        if both:
            names = f"{type(callback).__name__} and in {type(other).__name__}"
            raise ValueError(f"pruning callbacks must have disjoint targets, got {sorted(both)[:5]} in {names}")


def warn_without_pruning(callback: object, trainer: Trainer, what: str) -> None:
    """Warn, once a run begins, that nothing prunes, and what a callback that watches pruning does then."""
    if not training_methods(trainer):
        rank_zero_warn(f"{type(callback).__name__} finds no pruning callback in this run: {what}")


def warn_of_judges(callback: TrainingMethod, trainer: Trainer) -> None:
    """Warn once a run of callbacks that may take the dense model for the best."""
    waiting = next((found for found in training_methods(trainer) if not found.reached), None)
    if waiting is callback and (found := judges(trainer)):
        rank_zero_warn(
            f"{', '.join(dict.fromkeys(found))} may take the model for the best before {type(callback).__name__} has "
            f"reached its target: use SparseModelCheckpoint and SparseEarlyStopping, which wait for it"
        )


def judges(trainer: Trainer) -> list[str]:
    """Return the names of the callbacks, of either namespace, that keep or stop a run by a metric of any model.

    Those that wait for the target sparsity are left out: their class says so by ``waits_for_target``.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [type(callback).__name__ for callback in callbacks if _judges(callback)]


def _judges(callback: Any) -> bool:
    names = {cls.__name__ for cls in type(callback).__mro__}
    if getattr(type(callback), "waits_for_target", False):
        return False
    keeps_best = "ModelCheckpoint" in names and callback.monitor is not None and callback.save_top_k > 0
    return keeps_best or "EarlyStopping" in names
