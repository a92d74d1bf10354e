"""Pruning report: one page that says what a run was to do, what it did, and how to do it again."""

import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.methods.distillation import Distillation
from lightning_prune.models import summary as report
from lightning_prune.models.flops import dense_flops, sparse_flops
from lightning_prune.models.forward import example_of
from lightning_prune.models.parameters import named_parameters
from lightning_prune.reporting import plots
from lightning_prune.reporting.history import History, as_json
from lightning_prune.reporting.html_page import STYLE, render
from lightning_prune.reporting.yaml_config import as_yaml, plain
from lightning_prune.tensors.distributed import full_tensor, local, reshard
from lightning_prune.training.compat import Callback
from lightning_prune.training.masked import MaskedTraining
from lightning_prune.validation import states
from lightning_prune.validation.arguments import flag
from lightning_prune.validation.instances import path as as_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class PruningReport(Callback):
    """Record a run, and write a page about it when it ends: plan, history, layers, sizes, masks and configuration.

    The page is one HTML file that needs no network; the same is written as JSON beside it. The configuration on it has
    the callbacks of this package and what of the Trainer decides over the steps; the model and its data are the user's.

    Args:
        path: Where to write the page; None is ``pruning_report.html`` in the Trainer's ``log_dir``, or, without a
            logger, in its ``default_root_dir``. The JSON has the suffix .json.
        log_figures: Whether to add the figures to every logger that takes figures, as TensorBoard's does.

    A page that cannot be written, for whatever reason, is a warning and no error: the run is complete without it.

    Attributes:
        history: Sparsity and metrics so far, as ``plot_history`` takes them.

    Raises:
        ModuleNotFoundError: Before training, if matplotlib is not installed.
        ValueError: If the path has another suffix than .html; before training, if a pruning callback stands behind this
            one, since some change the model once more when training ends.

    >>> PruningReport("report.html").history
    History(sparsity=[], metrics={})
    """

    def __init__(self, path: str | None = None, log_figures: bool = False) -> None:
        super().__init__()
        if path is not None and as_path("path", path).suffix != ".html":
            raise ValueError(f"path must end in .html, got {path}")
        self.path = None if path is None else os.fspath(path)
        self.log_figures = flag("log_figures", log_figures)
        self._forget()

    def _forget(self) -> None:
        self.history = History()
        self._before: dict[str, float] = {}
        self._levels: list[float] = []
        self._earlier: dict[str, Tensor] = {}
        self._validated: set[str] = set()

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(path=self.path)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if find_spec("matplotlib") is None:
            raise ModuleNotFoundError("PruningReport needs matplotlib: pip install 'lightning-prune[plots]'")
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks[callbacks.index(self) :]:
            if isinstance(callback, MaskedTraining):
                raise ValueError(
                    f"PruningReport must stand behind {type(callback).__name__} in callbacks, got it before"
                )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:  # another run than the one before
            self._forget()
        self._before = self._before or sizes(pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, model: nn.Module) -> None:
        """Note the sparsity of the targets of all callbacks together, if that of one has changed."""
        callbacks = _masked(trainer)
        levels = [callback.sparsity_now for callback in callbacks]
        if levels == self._levels:
            return
        self._levels = levels
        parameters = named_parameters(model)
        counts = [sum(parameters[name].numel() for name in callback.target_names()) for callback in callbacks]
        zeros = sum(level * count for level, count in zip(levels, counts, strict=True))
        self.history.change(trainer.global_step, zeros / max(1, sum(counts)))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._earlier = dict(trainer.callback_metrics)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            # those of training are still there, from an earlier step
            new = {n: v for n, v in trainer.callback_metrics.items() if v is not self._earlier.get(n)}
            self._validated.update(new)
            self._note(trainer, new)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning has "loss" a second and a third time, as "loss_step" and "loss_epoch"
        again = {name + suffix for name in trainer.callback_metrics for suffix in ("_step", "_epoch")}
        others = self._validated | again
        self._note(trainer, {name: v for name, v in trainer.callback_metrics.items() if name not in others})

    def _note(self, trainer: Trainer, logged: Mapping[str, Tensor]) -> None:
        own = {name: float(value) for name, value in logged.items() if not name.startswith("pruning/")}
        self.history.add(trainer.global_step, own)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            self._finish(trainer, pl_module)
        except Exception as error:  # a run that has been paid for is not to be lost for a page about it
            rank_zero_warn(f"PruningReport could not write its page, and the run is complete without: {error!r}")

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reshard(pl_module)
        self._look(trainer, pl_module)
        found = as_json(self._found(trainer, pl_module))  # on all ranks, which may hold pieces of the parameters
        masks = _masks(trainer, pl_module)
        folder = trainer.log_dir or trainer.default_root_dir  # all ranks have to ask for it
        if trainer.is_global_zero:
            path = Path(self.path or Path(folder) / "pruning_report.html")
            _write(path, found, _figures(self.history, found, masks, STYLE))
            if self.log_figures:
                _log(trainer, _figures(self.history, found, masks, {}))

    def _found(self, trainer: Trainer, model: LightningModule) -> dict[str, Any]:
        """Return all that the page says, as JSON has it."""
        rows = [asdict(row) | {"sparsity": row.sparsity} for row in report.rows(model, (), ())]
        callbacks = _masked(trainer)
        return {
            "model": type(model).__name__,
            "made_by": f"lightning_prune {version('lightning-prune')}",
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "sparsity": self.history.sparsity[-1][1] if self.history.sparsity else 0.0,
            "before": self._before,
            "after": sizes(model),
            "callbacks": [
                {**plain(c), "plan": c.explain(), "sparsity": c.sparsity_now, "reached": c.reached} for c in callbacks
            ],
            "history": self.history.as_json(),
            "layers": rows,
            "config": _configuration(trainer),
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**asdict(self.history), "before": dict(self._before), "validated": sorted(self._validated)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states.check("PruningReport", state_dict, "sparsity", "metrics", "before", "validated")
        pairs = {name: [(at, value) for at, value in values] for name, values in state_dict["metrics"].items()}
        self.history = History([(at, level) for at, level in state_dict["sparsity"]], pairs)
        self._before = dict(state_dict["before"])
        self._validated = set(state_dict["validated"])


def sizes(model: nn.Module) -> dict[str, float]:
    """Return the numbers of parameters, bytes and FLOPs of a model; with sharded parameters all ranks must call it.

    FLOPs are those of its ``example_input_array``, if it has one.

    >>> sizes(nn.Linear(4, 2, bias=False))
    {'parameters': 8, 'active_parameters': 8, 'bytes': 32, 'packed_bytes': 33.0}
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
    if example is not None:
        dense = dense_flops(model, example)
        found["flops"] = sum(dense.values())
        found["active_flops"] = sparse_flops(dense, {n: kept[n] / parameters[n].numel() for n in dense if n})
    return found


def _masked(trainer: Trainer) -> list[MaskedTraining]:
    return [callback for callback in trainer.callbacks if isinstance(callback, MaskedTraining)]  # type: ignore[attr-defined]


def _configuration(trainer: Trainer) -> str:
    """Return the YAML of this package's callbacks, and of the Trainer's arguments that decide over the steps."""
    defaults = inspect.signature(Trainer.__init__).parameters
    names = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision")
    given = {name: getattr(trainer, name) for name in names if getattr(trainer, name) != defaults[name].default}
    own: list[Any] = [c for c in trainer.callbacks if isinstance(c, MaskedTraining | Distillation)]  # type: ignore[attr-defined]
    seed = os.environ.get("PL_GLOBAL_SEED")
    return as_yaml(given, own, None if seed is None else int(seed))


def _masks(trainer: Trainer, model: nn.Module) -> dict[str, Tensor]:
    """Return the whole masks of all targets, as their weights show them."""
    parameters = named_parameters(model)
    names = [name for callback in _masked(trainer) for name in callback.target_names()]
    return {name: full_tensor(local(parameters[name]) != 0, parameters[name]) for name in names}


def _figures(
    history: History, found: Mapping[str, Any], masks: Mapping[str, Tensor], style: dict[Any, Any]
) -> "dict[str, Figure]":
    """Return the figures of the page by name."""
    from matplotlib import pyplot, rc_context

    rows = tuple(report.Row(r["name"], tuple(r["shape"]), r["weights"], r["zeros"]) for r in found["layers"])
    with rc_context(style):
        figures = {name: plots.plot_history(history, name)[0] for name in history.metrics}
        figures = figures or {"history": plots.plot_history(history)[0]}
        figures["sparsity"] = plots.plot_sparsity(report.Summary(rows))[0]
        if masks:
            figures["masks"] = plots.plot_masks(masks)[0]
    for figure in figures.values():
        pyplot.close(figure)  # it stays as it is, and pyplot shows it no more
    return figures


def _write(path: Path, found: Mapping[str, Any], figures: "Mapping[str, Figure]") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(found, figures), encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(found, indent=1, allow_nan=False), encoding="utf-8")
    rank_zero_info(f"PruningReport: {path}")


def _log(trainer: Trainer, figures: "Mapping[str, Figure]") -> None:
    found = (getattr(logger, "experiment", None) for logger in trainer.loggers)
    experiments: list[Any] = [experiment for experiment in found if hasattr(experiment, "add_figure")]
    if not experiments:
        rank_zero_warn("log_figures needs a logger whose experiment has add_figure, such as TensorBoard's, got none")
    for experiment in experiments:
        for name, figure in figures.items():
            experiment.add_figure(f"pruning/{name}", figure, trainer.global_step)
