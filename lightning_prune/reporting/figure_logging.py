"""Figure logging: the figures of a report in the loggers of a run, each by its own call."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_figures(loggers: "list[Any]", figures: "Mapping[str, Figure]", step: int) -> None:
    """Log figures to every logger that takes figures, and warn if there is none.

    Args:
        loggers: The loggers of a Trainer.
        figures: The figures by name.
        step: The optimizer step that they show.
    """
    logged = [_log(logger, name, figure, step) for logger in loggers for name, figure in figures.items()]
    if figures and not any(logged):
        rank_zero_warn(
            f"log_figures needs a logger that takes figures, TensorBoardLogger, WandbLogger or MLFlowLogger, got "
            f"{[type(logger).__name__ for logger in loggers]}"
        )


def _log(logger: Any, name: str, figure: "Figure", step: int) -> bool:
    """Log a figure, and return whether the logger takes any."""
    tag = f"pruning/{name}"
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_figure"):  # TensorBoard
        experiment.add_figure(tag, figure, step)
    elif hasattr(logger, "log_image"):  # Weights & Biases
        logger.log_image(key=tag, images=[figure], step=step)
    elif hasattr(experiment, "log_figure") and hasattr(logger, "run_id"):  # MLflow: a file, whose name it restricts
        experiment.log_figure(logger.run_id, figure, re.sub(r"[^\w./ -]", "_", f"{tag}.png"))
    else:
        return False
    return True
