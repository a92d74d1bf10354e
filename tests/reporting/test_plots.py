"""Plots: what is drawn is what was measured, labels name it, and sixty layers do not overlap."""

import builtins
from typing import Any

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn

from lightning_prune import (
    History,
    MagnitudePruning,
    SensitivityAnalysis,
    plot_history,
    plot_masks,
    plot_schedule,
    plot_sensitivity,
    plot_sparsity,
    prune,
    summary,
)


@pytest.fixture(autouse=True)
def headless() -> None:
    mpl.use("Agg")


def deep(layers: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))


def analysis(layers: int) -> SensitivityAnalysis:
    names = [f"encoder.layers.{layer}.attention.output_projection.weight" for layer in range(layers)]
    return SensitivityAnalysis(
        "val_acc", "max", 0.9, {name: {0.5: 0.89, 0.9: 0.5 + i / 200} for i, name in enumerate(names)}
    )


def texts(ax: Any) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


HISTORY = History([(0, 0.0), (10, 0.5), (20, 0.8)], {"val_acc": [(5, 0.9), (15, 0.7), (25, 0.8)]})
PLOTS = {
    "schedule": lambda ax: plot_schedule(MagnitudePruning(0.9), 100, ax),
    "sparsity": lambda ax: plot_sparsity(deep(3), ax),
    "history": lambda ax: plot_history(HISTORY, "val_acc", ax),
    "sensitivity": lambda ax: plot_sensitivity(analysis(3), ax),
    "masks": lambda ax: plot_masks({"weight": torch.eye(3).bool()}, ax),
}


@pytest.mark.parametrize("name", PLOTS)
def test_each_returns_figure_and_axes_and_draws_where_it_is_told(name: str) -> None:
    fig, _ = PLOTS[name](None)
    assert isinstance(fig, plt.Figure)
    fig, given = plt.subplots()
    count = len(plt.get_fignums())
    found, ax = PLOTS[name](given)
    assert found is fig
    assert (ax[0] if isinstance(ax, list) else ax) is given
    assert given.has_data()
    assert len(plt.get_fignums()) == count


@pytest.mark.parametrize("name", ["schedule", "sparsity", "history", "sensitivity"])
def test_axes_are_labelled(name: str) -> None:
    _, ax = PLOTS[name](None)
    assert ax.get_xlabel()
    assert ax.get_ylabel() or texts(ax)


# ------------------------------------------------------------------------------------------------ what is drawn


def test_the_schedule_is_that_of_the_callback() -> None:
    callback = MagnitudePruning(0.8, schedule="linear", start=2, end=6, frequency=2, interval="epoch")
    _, ax = plot_schedule(callback, length=10)
    x, y = ax.lines[0].get_data()
    assert list(x) == [0, 4, 6, 10]
    assert list(y) == pytest.approx([0, 0.4, 0.8, 0.8])
    assert ax.lines[0].get_drawstyle() == "steps-post"
    assert ax.get_xlabel() == "epoch"
    plot_schedule(MagnitudePruning({"*": 0.5}, schedule="one_shot", start=0.5), 10, ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["linear, 2 updates", "one_shot, 1 update"]
    assert list(ax.lines[1].get_data()[1]) == [0, 1, 1]


def test_bars_are_as_long_as_the_sparsity() -> None:
    model = deep(3)
    prune(model, {"0.*": 0.25, "1.*": 0.75, "2.*": 0.0})
    for given in (model, summary(model)):
        _, ax = plot_sparsity(given)
        assert [bar.get_width() for bar in ax.patches] == [0.25, 0.75, 0.0]
        assert texts(ax) == ["0.weight", "1.weight", "2.weight"]
        assert ax.get_ylim() == (2.5, -0.5)  # the first on top
        assert ax.lines[0].get_xdata()[0] == pytest.approx(1 / 3)
        assert ax.get_legend().get_texts()[0].get_text() == "total 33.3%"


def test_history_has_the_sparsity_and_the_metric_on_axes_of_their_own() -> None:
    fig, ax = plot_history(HISTORY, "val_acc")
    assert [list(column) for column in ax.lines[0].get_data()] == [[0, 10, 20, 25], [0.0, 0.5, 0.8, 0.8]]
    [beside] = [other for other in fig.axes if other is not ax]
    assert [list(column) for column in beside.lines[0].get_data()] == [[5, 15, 25], [0.9, 0.7, 0.8]]
    assert beside.get_ylabel() == "val_acc"
    fig, ax = plot_history(HISTORY)
    assert fig.axes == [ax]
    plot_history(History(), None)
    with pytest.raises(ValueError, match=r"metric must be one of the recorded metrics \['val_acc'\], got 'acc'"):
        plot_history(HISTORY, "acc")


def test_sensitivity_shows_every_drop() -> None:
    fig, ax = plot_sensitivity(analysis(2))
    assert ax.images[0].get_array().tolist() == [pytest.approx([0.01, 0.4]), pytest.approx([0.01, 0.395])]
    assert [text.get_text() for text in ax.texts] == ["0.010", "0.400", "0.010", "0.395"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["50%", "90%"]
    assert fig.axes[1].get_ylabel() == "degradation of val_acc"
    nothing = SensitivityAnalysis("loss", "min", 2.0, {"a": {0.5: 1.5}, "b": {0.5: float("nan")}})
    _, ax = plot_sensitivity(nothing)
    assert [text.get_text() for text in ax.texts] == ["-0.500", "nan"]


def test_masks_are_pictures_of_themselves() -> None:
    masks = {"a": torch.eye(4).bool(), "bias": torch.ones(4).bool(), "conv": torch.zeros(2, 3, 2, 2).bool()}
    _, axes = plot_masks(masks)
    assert [ax.get_title() for ax in axes] == ["a\n75.0% pruned", "conv\n100.0% pruned"]
    assert torch.equal(torch.tensor(axes[0].images[0].get_array().data), torch.eye(4))
    assert axes[1].images[0].get_array().shape == (2, 12)
    # a cell of a large one is the part of it that is kept
    large = torch.zeros(512, 1024).bool()
    large[:, :512:2] = True
    picture = plot_masks({"large": large})[1][0].images[0].get_array()
    assert picture.shape == (128, 128)
    assert (picture[:, :64] == 0.5).all()
    assert (picture[:, 64:] == 0).all()
    with pytest.raises(ValueError, match=r"masks must contain one of two or more dimensions, got \['bias'\]"):
        plot_masks({"bias": torch.ones(3).bool()})
    with pytest.raises(ValueError, match="ax must be one for each of 2 masks, got 1"):
        plot_masks(masks, plt.subplots()[1])


def test_the_metric_has_its_dense_value_and_an_axis_that_does_not_dramatise() -> None:
    history = History([(0, 0.0), (10, 0.5)], {"acc": [(5, 0.900), (9, 0.901), (15, 0.899)]})
    fig, ax = plot_history(history, "acc")
    [beside] = [other for other in fig.axes if other is not ax]
    assert list(beside.lines[1].get_ydata()) == [0.901, 0.901]
    low, high = beside.get_ylim()
    assert high - low >= 0.09
    assert ax.get_title(loc="left") == "acc and sparsity"


def test_empty_layers_stand_out_and_noise_stays_pale() -> None:
    model = deep(3)
    nn.init.zeros_(model[1].weight)
    _, ax = plot_sparsity(model)
    colours = [bar.get_facecolor() for bar in ax.patches[:3]]
    assert colours[0] == colours[2] != colours[1]
    assert "empty" in [text.get_text() for text in ax.get_legend().get_texts()]
    _, ax = plot_sensitivity(SensitivityAnalysis("acc", "max", 0.9, {"a": {0.5: 0.8999}}))
    assert ax.images[0].get_clim() == pytest.approx((-0.009, 0.009))


def test_masks_fit_a_page_with_a_scale() -> None:
    fig, axes = plot_masks({f"layer{i}": torch.eye(4).bool() for i in range(90)})
    assert len(axes) == 80
    assert fig.get_suptitle() == "Masks: the first 80 of 90"
    width, height = fig.get_size_inches()
    assert width <= 8
    assert height <= 10.5
    assert len(fig.axes) == 81  # the scale


# ------------------------------------------------------------------------------------------------ readable


def overlapping(fig: Any, artists: list[Any]) -> list[str]:
    """Return the labels that run into the one below them, or out of the figure."""
    fig.draw_without_rendering()
    boxes = [artist.get_window_extent() for artist in artists]
    found = [artist.get_text() for artist, box in zip(artists, boxes, strict=True) if box.x0 < 0 or box.y0 < 0]
    for i, box in enumerate(boxes):
        found += [artists[i].get_text() for other in boxes[:i] if box.overlaps(other)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 3, 60])
def test_no_label_runs_into_another(layers: int) -> None:
    long_names = nn.Module()
    for layer in range(layers):
        name = f"encoder_layers_{layer:02}_attention_output_projection"
        setattr(long_names, name, nn.Linear(4, 4))
    for fig, ax in (plot_sparsity(long_names), plot_sensitivity(analysis(layers))):
        assert len(set(texts(ax))) == layers
        assert not overlapping(fig, ax.get_yticklabels())
    fig, axes = plot_masks({f"encoder.layers.{i}.attention.output.weight": torch.eye(4).bool() for i in range(layers)})
    assert len({ax.get_title() for ax in axes}) == layers
    assert not overlapping(fig, [ax.title for ax in axes])


LONG = "validation/accuracy_among_the_top_5_of_the_whole_set"


def every_other(layers: int) -> nn.Sequential:
    """A model whose layers are empty, nearly empty, or close to the total sparsity."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers)))
    for at, layer in enumerate(model):
        prune(layer, (0.69, 0.72, 0.996, 0.4, 0.66)[at % 5])
    nn.init.zeros_(model[0].weight)
    return model


def late(layers: int) -> Any:
    fig, ax = plot_schedule(MagnitudePruning(0.9, schedule="one_shot", start=95), 100)
    plot_schedule(MagnitudePruning(0.9, schedule="cubic", start=0, end=90), 100, ax)
    return fig, ax


@pytest.mark.parametrize("layers", [5, 60])
@pytest.mark.parametrize("name", ["sparsity", "sensitivity", "history", "schedule"])
def test_labels_cover_nothing_and_stay_in_the_figure(name: str, layers: int) -> None:
    dropped = SensitivityAnalysis(LONG, "max", 0.9, analysis(layers).scores)
    history = History([(0, 0.0), (10, 0.5)], {LONG: [(5, 0.9), (15, 0.8)]})
    plots: dict[str, Any] = {
        "sparsity": lambda: plot_sparsity(every_other(layers)),
        "sensitivity": lambda: plot_sensitivity(dropped),
        "history": lambda: plot_history(history, LONG),
        "schedule": lambda: late(layers),
    }
    fig, ax = plots[name]()
    fig.draw_without_rendering()
    shown = [text for text in labels(fig) if text.get_text() and text.get_visible()]
    boxes = [text.get_window_extent() for text in shown]
    for i, box in enumerate(boxes):
        assert fig.bbox.x0 <= box.x0 < box.x1 <= fig.bbox.x1, shown[i]
        assert fig.bbox.y0 <= box.y0 < box.y1 <= fig.bbox.y1, shown[i]
        assert not [shown[j] for j in range(i) if box.overlaps(boxes[j])], shown[i]
        for line in ax.lines:  # those of the legend are not among them
            path = line.get_transform().transform_path(line.get_path())
            assert not path.intersects_bbox(box, filled=False), shown[i]


def labels(fig: Any) -> list[Any]:
    """Return all texts of a figure but those of ticks beyond the limits of their axis."""
    found = fig.findobj(mpl.text.Text)
    for axis in (axis for ax in fig.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        drawn = zip(axis.get_major_ticks(), axis.get_majorticklocs(), strict=True)
        kept = {tick for tick, at in drawn if low <= at <= high}
        hidden = {
            text for tick in axis.findobj(mpl.axis.Tick) if tick not in kept for text in tick.findobj(mpl.text.Text)
        }
        found = [text for text in found if text not in hidden]
    return found


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    imports = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return imports(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(
        ModuleNotFoundError, match=r"plots need matplotlib: pip install '\.\[plots\]' in the repository"
    ):
        plot_sparsity(deep(1))
