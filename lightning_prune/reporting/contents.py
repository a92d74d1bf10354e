"""Contents of the report: sizes, masks, figures and the configuration of a run."""

import inspect
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_prune.methods.distillation import Distillation
from lightning_prune.methods.group_lasso import GroupLasso
from lightning_prune.models import summary as report
from lightning_prune.models.flops import dense_flops, sparse_flops
from lightning_prune.models.forward import example_of
from lightning_prune.models.parameters import named_parameters
from lightning_prune.reporting import plots
from lightning_prune.reporting.history import History
from lightning_prune.reporting.yaml_config import as_yaml
from lightning_prune.tensors.distributed import full_tensor, local
from lightning_prune.training.hooks import TrainingMethod, training_methods

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sizes(model: nn.Module) -> tuple[dict[str, float], str]:
    """Return the numbers of parameters, bytes and FLOPs of a model, and why the FLOPs are missing if they are.

    It is a collective if parameters are sharded.

    >>> numbers, why = sizes(nn.Linear(4, 2, bias=False))
    >>> numbers
    {'parameters': 8, 'active_parameters': 8, 'bytes': 32, 'packed_bytes': 33.0}
    >>> why
    'the model has no example input. Set example_input_array in the LightningModule to an input of forward'
    """
    parameters = named_parameters(model)
    kept = {name: parameter.numel() - report.zeros(parameter) for name, parameter in parameters.items()}
    found: dict[str, float] = {
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "active_parameters": sum(kept.values()),
        "bytes": sum(parameter.numel() * parameter.element_size() for parameter in parameters.values()),
        "packed_bytes": sum(kept[name] * p.element_size() + p.numel() / 8 for name, p in parameters.items()),
    }
    example = example_of(model, None)
    if example is None:
        return found, f"the model has no example input. {_SET}"
    try:
        dense = dense_flops(model, example)
    except Exception as error:  # raised by the user's forward; a run must not fail for its report
        return found, f"forward fails with the example_input_array: {type(error).__name__}: {error}"
    found["flops"] = sum(dense.values())
    found["active_flops"] = sparse_flops(dense, {n: kept[n] / parameters[n].numel() for n in dense if n})
    return found, ""


_SET = "Set example_input_array in the LightningModule to an input of forward"


def configuration(trainer: Trainer) -> str:
    """Return the YAML of this package's callbacks and of the Trainer's arguments that affect the steps."""
    defaults = inspect.signature(Trainer.__init__).parameters
    names = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision")
    given = {name: getattr(trainer, name) for name in names if getattr(trainer, name) != defaults[name].default}
    kinds = TrainingMethod | Distillation | GroupLasso
    own: list[Any] = [callback for callback in trainer.callbacks if isinstance(callback, kinds)]  # type: ignore[attr-defined]
    seed = os.environ.get("PL_GLOBAL_SEED")
    return as_yaml(given, own, None if seed is None else int(seed))


def masks_of(trainer: Trainer, model: nn.Module) -> dict[str, Tensor]:
    """Return the full masks of all targets, from their nonzero weights."""
    parameters = named_parameters(model)
    names = [name for callback in training_methods(trainer) for name in callback.target_names()]
    return {name: full_tensor(local(parameters[name]) != 0, parameters[name]) for name in names}


def figures_of(
    history: History, found: Mapping[str, Any], masks: Mapping[str, Tensor], style: dict[Any, Any]
) -> "dict[str, Figure]":
    """Return the figures for loggers by name: the history, the sparsity of the layers, and the masks."""
    from matplotlib import rc_context

    figures = history_figures(history, style)
    if not cut(found):
        rows = tuple(report.Row(r["name"], tuple(r["shape"]), r["weights"], r["zeros"]) for r in found["layers"])
        with rc_context(style):
            figures["sparsity"] = plots.plot_sparsity(report.Summary(rows))[0]
            if masks:
                figures["masks"] = plots.plot_masks(masks)[0]
    return _forgotten(figures)


def history_figures(history: History, style: dict[Any, Any]) -> "dict[str, Figure]":
    """Return a figure of the sparsity and each metric, or of the sparsity alone, by name."""
    from matplotlib import rc_context

    with rc_context(style):
        figures = {name: plots.plot_history(history, name)[0] for name in history.metrics}
        return _forgotten(figures or {"history": plots.plot_history(history)[0]})


def cut(found: Mapping[str, Any]) -> bool:
    """Return whether what was pruned is no longer there."""
    return bool(found["shrunk"]) and not any(row["zeros"] for row in found["layers"])


def _forgotten(figures: "dict[str, Figure]") -> "dict[str, Figure]":
    from matplotlib import pyplot

    for figure in figures.values():
        pyplot.close(figure)  # pyplot forgets the figure, which stays intact
    return figures
