"""Run length: how long a run is, and when its epochs begin, in optimizer steps."""

import math

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_prune.models.summary import counted_as
from lightning_prune.schedules import Horizon


def length(trainer: Trainer, interval: str, set_epochs: int | None) -> float:
    """Return the length of the run in steps or epochs; infinite where it is unknown.

    Args:
        trainer: Runs it.
        interval: "step" or "epoch".
        set_epochs: The ``max_epochs`` that the user has set.
    """
    epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
    # stochastic weight averaging adds an epoch, in which no optimizer steps
    added = max(0.0, epochs - set_epochs) if set_epochs is not None and set_epochs != -1 and epochs < math.inf else 0.0
    if interval == "epoch":
        return epochs - added
    steps = float(trainer.estimated_stepping_batches)
    if added:
        steps = min(steps, (epochs - added) * steps_per_epoch(trainer))
    return math.inf if steps < 0 else steps


def steps_per_epoch(trainer: Trainer) -> float:
    """Return the optimizer steps of an epoch; 0, so that observation begins immediately, where they are unknown."""
    batches = trainer.num_training_batches
    return 0.0 if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)


def in_steps(trainer: Trainer, interval: str, position: int) -> float:
    """Return the optimizer step of a position; 0 where it is an epoch and their length is unknown."""
    return position if interval == "step" else position * steps_per_epoch(trainer)


def warn_if_too_short(owner: object, interval: str, last: int, duration: float) -> None:
    """Warn if a run of this length ends before the last update, at this position."""
    reachable = duration - 1 if interval == "epoch" else duration
    if last > reachable:
        rank_zero_warn(
            f"{type(owner).__name__} will not reach its target: the last update is due at {interval} {last}, and the "
            f"run ends after {duration:g} {interval}s: train longer, or give a smaller end"
        )


def warn_if_few_updates(owner: object, horizon: Horizon, window: tuple[int, int]) -> None:
    """Warn if fractions of a short run leave a gradual schedule fewer than three positions for updates."""
    first, last = window
    if last - first < 3 and isinstance(horizon.start + horizon.end, float):
        every = horizon.interval
        rank_zero_warn(
            f"{type(owner).__name__} has {counted_as(max(1, last - first), 'update')} for its schedule, which prunes a "
            f"large part in one step: start={horizon.start} and end={horizon.end} are the {every}s {first} and {last} "
            f"of this run: train longer{', count steps' * (every == 'epoch')}, or move start and end apart"
        )
