"""Pruning report: a page with the plan, the results and the configuration of a run."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune._version import __version__
from lightning_prune.models import summary as report
from lightning_prune.models.parameters import named_parameters
from lightning_prune.models.sizes import changed_channels, channels
from lightning_prune.reporting.contents import configuration, cut, figures_of, history_figures, masks_of, sizes
from lightning_prune.reporting.figure_logging import log_figures
from lightning_prune.reporting.history import History, as_json
from lightning_prune.reporting.html_page import STYLE, render
from lightning_prune.reporting.mask_gallery import gallery
from lightning_prune.reporting.yaml_config import plain
from lightning_prune.tensors.distributed import reshard
from lightning_prune.training.checks import warn_without_pruning
from lightning_prune.training.compat import Callback
from lightning_prune.training.hooks import training_methods
from lightning_prune.training.masked import MaskedTraining
from lightning_prune.training.representation import call_text
from lightning_prune.validation import states
from lightning_prune.validation.instances import flag
from lightning_prune.validation.instances import path as as_path
from lightning_prune.validation.states import FRACTION, NUMBER, TEXT, items, row, table
from lightning_prune.validation.states import whole as whole_number
from lightning_prune.validation.values import install

_RULES = {
    "sparsity": items(row(whole_number(), FRACTION)),
    "metrics": table(items(row(whole_number(), NUMBER))),
    "before": table(NUMBER),
    "validated": items(TEXT),
}


class PruningReport(Callback):
    """Record a run, and write a page about it when it ends: plan, history, layers, sizes, masks and configuration.

    The page is a self-contained HTML file, with the same data as JSON in a second file. The configuration lists the
    callbacks of this package and the Trainer's arguments that affect the steps; the model and its data are the user's.
    If the page cannot be written, you are warned, and the run completes without it.

    Args:
        path: Where to write the page; None is ``pruning_report.html`` in the Trainer's ``log_dir``, or in its
            ``default_root_dir`` without a logger. The JSON file has the suffix .json.
        log_figures: Whether to log the figures to every logger that takes figures: TensorBoard's, Weights & Biases',
            MLflow's.

    Attributes:
        history: Sparsity and metrics so far, for ``plot_history``.

    Raises:
        ModuleNotFoundError: Before training, if matplotlib is not installed.
        ValueError: If the suffix of the path is not .html; before training, if a pruning callback comes after this one,
            since some change the model when training ends.

    >>> PruningReport("report.html").history
    History(sparsity=[], metrics={})
    """

    def __init__(self, path: str | None = None, log_figures: bool = False) -> None:
        super().__init__()
        if path is not None and as_path("path", path).suffix != ".html":
            raise ValueError(f"path must end in .html, got {path}")
        self.path = None if path is None else os.fspath(path)
        self.log_figures = flag("log_figures", log_figures)
        self._reset()

    def _reset(self) -> None:
        self.history = History()
        self._before: dict[str, float] = {}
        self._channels: dict[str, int] = {}
        self._sparsities: list[float] = []
        self._earlier: dict[str, Tensor] = {}
        self._validated: set[str] = set()

    @override
    def __repr__(self) -> str:
        return call_text(self)

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(path=self.path)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if find_spec("matplotlib") is None:
            raise ModuleNotFoundError(f"PruningReport needs matplotlib: {install('plots')}")
        warn_without_pruning(self, trainer, "it reports the zeros that the model has")
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks[callbacks.index(self) :]:
            if isinstance(callback, MaskedTraining):
                raise ValueError(f"PruningReport must come after {type(callback).__name__} in callbacks, got it before")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:  # a new run
            self._reset()
        self._before = self._before or sizes(pl_module)[0]
        self._channels = channels(pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._record_sparsity(trainer, pl_module)

    def _record_sparsity(self, trainer: Trainer, model: nn.Module) -> None:
        """Record the sparsity of the targets of all callbacks together, if that of any has changed."""
        callbacks = training_methods(trainer)
        sparsities = [callback.sparsity_now for callback in callbacks]
        if sparsities == self._sparsities:
            return
        self._sparsities = sparsities
        parameters = named_parameters(model)
        counts = [sum(parameters[name].numel() for name in callback.target_names()) for callback in callbacks]
        zeros = sum(sparsity * count for sparsity, count in zip(sparsities, counts, strict=True))
        self.history.change(trainer.global_step, zeros / max(1, sum(counts)))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._earlier = dict(trainer.callback_metrics)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            # callback_metrics still has the training metrics of an earlier step
            new = {n: v for n, v in trainer.callback_metrics.items() if v is not self._earlier.get(n)}
            self._validated.update(new)
            self._record(trainer, new)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning repeats "loss" as "loss_step" and "loss_epoch"
        repeated = {name + suffix for name in trainer.callback_metrics for suffix in ("_step", "_epoch")}
        others = self._validated | repeated
        self._record(trainer, {name: v for name, v in trainer.callback_metrics.items() if name not in others})

    def _record(self, trainer: Trainer, logged: Mapping[str, Tensor]) -> None:
        own = {name: float(value) for name, value in logged.items() if not name.startswith("pruning/")}
        self.history.add(trainer.global_step, own)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            self._finish(trainer, pl_module)
        except Exception as error:  # a finished run must not fail for its report
            rank_zero_warn(f"PruningReport could not write its page; the run is complete without it: {error!r}")

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reshard(pl_module)
        self._record_sparsity(trainer, pl_module)
        found = as_json(self._found(trainer, pl_module))  # on all ranks, since parameters may be sharded
        masks = masks_of(trainer, pl_module)
        folder = trainer.log_dir or trainer.default_root_dir  # a collective
        if trainer.is_global_zero:
            path = Path(self.path or Path(folder) / "pruning_report.html")
            _write(
                path, found, render(found, history_figures(self.history, STYLE), gallery({} if cut(found) else masks))
            )
            if self.log_figures:
                log_figures(trainer.loggers, figures_of(self.history, found, masks, {}), trainer.global_step)

    def _found(self, trainer: Trainer, model: LightningModule) -> dict[str, Any]:
        """Return the data of the page, as JSON."""
        rows = [asdict(row) | {"sparsity": row.sparsity} for row in report.rows(model, (), ())]
        callbacks = training_methods(trainer)
        after, no_flops = sizes(model)
        return {
            "model": type(model).__name__,
            "made_by": f"lightning_prune {__version__}",
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "sparsity": self.history.sparsity[-1][1] if self.history.sparsity else 0.0,
            "before": self._before,
            "after": after,
            "no_flops": no_flops,
            "shrunk": changed_channels(self._channels, channels(model)),
            "callbacks": [
                {**plain(c), "plan": c.explain(), "sparsity": c.sparsity_now, "reached": c.reached} for c in callbacks
            ],
            "history": self.history.as_json(),
            "layers": rows,
            "config": configuration(trainer),
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**asdict(self.history), "before": dict(self._before), "validated": sorted(self._validated)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states.check("PruningReport", state_dict, _RULES, list(_RULES))
        pairs = {name: [(at, value) for at, value in values] for name, values in state_dict["metrics"].items()}
        self.history = History([(at, level) for at, level in state_dict["sparsity"]], pairs)
        self._before = dict(state_dict["before"])
        self._validated = set(state_dict["validated"])


def _write(path: Path, found: Mapping[str, Any], page: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(found, indent=1, allow_nan=False), encoding="utf-8")
    rank_zero_info(f"PruningReport: {path}")
