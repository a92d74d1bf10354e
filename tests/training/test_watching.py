"""Sparsity in the logger, in both progress bars and in tables; the plan before training."""

import csv
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from models import MLP, MaskRecorder, On, fit, size, zeros

from lightning_prune import (
    Channel,
    ConstantSparsity,
    Entropy,
    MagnitudePruning,
    Pruning,
    RandomPruning,
    prune,
    sparsity,
    summary,
)


def logged(folder: Path, *callbacks: Callback, **trainer: Any) -> tuple[MLP, list[dict[str, float]]]:
    """Fit with a CSVLogger; return the model and, for each training step, what was logged."""
    model, logger = MLP(), CSVLogger(folder)
    fit(model, *callbacks, logger=logger, **trainer)
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return model, [row for row in rows if "loss_step" in row]


def test_the_logger_gets_the_sparsity_that_the_masks_have_after_each_step(tmp_path: Path) -> None:
    callback = MagnitudePruning(0.8, start=1, end=6, frequency=2)
    recorder = MaskRecorder(callback)
    model, rows = logged(tmp_path, callback, recorder)

    found = [row["pruning/sparsity"] for row in rows]
    assert found == pytest.approx([count / size(model) for count in recorder.counts[1:]], abs=1e-6)
    assert found[0] == 0.0
    assert found[-1] == pytest.approx(zeros(model) / size(model), abs=1e-6)
    assert not any(name.startswith("pruning/sparsity/") for name in rows[0])


@pytest.mark.parametrize("granularity", [None, Channel()], ids=["weight", "channel"])
def test_each_layer_is_logged_on_request(granularity: Channel | None, tmp_path: Path) -> None:
    more = {"granularity": granularity, "targets": ["net.*"]} if granularity else {}
    model, rows = logged(tmp_path, Pruning(0.6, log_layers=True, **more))
    layers = {name: value for name, value in rows[-1].items() if name.startswith("pruning/sparsity/")}
    assert layers.keys() == {f"pruning/sparsity/{name}.weight" for name in ("net.0", "net.4", "net.6")}
    for name, value in layers.items():
        weight = model.get_parameter(name.removeprefix("pruning/sparsity/"))
        assert value == pytest.approx(float((weight == 0).float().mean()), abs=1e-6)
    total = sum(value * model.get_parameter(name[17:]).numel() for name, value in layers.items()) / size(model)
    assert rows[-1]["pruning/sparsity"] == pytest.approx(total, abs=1e-6)


def test_constant_sparsity_is_logged_too(tmp_path: Path) -> None:
    folder, callback = tmp_path, ConstantSparsity(log_layers=True)
    model, logger = MLP(), CSVLogger(folder)
    prune(model, 0.7)
    trainer = fit(model, callback, logger=logger)
    assert trainer.logged_metrics["pruning/sparsity"] == pytest.approx(sparsity(model), abs=1e-6)
    assert trainer.logged_metrics["pruning/sparsity/net.0.weight"] > 0


def test_two_callbacks_have_a_name_each(tmp_path: Path) -> None:
    first = MagnitudePruning(0.5, targets=("net.0.*",))
    second = RandomPruning(0.8, targets=("net.4.*",))
    _, rows = logged(tmp_path, first, second)
    assert rows[-1]["pruning/sparsity/net.0.*"] == pytest.approx(0.5)
    assert rows[-1]["pruning/sparsity/net.4.*"] == pytest.approx(0.8)


def test_callbacks_of_one_class_are_logged_apart_by_what_they_ignore() -> None:
    callbacks = [MagnitudePruning(0.5, ignore=("net.0.*",)), MagnitudePruning(0.8, ignore=("net.4.*", "net.6.*"))]
    found = fit(MLP(), *callbacks).logged_metrics
    assert found["pruning/sparsity/MagnitudePruning but net.0.*"] == pytest.approx(0.5)
    assert found["pruning/sparsity/MagnitudePruning but net.4.*,net.6.*"] == pytest.approx(0.8, abs=0.01)


def test_the_metric_is_there_for_callbacks_and_progress_bars() -> None:
    callback, seen = MagnitudePruning(0.8, start=1, end=6), []
    note = On(
        on_train_batch_end=lambda trainer, *a: seen.append(
            [
                float(metrics["pruning/sparsity"])
                for metrics in (trainer.callback_metrics, trainer.progress_bar_metrics, trainer.logged_metrics)
            ]
        )
    )
    trainer = fit(MLP(), callback, note)
    assert len(seen) == 8
    assert all(one == two == three for one, two, three in seen)
    assert seen[-1][0] == pytest.approx(callback.sparsity_now) == round(0.8 * 158) / 158
    assert trainer.callback_metrics["pruning/sparsity"] == pytest.approx(0.8, abs=0.01)


def test_sparsity_now_is_the_fraction_at_each_moment() -> None:
    callback = MagnitudePruning(0.8, start=1, end=6, frequency=1)
    assert callback.sparsity_now == 0.0
    model, pairs = MLP(), []
    watch = On(
        on_train_batch_start=lambda *a: pairs.append((callback.sparsity_now, zeros(model) / size(model))),
        on_validation_end=lambda *a: pairs.append((callback.sparsity_now, zeros(model) / size(model))),
    )
    fit(model, callback, watch)
    assert len({now for now, _ in pairs}) == 6
    assert all(now == counted for now, counted in pairs)


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_progress_bars_show_the_sparsity(
    bar: type[Callback], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    model = MLP()
    fit(model, MagnitudePruning(0.8), bar(), enable_progress_bar=True)
    captured = capsys.readouterr()
    shown = re.findall(r"pruning/sparsity[:=]\s*([\d.]+)", captured.out + captured.err)
    assert shown, captured.out + captured.err
    assert float(shown[-1]) == pytest.approx(zeros(model) / size(model), abs=0.006)


# ------------------------------------------------------------------------------------------------------ the plan


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """What has been logged until now at level INFO."""
    caplog.set_level(logging.INFO)
    return lambda: "\n".join(caplog.messages)


def test_the_plan_is_told_before_training(told: Callable[[], str]) -> None:
    early = []
    note = On(on_train_batch_start=lambda *a: early.append(told()))
    callback = MagnitudePruning(0.8, schedule="linear", start=2, end=6, frequency=2, ignore=("net.6.*",))
    fit(MLP(), callback, note)

    plan = early[0]
    assert "MagnitudePruning to sparsity 0.8: 2 parameters, 128 weights" in plan
    assert re.search(r"net\.0\.weight +8 x 6 +48\n", plan)
    assert re.search(r"net\.4\.weight +10 x 8 +80\n", plan)
    assert "net.6.weight" not in plan
    assert re.search(r"2 updates, .*step.*: 4 \(40\.0%\), 6 \(80\.0%\)", plan)
    assert told().count("MagnitudePruning to sparsity") == 1


def test_the_plan_of_a_threshold_and_of_epochs(told: Callable[[], str]) -> None:
    callback = Pruning(threshold=0.1, criterion=Entropy(window=1), start=0, end=1, interval="epoch", schedule="linear")
    fit(MLP(), callback)
    assert "Pruning to threshold 0.1: 3 parameters, 158 weights" in told()
    assert re.search(r"1 updates?, .*epoch.*: 1 \(100\.0%\)", told())


def test_a_long_plan_is_shortened(told: Callable[[], str]) -> None:
    fit(MLP(), MagnitudePruning(0.9, start=0, end=16, schedule="linear"), max_epochs=4)
    line = next(line for line in told().splitlines() if "updates" in line)
    assert line.startswith("16 updates")
    assert "..." in line
    assert line.endswith("16 (90.0%)")
    assert line.count("%") < 10


# ------------------------------------------------------------------------------------------------------ tables


def test_summary_is_a_table_with_a_row_for_each_layer_and_a_total(capsys: pytest.CaptureFixture[str]) -> None:
    model = MLP()
    fit(model, MagnitudePruning(0.75))
    capsys.readouterr()
    result = summary(model)

    printed = capsys.readouterr().out
    assert printed.rstrip("\n") == str(result)
    lines = printed.rstrip("\n").split("\n")
    assert lines[0].split() == ["name", "shape", "weights", "zeros", "sparsity"]
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    for name, shape in (("net.0.weight", "8 x 6"), ("net.4.weight", "10 x 8"), ("net.6.weight", "3 x 10")):
        weight = model.get_parameter(name)
        count = int((weight == 0).sum())
        row = next(line for line in lines if line.startswith(name))
        expected = [name, *shape.split(), str(weight.numel()), str(count), f"{count / weight.numel():.2%}"]
        assert row.split() == expected
    assert lines[-1].split() == ["total", "158", str(zeros(model)), f"{zeros(model) / 158:.2%}"]
    assert result.total.zeros == round(0.75 * 158)
    assert result.total.weights == 158
    assert [row.name for row in result.rows] == ["net.0.weight", "net.4.weight", "net.6.weight"]
    assert sparsity(model) == result.total.sparsity == zeros(model) / 158


def test_summary_takes_patterns() -> None:
    model = MLP()
    prune(model, 0.5, targets=("net.4.*",))
    assert [row.name for row in summary(model, ignore=("net.4.*",)).rows] == ["net.0.weight", "net.6.weight"]
    assert sparsity(model, targets=("net.4.*",)) == 0.5
    assert sparsity(model, ignore=("net.4.*",)) == 0.0
    assert sparsity(model) == pytest.approx(40 / 158)


def test_a_model_for_inference_can_be_summed_up() -> None:
    model = MLP()
    prune(model, 0.5)
    model.freeze()
    assert sparsity(model) == 0.5
    with torch.inference_mode():
        assert summary(model).total.zeros == 79


# ------------------------------------------------------------------------------------------------ short runs


def test_fractions_that_leave_fewer_than_three_updates_are_a_warning() -> None:
    said = (
        "MagnitudePruning has 2 updates for its schedule, which prunes a large part in one step: start=0.1 and end=0.7 "
        "are the epochs 0 and 2 of this run: train longer, count steps, or move start and end apart"
    )
    with pytest.warns(UserWarning, match=re.escape(said)):
        fit(MLP(), MagnitudePruning(0.5, interval="epoch"), max_epochs=3)
    with pytest.warns(UserWarning, match="RandomPruning has 1 update for its schedule"):
        fit(MLP(), RandomPruning(0.5, start=0.5, end=0.5), max_epochs=1)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"schedule": "one_shot", "start": 0.5}, {"start": 1, "end": 2}],
    ids=["enough", "one_shot", "counted"],
)
def test_no_warning_where_updates_are_enough_or_counted_by_hand(
    arguments: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    fit(MLP(), MagnitudePruning(0.5, **arguments), max_epochs=2)
    assert not [warning for warning in recwarn if "for its schedule" in str(warning.message)]
