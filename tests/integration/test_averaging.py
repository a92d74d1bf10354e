"""Averaged weights are as sparse as the model, and only a model at its target sparsity is judged."""

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from models import fit
from modes import KINDS, SGD, Probe, Regression, StatefulLoader, assert_masked, assert_nothing_left, assert_pruned, mlp
from pairwise import covering
from torch import Tensor, nn
from variants import METHODS

from lightning_prune import (
    ConstantSparsity,
    GuardedPruning,
    LearnedMasks,
    LotteryTicket,
    MagnitudePruning,
    MaskedAdapters,
    Pruning,
    SparseEarlyStopping,
    SparseModelCheckpoint,
    prune,
)

# resumed runs save nothing, so the callbacks that saved are not among theirs
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")


class ByEpoch(WeightAveraging):
    """Averages at the ends of epochs."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None


AVERAGES: dict[str, Callable[[], Callback]] = {
    "swa": partial(StochasticWeightAveraging, 0.05, swa_epoch_start=1),
    "swa-late": partial(StochasticWeightAveraging, 0.05, swa_epoch_start=3),
    "mean": WeightAveraging,
    "mean-by-epoch": ByEpoch,
    "ema": partial(EMAWeightAveraging, decay=0.9),
    "ema-late": partial(EMAWeightAveraging, decay=0.9, update_every_n_steps=2, update_starting_at_step=9),
    "ema-without-buffers": partial(EMAWeightAveraging, decay=0.9, use_buffers=False),
}
NETS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": mlp,
    "plain": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)),
}
WINDOWS: dict[str, dict[str, Any]] = {
    "early": {"schedule": "linear", "start": 2, "end": 8, "frequency": 2},
    "to the last step": {"schedule": "linear", "start": 0.0, "end": 1.0, "frequency": 4},
    "epochs": {"schedule": "linear", "start": 0, "end": 3, "interval": "epoch"},
}
EPOCHS = 4


def masks_of(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the masks that a checkpoint of a ``Pruning`` holds."""
    callback = Pruning(0.5)
    (state,) = (state for key, state in checkpoint["callbacks"].items() if key.startswith("Pruning"))
    callback.load_state_dict(state)
    return callback.masks


def in_pairs(**axes: Iterable[str]) -> Any:
    """Parametrize by so many cases that each value of an axis meets each of every other."""
    cases = covering({name: tuple(values) for name, values in axes.items()})
    return pytest.mark.parametrize(tuple(axes), [tuple(case.values()) for case in cases])


@in_pairs(average=AVERAGES, window=WINDOWS, net=NETS, order=("pruning first", "averaging first"))
def test_averaged_weights_are_validated_and_saved_at_their_sparsity(
    average: str, window: str, net: str, order: str, tmp_path: Path
) -> None:
    model = Regression(NETS[net](), optimizer=SGD)
    keys = list(model.state_dict())
    callback = Pruning(0.5, **KINDS["weights"], **WINDOWS[window])
    callbacks = [callback, AVERAGES[average]()] if order == "pruning first" else [AVERAGES[average](), callback]
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1)
    with Probe(model, callback) as probe:
        trainer = fit(model, *callbacks, saver, max_epochs=EPOCHS, enable_checkpointing=True)
    probe.assert_sparse()
    assert_pruned(model, callback)
    assert_nothing_left(trainer, model, keys)
    saved = [torch.load(path, weights_only=True) for path in tmp_path.glob("*.ckpt")]
    assert len(saved) >= EPOCHS
    for checkpoint in saved:
        masks = masks_of(checkpoint)
        for weights in (checkpoint["state_dict"], checkpoint.get("current_model_state", {})):
            assert not [name for name in masks if name in weights and weights[name][~masks[name]].any()]
    last = max(saved, key=lambda checkpoint: checkpoint["global_step"])
    zeros = sum(int((weight == 0).sum()) for weight in last["state_dict"].values() if weight.ndim == 2)
    assert zeros == 72


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("kind", ["gradients", "forwards"])
def test_averaging_serves_criteria_that_observe(kind: str, average: str) -> None:
    model = Regression(mlp(), optimizer=SGD)
    callback = Pruning(0.5, **KINDS[kind], **WINDOWS["early"])
    with Probe(model, callback) as probe:
        fit(model, AVERAGES[average](), callback, max_epochs=EPOCHS)
    probe.assert_sparse()
    assert_pruned(model, callback)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("average", AVERAGES)
def test_an_average_of_sparse_weights_stays_sparse(average: str, net: str) -> None:
    model = Regression(NETS[net](), optimizer=SGD)
    prune(model, 0.75)
    callback = ConstantSparsity()
    with Probe(model, callback) as probe:
        fit(model, AVERAGES[average](), callback, max_epochs=EPOCHS)
    probe.assert_sparse(updates=0)
    assert_pruned(model, callback, 0.75)


@in_pairs(method=METHODS, average=("swa", "mean", "ema"), order=("method first", "averaging first"))
def test_averages_of_every_method_are_under_its_masks(method: str, average: str, order: str) -> None:
    model, callback = Regression(mlp(), optimizer=SGD), METHODS[method]()
    callbacks = [callback, AVERAGES[average]()] if order == "method first" else [AVERAGES[average](), callback]
    if isinstance(callback, LotteryTicket) and average == "swa":
        with pytest.raises(ValueError, match="got StochasticWeightAveraging, which replaces them"):
            fit(model, *callbacks, max_epochs=3)
        return
    with Probe(model, callback) as probe:
        fit(model, *callbacks, max_epochs=3)
    assert not probe.dense
    assert_masked(model, callback)


@in_pairs(average=("swa", "mean", "ema"), order=("adapters first", "averaging first"))
def test_averages_of_adapted_weights_are_under_the_masks(average: str, order: str) -> None:
    model, callback = Regression(mlp(), optimizer=SGD), MaskedAdapters(2)
    prune(model, 0.5)
    callbacks = [callback, AVERAGES[average]()] if order == "adapters first" else [AVERAGES[average](), callback]
    with Probe(model, callback) as probe:
        fit(model, *callbacks, max_epochs=3)
    assert not probe.dense
    assert_pruned(model, callback)


@in_pairs(average=("swa", "mean", "ema"), order=("masks first", "averaging first"))
def test_averages_of_weights_with_learned_masks_are_under_the_masks(average: str, order: str) -> None:
    model, callback = Regression(mlp(), optimizer=SGD), LearnedMasks(2, 4)
    callbacks = [callback, AVERAGES[average]()] if order == "masks first" else [AVERAGES[average](), callback]
    fit(model, *callbacks, max_epochs=3)
    assert_masked(model, callback)


def test_guarded_pruning_refuses_an_average_that_replaces_schedulers() -> None:
    with pytest.raises(ValueError, match="got StochasticWeightAveraging, which replaces them"):
        fit(Regression(mlp(), optimizer=SGD), GuardedPruning("val_loss", mode="min"), AVERAGES["swa"]())


class Resumable(Regression):
    def train_dataloader(self) -> StatefulLoader:
        return StatefulLoader(self.size)


@pytest.mark.parametrize("average", ["mean", "ema", "ema-late"])
def test_an_averaged_run_resumes_exactly(average: str, tmp_path: Path) -> None:
    def run(model: LightningModule, *others: Callback, **kwargs: Any) -> tuple[dict[str, Tensor], Pruning]:
        callback = Pruning(0.5, **KINDS["forwards"], **WINDOWS["early"])
        fit(model, AVERAGES[average](), callback, *others, max_epochs=EPOCHS, **kwargs)
        return model.state_dict(), callback

    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    expected, callback = run(Resumable(mlp()), saver, enable_checkpointing=True)
    paths = list(tmp_path.glob("*.ckpt"))
    wrong = []
    for path in paths:
        found, again = run(Resumable(mlp()), ckpt_path=str(path))
        same = all(torch.equal(found[key], expected[key]) for key in expected)
        if not same or any(not torch.equal(again.masks[name], mask) for name, mask in callback.masks.items()):
            wrong.append(path.name)
    assert len(paths) == 4 * EPOCHS
    assert not wrong


# ------------------------------------------------------------------------------------------- what is judged


class Worse(Regression):
    """Its metric is worse every epoch, so that the dense model of the first epoch looks best."""

    def __init__(self) -> None:
        super().__init__(mlp())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.log("metric", float(self.current_epoch), on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_metric", float(self.current_epoch))


def sparse_from(epoch: int, **kwargs: Any) -> MagnitudePruning:
    return MagnitudePruning(0.5, start=0, end=epoch, interval="epoch", frequency=1, **kwargs)


@pytest.mark.filterwarnings("ignore:ModelCheckpoint may take the model for the best")
@pytest.mark.parametrize("monitor", ["metric", "val_metric"])
@pytest.mark.parametrize(("saver", "best"), [(ModelCheckpoint, 0), (SparseModelCheckpoint, 2)])
def test_the_best_checkpoint_is_at_the_target(
    saver: type[ModelCheckpoint], best: int, monitor: str, tmp_path: Path
) -> None:
    saver = saver(tmp_path, "{epoch}", monitor=monitor, save_on_train_epoch_end=monitor == "metric")
    fit(Worse(), sparse_from(2), saver, max_epochs=5, enable_checkpointing=True)
    assert Path(saver.best_model_path).name == f"epoch={best}.ckpt"
    assert saver.best_model_score == best
    weights = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
    zeros = sum(int((weight == 0).sum()) for weight in weights.values() if weight.ndim == 2)
    assert (zeros == 72) == (saver.monitor is not None and type(saver) is SparseModelCheckpoint)


@pytest.mark.filterwarnings("ignore:EarlyStopping may take the model for the best")
@pytest.mark.parametrize("monitor", ["metric", "val_metric"])
@pytest.mark.parametrize(("stopper", "epochs"), [(EarlyStopping, 3), (SparseEarlyStopping, 5)])
def test_patience_begins_at_the_target(stopper: type[EarlyStopping], epochs: int, monitor: str) -> None:
    model, callback = Worse(), sparse_from(2)
    stop = stopper(monitor, patience=2, check_on_train_epoch_end=monitor == "metric")
    if epochs < 4:  # stopped before the last update: the callback says so
        with pytest.warns(UserWarning, match="stopped before the last update"):
            trainer = fit(model, sparse_from(4), stop, max_epochs=9)
    else:
        trainer = fit(model, callback, stop, max_epochs=9)
        assert_pruned(model, callback)
    assert trainer.current_epoch == epochs
    assert stop.best_score == epochs - 3


@pytest.mark.parametrize(
    ("judge", "told"),
    [
        (lambda: ModelCheckpoint(monitor="val_metric"), "ModelCheckpoint"),
        (lambda: EarlyStopping("val_metric"), "EarlyStopping"),
        (lambda: ModelCheckpoint(), None),
        (lambda: ModelCheckpoint(monitor="val_metric", save_top_k=-1), None),
        (lambda: SparseModelCheckpoint(monitor="val_metric"), None),
        (lambda: SparseEarlyStopping("val_metric"), None),
    ],
)
def test_what_may_take_the_dense_model_for_the_best_is_told_when_fit_starts(
    judge: Callable[[], Any], told: str | None, tmp_path: Path
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Worse(), sparse_from(1), judge(), max_epochs=1, enable_checkpointing=True, default_root_dir=tmp_path)
        prune(model := Worse(), 0.5)
        fit(model, ConstantSparsity(), judge(), max_epochs=1, enable_checkpointing=True, default_root_dir=tmp_path)
    found = [str(warning.message) for warning in caught if "for the best" in str(warning.message)]
    expected = (
        f"{told} may take the model for the best before MagnitudePruning has reached its target: use "
        f"SparseModelCheckpoint and SparseEarlyStopping, which wait for it"
    )
    assert found == [expected] * (told is not None)


def test_all_callbacks_have_to_reach_their_targets(tmp_path: Path) -> None:
    saver = SparseModelCheckpoint(tmp_path, "{epoch}", monitor="val_metric")
    pruning = [sparse_from(1, targets=("net.0.*",)), sparse_from(3, targets=("net.3.*",))]
    fit(Worse(), pruning[0], saver, pruning[1], max_epochs=5, enable_checkpointing=True)
    assert Path(saver.best_model_path).name == "epoch=3.ckpt"


def test_constant_sparsity_is_judged_from_the_start(tmp_path: Path) -> None:
    model = Worse()
    prune(model, 0.5)
    saver = SparseModelCheckpoint(tmp_path, "{epoch}", monitor="val_metric")
    fit(model, ConstantSparsity(), saver, SparseEarlyStopping("val_metric", patience=2), enable_checkpointing=True)
    assert Path(saver.best_model_path).name == "epoch=0.ckpt"


def test_nothing_is_saved_before_the_target(tmp_path: Path) -> None:
    saver = SparseModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    callback = MagnitudePruning(0.5, schedule="linear", start=0, end=8)
    fit(Worse(), callback, saver, enable_checkpointing=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step={step}.ckpt" for step in (10, 11, 12, 8, 9)]
    saver = SparseModelCheckpoint(tmp_path / "none", "{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.warns(UserWarning, match="will not reach"), pytest.warns(UserWarning, match="before the last update"):
        fit(Worse(), MagnitudePruning(0.5, start=0, end=99), saver, enable_checkpointing=True)
    assert not list(tmp_path.glob("none/*"))


@pytest.mark.parametrize("epoch", range(4))
def test_what_was_judged_is_known_after_a_resume(epoch: int, tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        best = SparseModelCheckpoint(tmp_path / "best", "{epoch}", monitor="val_metric")
        return [sparse_from(2), best, SparseEarlyStopping("val_metric", patience=2)]

    everything = ModelCheckpoint(tmp_path / "all", "{epoch}", every_n_epochs=1, save_top_k=-1)
    fit(Worse(), *callbacks(), everything, max_epochs=epoch + 1, enable_checkpointing=True) if epoch > 1 else None
    if epoch < 2:
        with pytest.warns(UserWarning, match="not reach"), pytest.warns(UserWarning, match="before the last update"):
            fit(Worse(), *callbacks(), everything, max_epochs=epoch + 1, enable_checkpointing=True)
    pruning, best, stop = callbacks()
    path = str(tmp_path / "all" / f"epoch={epoch}.ckpt")
    trainer = fit(Worse(), pruning, best, stop, ckpt_path=path, max_epochs=9, enable_checkpointing=True)
    assert trainer.current_epoch == 5
    assert Path(best.best_model_path).name == "epoch=2.ckpt"
    assert best.best_model_score == stop.best_score == 2


@pytest.mark.filterwarnings("ignore:SparseModelCheckpoint finds no pruning callback")
def test_a_sparse_model_is_judged_without_a_pruning_callback(tmp_path: Path) -> None:
    saver = SparseModelCheckpoint(tmp_path, "{epoch}", monitor="val_metric")
    fit(Worse(), saver, enable_checkpointing=True)
    assert Path(saver.best_model_path).name == "epoch=0.ckpt"
