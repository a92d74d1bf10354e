"""The report of a run: what it records, what it writes, and how the page behaves in a real browser."""

import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import pytest
import torch
import yaml
from command_line import Fit
from distributed import Layout, Net
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib import pyplot as plt
from models import MLP, QUIET, fit, size, zeros
from ranks import run
from torch import nn
from variants import square_root

from lightning_prune import (
    ERK,
    Channel,
    ConstantSparsity,
    Criterion,
    Distillation,
    Entropy,
    EntropyPruning,
    GuardedPruning,
    MagnitudePruning,
    Pruning,
    PruningReport,
    Random,
    SparseModelCheckpoint,
)
from lightning_prune.reporting import html_page
from lightning_prune.reporting.figure_logging import log_figures
from lightning_prune.reporting.html_tables import layers_table
from lightning_prune.reporting.yaml_config import arguments_of, as_yaml, plain

LINEAR: dict[str, Any] = {"schedule": "linear", "start": 0, "end": 8, "frequency": 4}


class Example(MLP):
    """Has an example input, and a metric whose name has to be escaped."""

    example_input_array = torch.zeros(2, 6)
    logs_loss = True

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("acc<b>&", (self(batch[0]).argmax(1) == batch[1]).float().mean())


class Deep(Example):
    """Has sixty layers with weights."""

    def build(self, dropout: float) -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, 8), *(nn.Linear(8, 8) for _ in range(58)), nn.Linear(8, 3))


class Named(Example):
    """Has a layer whose name is longer than the screen of a phone is wide."""

    def build(self, dropout: float) -> nn.Sequential:
        layers = nn.Sequential()
        layers.add_module("self_attention_output_projection_of_the_last_encoder_layer", nn.Linear(6, 2048))
        layers.add_module("head", nn.Linear(2048, 3))
        return layers


class Wide(MLP):
    """Has sixty layers, whose masks are as large as pictures get."""

    logs_loss = True

    def build(self, dropout: float) -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, 192), *(nn.Linear(192, 192) for _ in range(58)), nn.Linear(192, 3))


def written(folder: Path, model: nn.Module | None = None, *callbacks: Any, **trainer_kwargs: Any) -> dict[str, Any]:
    """Fit with a report and return what it has written as JSON."""
    path = folder / "report.html"
    callbacks = callbacks or (MagnitudePruning(0.5, **LINEAR),)
    fit(model or Example(), *callbacks, PruningReport(str(path)), **{"max_epochs": 3, **trainer_kwargs})
    assert path.read_text().startswith("<!doctype html>")
    return json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put empty figures into the page: to draw them takes longer than all else."""
    monkeypatch.setattr(html_page, "as_svg", lambda figure: "<svg></svg>")


undrawn = pytest.mark.usefixtures("no_drawing")  # for tests that look at no picture


# ------------------------------------------------------------------------------------------------ what it records


@undrawn
def test_it_says_what_was_planned_what_happened_and_what_is_left(tmp_path: Path) -> None:
    model, callback = Example(), MagnitudePruning(0.5, ignore=("net.6.*",), **LINEAR)
    found = written(tmp_path, model, callback)
    assert (found["model"], found["steps"], found["epochs"]) == ("Example", 12, 3)
    assert found["history"]["sparsity"] == [[0, 0.0], [4, 0.25], [8, 0.5]]
    assert found["sparsity"] == callback.sparsity_now == 0.5
    assert [(row["name"], row["shape"], row["weights"]) for row in found["layers"]] == [
        ("net.0.weight", [8, 6], 48),
        ("net.4.weight", [10, 8], 80),
        ("net.6.weight", [3, 10], 30),
    ]
    assert sum(row["zeros"] for row in found["layers"]) == zeros(model) == 64
    assert {row["name"]: row["sparsity"] for row in found["layers"]}["net.6.weight"] == 0.0
    [told] = found["callbacks"]
    assert told["class_path"] == "lightning_prune.MagnitudePruning"
    assert told["plan"].startswith("MagnitudePruning to sparsity 0.5: 2 parameters, 128 weights\n")
    assert told["plan"].endswith("2 updates, step (sparsity): 4 (25.0%), 8 (50.0%)")
    assert (told["sparsity"], told["reached"]) == (0.5, True)
    before, after = found["before"], found["after"]
    total = sum(parameter.numel() for parameter in model.parameters())
    assert before["parameters"] == after["parameters"] == total
    assert before["active_parameters"] - after["active_parameters"] == pytest.approx(64, abs=8)  # a norm begins at zero
    assert after["active_parameters"] == total - 64
    assert after["bytes"] == 4 * total
    assert after["packed_bytes"] == 4 * (total - 64) + total / 8
    assert before["flops"] == after["flops"] == before["active_flops"] == 2 * 2 * size(model)
    assert after["active_flops"] == 2 * 2 * (size(model) - 64)


@undrawn
def test_metrics_are_recorded_at_the_step_at_which_they_were_logged(tmp_path: Path) -> None:
    seen: dict[str, list[list[float]]] = {"val_loss": [], "acc<b>&": [], "loss": []}

    class Seeing(Example):
        def on_validation_end(self) -> None:
            for name in ("val_loss", "acc<b>&"):
                seen[name].append([self.trainer.global_step, float(self.trainer.callback_metrics[name])])

        def on_train_epoch_end(self) -> None:
            seen["loss"].append([self.trainer.global_step, float(self.trainer.callback_metrics["loss"])])

    found = written(tmp_path, Seeing(), val_check_interval=0.5, num_sanity_val_steps=1)
    del seen["val_loss"][0], seen["acc<b>&"][0]  # of the sanity check
    assert [step for step, _ in seen["val_loss"]] == [2, 4, 6, 8, 10, 12]
    assert [step for step, _ in seen["loss"]] == [4, 8, 12]
    assert found["history"]["metrics"] == seen


@undrawn
def test_several_callbacks_are_recorded_together(tmp_path: Path) -> None:
    first = MagnitudePruning(0.5, targets=("net.0.*",), schedule="one_shot", start=2)
    second = Pruning(0.25, criterion=Random(), targets=("net.4.*",), schedule="one_shot", start=4)
    found = written(tmp_path, None, first, second)
    assert found["history"]["sparsity"] == [[0, 0.0], [2, pytest.approx(24 / 128)], [4, pytest.approx(44 / 128)]]
    assert [callback["sparsity"] for callback in found["callbacks"]] == [0.5, 0.25]


@undrawn
@pytest.mark.parametrize("callback", [ConstantSparsity(), GuardedPruning("val_loss", 9.0, "min", step=0.3)])
def test_every_pruning_callback_can_be_reported(callback: Any, tmp_path: Path) -> None:
    found = written(tmp_path, None, callback)
    assert found["callbacks"][0]["plan"].startswith(type(callback).__name__)
    assert found["sparsity"] == pytest.approx(callback.sparsity_now)


@undrawn
def test_a_metric_that_is_not_finite_is_null(tmp_path: Path) -> None:
    class Broken(Example):
        def on_validation_epoch_end(self) -> None:
            self.log("broken", float("nan"))

    found = written(tmp_path, Broken())
    assert found["history"]["metrics"]["broken"] == [[4, None], [8, None], [12, None]]
    assert "nan" not in (tmp_path / "report.html").read_text().partition("<svg")[0].lower()


@undrawn
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
def test_a_resumed_run_reports_all_of_it(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole = written(tmp_path / "whole", Example(), MagnitudePruning(0.5, **LINEAR), saver, enable_checkpointing=True)
    for epoch in (0, 1):
        path, rest = tmp_path / f"epoch={epoch}.ckpt", tmp_path / f"rest{epoch}.html"
        fit(Example(), MagnitudePruning(0.5, **LINEAR), PruningReport(str(rest)), ckpt_path=str(path), max_epochs=3)
        # the key of its state is its path: a report to another place starts over
        assert json.loads(rest.with_suffix(".json").read_text())["history"]["sparsity"][0][0] > 0
        again = written(tmp_path / "whole", Example(), MagnitudePruning(0.5, **LINEAR), ckpt_path=str(path))
        assert again == whole


@undrawn
def test_why_there_are_no_flops_is_said(tmp_path: Path) -> None:
    class Mistaken(MLP):
        example_input_array = torch.zeros(2, 5)

    def said(model: nn.Module) -> str:
        found = written(tmp_path, model, ConstantSparsity(), max_epochs=1)
        assert "flops" not in found["before"].keys() | found["after"].keys()
        [text] = re.findall("<p>FLOPs are not measured: (.*?)</p>", (tmp_path / "report.html").read_text())
        return text

    assert said(MLP()) == (
        "the model has no example input. Set example_input_array in the LightningModule to an input of forward."
    )
    assert said(Mistaken()).startswith("forward fails with the example_input_array: RuntimeError: ")
    written(tmp_path, None, ConstantSparsity(), max_epochs=1)
    assert "not measured" not in (tmp_path / "report.html").read_text()


def test_empty_layers_stand_out_in_the_table() -> None:
    def layer(name: str, zeros: int) -> dict[str, Any]:
        return {"name": name, "shape": [10, 10], "weights": 100, "zeros": zeros, "sparsity": zeros / 100}

    full = [layer("full", 10)] * 4
    table = layers_table([*full, layer("bare", 100), layer("scant", 98), layer("gone", 100)], False)
    assert '<tr style="--level:10.00%"><td>full</td>' in table
    assert table.count('<tr class="empty" style="--level:100.00%">') == 2
    assert "<td>bare <strong>empty</strong></td>" in table
    assert '<tr class="nearly-empty" style="--level:98.00%"><td>scant <strong>nearly empty</strong></td>' in table
    assert table.startswith(
        "<p>2 of 7 layers are empty and 1 is nearly empty, with at most 2 % of their weights left. With scope"
    )
    assert layers_table([layer("full", 10), layer("half", 50)], False).startswith("<table")


def test_sixty_layers_fit_into_300_kilobytes(tmp_path: Path) -> None:
    written(tmp_path, Wide(), MagnitudePruning(0.5, scope="local", schedule="one_shot", start=0), max_epochs=1)
    page = (tmp_path / "report.html").read_bytes()
    assert page.count(b"<img") == 60
    assert page.count(b"<svg") == 2
    assert len(page) <= 300_000


# ------------------------------------------------------------------------------------------------ the configuration


class Power(Criterion):
    """A user's criterion."""

    def __init__(self, exponent: float = 1.0) -> None:
        self.exponent = exponent

    def scores(self, units: Any) -> Any:
        return units.mean(lambda weight: weight.abs() ** self.exponent)


@undrawn
@pytest.mark.slow
@pytest.mark.parametrize(
    "callback",
    [
        MagnitudePruning({"net.4.*": 0.3, "*": 0.7}, start=1, end=2, interval="epoch"),
        EntropyPruning(0.5, prune="low", bins=8, window=2, start=0.25, end=1.0, ignore=("net.6.*",)),
        Pruning(0.6, criterion=Power(2.0), granularity=Channel(), scope="local", schedule=square_root, start=2),
        Pruning(threshold=0.1, criterion=Random(3), schedule="one_shot", start=0),
    ],
    ids=["magnitude", "entropy", "own", "threshold"],
)
def test_the_configuration_repeats_the_run(callback: Any, tmp_path: Path) -> None:
    model = Example()
    found = written(tmp_path, model, callback)
    (tmp_path / "config.yaml").write_text(found["config"])
    cli = Fit(
        Example,
        args=["fit", "--config", str(tmp_path / "config.yaml")],
        save_config_callback=None,
        seed_everything_default=0,
        trainer_defaults={name: value for name, value in QUIET.items() if name != "max_epochs"},
    )
    assert cli.trainer.global_step == found["steps"]
    assert type(cli.trainer.callbacks[0]) is type(callback)
    for name, value in model.state_dict().items():
        assert torch.equal(cli.model.state_dict()[name], value), name
    assert zeros(model) > 0


def test_arguments_are_those_that_differ_from_the_defaults() -> None:
    assert arguments_of(MagnitudePruning(0.9)) == {"sparsity": 0.9}
    assert arguments_of(MagnitudePruning(0.9, start=1, end=1)) == {"sparsity": 0.9, "start": 1, "end": 1}
    assert arguments_of(Pruning(0.5, criterion=Entropy())) == {"sparsity": 0.5, "criterion": Entropy()}
    assert plain(square_root) == "variants.square_root"
    assert plain({"a": (1, None)}) == {"a": [1, None]}
    assert as_yaml({}, []) == "trainer:\n  callbacks: []\n"
    assert plain(ERK()) == {"class_path": "lightning_prune.ERK"}, "an empty dict that a dataclass makes is a default"


@undrawn
def test_the_configuration_has_what_decides_over_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    arguments: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "max_epochs": 1}
    callbacks = (MagnitudePruning(0.5, start=0, end=2), Distillation(nn.Linear(6, 3), weight=0.25))
    found = yaml.safe_load(written(tmp_path, None, *callbacks, **arguments)["config"])
    assert found["seed_everything"] == 7
    pruning, distillation = found["trainer"].pop("callbacks")
    assert found["trainer"] == {**arguments, "precision": "32-true"}
    assert pruning["init_args"] == {"sparsity": 0.5, "start": 0, "end": 2}
    teacher = {"class_path": "torch.nn.modules.linear.Linear"}
    assert distillation == {
        "class_path": "lightning_prune.Distillation",
        "init_args": {"teacher": teacher, "weight": 0.25},
    }


# ------------------------------------------------------------------------------------------------ where and how


@undrawn
def test_the_page_goes_where_the_logs_are(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"default_root_dir": tmp_path / "root", "max_epochs": 1}
    fit(MLP(), MagnitudePruning(0.5, start=0, end=1), PruningReport(), **arguments)
    assert (tmp_path / "root/pruning_report.html").exists()
    logger = CSVLogger(tmp_path, name="logs")
    fit(MLP(), MagnitudePruning(0.5, start=0, end=1), PruningReport(), **arguments, logger=logger)
    assert Path(logger.log_dir, "pruning_report.json").exists()


def test_wrong_paths_and_a_missing_package_are_told_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"path must end in .html, got report.pdf"):
        PruningReport("report.pdf")
    model = MLP()
    monkeypatch.setattr("lightning_prune.reporting.run_report.find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError,
        match=r"PruningReport needs matplotlib: pip install '\.\[plots\]' in the repository",
    ):
        fit(model, PruningReport())
    assert model.trainer.global_step == 0


def test_a_pruning_callback_behind_the_report_is_refused(tmp_path: Path) -> None:
    report = PruningReport(str(tmp_path / "report.html"))
    with pytest.raises(ValueError, match="PruningReport must come after MagnitudePruning in callbacks"):
        fit(MLP(), report, MagnitudePruning(0.5))


@undrawn
@pytest.mark.slow
def test_another_fit_begins_another_history(tmp_path: Path) -> None:
    report = PruningReport(str(tmp_path / "report.html"))
    fit(Deep(), MagnitudePruning(0.5, **LINEAR), report, max_epochs=3)
    fit(Example(), MagnitudePruning(0.5, **LINEAR), report, max_epochs=3)
    again = json.loads((tmp_path / "report.json").read_text())
    assert again == written(tmp_path)


@pytest.fixture
def tensorboard(tmp_path: Path) -> TensorBoardLogger:
    pytest.importorskip("tensorboard")
    return TensorBoardLogger(tmp_path)


def images(logger: TensorBoardLogger) -> dict[str, list[tuple[int, bytes]]]:
    """What TensorBoard reads of the pictures in a folder: by tag, the step and the file of each."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(logger.log_dir, {"images": 0}).Reload()
    return {tag: [(i.step, i.encoded_image_string) for i in events.Images(tag)] for tag in events.Tags()["images"]}


@pytest.mark.slow
def test_figures_go_to_loggers_that_take_them(tensorboard: TensorBoardLogger, tmp_path: Path) -> None:
    report = PruningReport(str(tmp_path / "report.html"), log_figures=True)
    fit(Example(), MagnitudePruning(0.5, **LINEAR), report, logger=[CSVLogger(tmp_path), tensorboard], max_epochs=3)
    assert not plt.get_fignums()
    found = images(tensorboard)
    assert found.keys() == {f"pruning/{name}" for name in ("val_loss", "acc<b>&", "loss", "sparsity", "masks")}
    for entries in found.values():
        [(step, png)] = entries
        picture = plt.imread(io.BytesIO(png))
        assert step == 12
        assert (picture[0, 0, :3] == 1).all(), "not white, as what is drawn for the page"
        assert picture.std() > 0.05  # there is something on it


@undrawn
def test_figures_are_logged_only_if_asked_for(tensorboard: TensorBoardLogger, tmp_path: Path) -> None:
    fit(Example(), MagnitudePruning(0.5, **LINEAR), PruningReport(), logger=tensorboard, max_epochs=3)
    assert Path(tensorboard.log_dir, "pruning_report.html").exists()
    assert not images(tensorboard)
    report = PruningReport(str(tmp_path / "other.html"), log_figures=True)
    with pytest.warns(UserWarning, match="log_figures needs a logger that takes figures"):
        fit(MLP(), MagnitudePruning(0.5, start=0, end=1), report, max_epochs=1)


def test_weights_and_biases_and_mlflow_are_called_by_their_own_names() -> None:
    calls: list[tuple[Any, ...]] = []

    class Wandb:
        def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
            calls.append((key, images, step))

    class Client:
        def log_figure(self, run_id: str, figure: Any, artifact_file: str) -> None:
            calls.append((run_id, figure, artifact_file))

    class MLFlow:
        experiment, run_id = Client(), "run"

    figure = plt.figure()
    log_figures([Wandb(), MLFlow()], {"acc<b>": figure}, 12)
    assert calls == [("pruning/acc<b>", [figure], 12), ("run", figure, "pruning/acc_b_.png")]


@undrawn
def test_a_report_and_a_checkpoint_without_a_pruning_callback_say_so(tmp_path: Path) -> None:
    said = "finds no pruning callback in this run"
    with pytest.warns(UserWarning, match=f"PruningReport {said}: it reports the zeros that the model has"):
        fit(MLP(), PruningReport(str(tmp_path / "report.html")), max_epochs=1)
    saver = SparseModelCheckpoint(tmp_path, monitor="val_loss")
    with pytest.warns(UserWarning, match=f"SparseModelCheckpoint {said}: it judges every model"):
        fit(MLP(), saver, enable_checkpointing=True, max_epochs=1)


# ------------------------------------------------------------------------------------------------ several ranks


def reported(layout: Layout, folder: Path) -> bool:
    model = Net(layout)
    callback, report = Pruning(0.5, schedule="linear", start=0, end=4), PruningReport(str(folder / f"{layout}.html"))
    distributed.fit(model, callback, report)
    return torch.distributed.get_rank() == 0


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_two_ranks_write_the_page_of_one(layout: Layout, tmp_path: Path) -> None:
    run(reported, 1, "one", tmp_path)
    assert run(reported, 2, layout, tmp_path) == [True, False]
    [one, two] = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", layout)]
    assert one["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert two == one


# ------------------------------------------------------------------------------------------------ in a browser


OFFLINE = ("--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("needs chromium on the PATH: apt-get install chromium")
    profile = f"--user-data-dir={tmp_path_factory.mktemp('profile')}"
    done = subprocess.run([found, *OFFLINE, profile, "--dump-dom", "about:blank"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{found} does not start here: {done.stderr[-300:]}")
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    written(folder, Example(), Pruning({"net.0.*": 0.25, "*": 0.5}, **LINEAR))
    return folder / "report.html"


def browse(chromium: str, page: Path, *options: str, script: str = "") -> str:
    """Open a page from the disk, without a network, run a script in it, and return the document that is there then."""
    if script:
        page = page.with_name("scripted.html")
        page.write_text(
            page.with_name("report.html").read_text().replace("</body>", f"<script>{script}</script></body>")
        )
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [chromium, *OFFLINE, profile, "--enable-logging=stderr", *options, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert ":CONSOLE" not in done.stderr, done.stderr  # an error of a script, or something that did not load
    return done.stdout


class Cells(HTMLParser):
    """The text of every cell of the table that can be sorted, by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        table = re.search(r'<table class="sortable">(.*?)</table>', text, re.DOTALL)
        assert table is not None
        self.feed(table[1])

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.rows[-1].append(data)


def test_the_page_opens_without_a_network(chromium: str, page: Path) -> None:
    source = page.read_text()
    assert not re.search(r"<(script|img|iframe|link|image)[^>]+(src|href)\s*=\s*[\"'](?!data:|#)", source)
    assert "@import" not in source
    shown = browse(chromium, page)
    assert "acc&lt;b&gt;&amp;" in shown
    assert "<b>" not in shown
    assert Cells(shown).rows[1:] == [
        ["net.0.weight", "8 x 6", "48", "12", "25.00%"],
        ["net.4.weight", "10 x 8", "80", "40", "50.00%"],
        ["net.6.weight", "3 x 10", "30", "15", "50.00%"],
        ["total", "158", "67", "42.41%"],
    ]
    assert shown.count("<svg") == 3  # the metrics
    assert shown.count('<img alt="mask of net.') == 3


@pytest.mark.parametrize(
    ("column", "clicks", "order", "state"), [(2, 1, "406", "descending"), (0, 2, "046", "ascending")]
)
def test_a_click_sorts_the_table(column: int, clicks: int, order: str, state: str, chromium: str, page: Path) -> None:
    click = f"document.querySelectorAll('table.sortable th button')[{column}].click();"
    shown = browse(chromium, page, script=f"document.querySelectorAll('th button')[4].click();{click * clicks}")
    rows = Cells(shown).rows
    assert [row[0] for row in rows[1:4]] == [f"net.{layer}.weight" for layer in order]
    assert rows[4][0] == "total"
    heads = re.findall(r"<th[^>]*>(?=<button>)", shown)
    assert [state in head for head in heads] == [place == column for place in range(5)]


LOOK = """
const style = getComputedStyle(document.body), path = getComputedStyle(document.querySelector("svg text"));
document.title = [style.backgroundColor, path.fill, document.documentElement.scrollWidth - innerWidth].join("|");
"""


@pytest.mark.parametrize(
    ("scheme", "back", "ink"), [(1, "255, 255, 255", "31, 35, 40"), (0, "13, 17, 23", "230, 237, 243")]
)
def test_it_is_light_or_dark_and_fits_a_phone(scheme: int, back: str, ink: str, chromium: str, page: Path) -> None:
    options = (f"--blink-settings=preferredColorScheme={scheme}", "--window-size=500,900")
    shown = browse(chromium, page, *options, script=LOOK)
    [title] = re.findall("<title>(.*?)</title>", shown)
    background, letters, too_wide = title.split("|")
    assert background == f"rgb({back})"
    assert letters == f"rgb({ink})"
    assert int(too_wide) <= 0


NARROW = """
const frame = document.createElement("iframe");
frame.style.width = "390px";
frame.srcdoc = document.documentElement.outerHTML.replaceAll(/<script.*?<\\/script>/gs, "");
frame.onload = () => {
  const { documentElement: root } = frame.contentDocument;
  const hidden = [...root.querySelectorAll("table")].filter((each) => each.getBoundingClientRect().right > 390);
  const letters = (each) => parseFloat(frame.contentWindow.getComputedStyle(each).fontSize);
  const small = [...root.querySelectorAll("td")].filter((each) => letters(each) < 12);
  const bars = [...root.querySelectorAll("tbody tr[style]")].map((row) => row.getBoundingClientRect().width);
  document.title = [root.clientWidth, root.scrollWidth, hidden.length, small.length, Math.min(...bars)].join("|");
};
document.body.replaceChildren(frame);
"""


def test_tables_are_readable_at_the_width_of_a_phone(chromium: str, tmp_path: Path) -> None:
    written(tmp_path, Named(), MagnitudePruning(0.5, schedule="one_shot", start=0), max_epochs=1)
    shown = browse(chromium, tmp_path / "report.html", "--virtual-time-budget=5000", script=NARROW)
    [title] = re.findall("<title>(.*?)</title>", shown)
    width, needed, hidden, small, bar = map(float, title.split("|"))
    assert 370 <= width <= 390
    assert needed <= width
    assert (hidden, small) == (0, 0), "tables that are cut off, cells in small print"
    assert bar > 300


@pytest.mark.slow
def test_sixty_layers_print_on_whole_pages(chromium: str, tmp_path: Path) -> None:
    written(tmp_path, Deep(), max_epochs=2)
    pdf = tmp_path / "report.pdf"
    # what is shown on paper must be as wide and, if it cannot be divided, as high as the paper at most
    script = """
    const print = [...document.styleSheets[0].cssRules].find((rule) => rule.conditionText === "print");
    const style = document.createElement("style");
    style.textContent = [...print.cssRules].map((rule) => rule.cssText).join("\\n") + "body { width: 190mm; }";
    document.head.append(style);
    const box = (element) => element.getBoundingClientRect();
    const high = Math.max(...[...document.querySelectorAll("svg, tr")].map((element) => box(element).height));
    const wide = Math.max(...[...document.querySelectorAll("svg, table, pre")].map((element) => box(element).right));
    document.title = [high, wide, box(document.body).right].join("|");
    """
    [title] = re.findall("<title>(.*?)</title>", browse(chromium, tmp_path / "report.html", script=script))
    high, wide, body = map(float, title.split("|"))
    assert high <= 250 / 25.4 * 96
    assert wide <= body + 1
    options = [*OFFLINE, f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={pdf}"]
    subprocess.run(
        [chromium, *options, (tmp_path / "report.html").as_uri()], check=True, timeout=60, capture_output=True
    )
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes()))
    assert 4 <= pages <= 9


# ------------------------------------------------------------------------------------------------ what it survives


class Oddly(Example):
    """Logs a metric whose name is no mathematics, and one that is NaN."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss$^$", torch.tensor(0.5))
        self.log("val_loss", torch.tensor(float("nan")))


def test_names_and_numbers_of_any_kind_are_written(tmp_path: Path) -> None:
    callback = MagnitudePruning(np.float64(0.5), **LINEAR)  # type: ignore[arg-type]
    found = written(tmp_path, Oddly(), callback)
    assert found["history"]["metrics"]["loss$^$"] == [[4, 0.5], [8, 0.5], [12, 0.5]]
    assert found["history"]["metrics"]["val_loss"] == [[4, None], [8, None], [12, None]]
    assert found["callbacks"][0]["sparsity"] == 0.5


def test_a_page_that_cannot_be_written_loses_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    callback, model = MagnitudePruning(0.5, **LINEAR), Example()
    report = PruningReport(str(tmp_path / "file" / "report.html"))  # inside of a file
    with pytest.warns(UserWarning, match=r"could not write its page; the run is complete without it: FileExistsError"):
        trainer = fit(model, callback, report, max_epochs=3)
    assert trainer.state.finished
    assert zeros(model) == size(model) / 2
    assert report.history.sparsity[-1][1] == 0.5


@undrawn
def test_after_shrinking_it_says_what_was_pruned(tmp_path: Path) -> None:
    callback = Pruning(0.5, granularity=Channel(), scope="local", schedule="one_shot", start=1, shrink_at_end=True)
    model = Example()
    found = written(tmp_path, model, callback)
    assert model.net[0].out_features == 4
    assert found["sparsity"] == callback.sparsity_now == found["history"]["sparsity"][-1][1] > 0.4
    page = (tmp_path / "report.html").read_text()
    assert f"{callback.sparsity_now:.2%} of the targets are pruned and cut out of the model" in page


@pytest.mark.parametrize("end", [{"schedule": "one_shot", "start": 1}, {"schedule": "linear", "start": 0, "end": 1.0}])
def test_after_shrinking_it_says_what_was_cut(
    tmp_path: Path, end: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    callback = Pruning(0.5, granularity=Channel(), scope="local", shrink_at_end=True, **end)
    with caplog.at_level("INFO"):
        found = written(tmp_path, Example(), callback)
    page = (tmp_path / "report.html").read_text()
    assert found["shrunk"] == {"net.0": [8, 4], "net.4": [10, 5]}
    assert "<td>net.4</td><td>10</td><td>5</td><td>-50.0%</td>" in page
    [told] = found["callbacks"]
    plan = told["plan"].splitlines()
    assert plan[0].startswith("Pruning to sparsity 0.5: ")
    assert "0 parameters" not in told["plan"]
    before, after = found["before"], found["after"]
    cut = next(line for line in plan if line.startswith("cut when training ended: "))
    for what, key in (("parameters", "parameters"), ("FLOPs", "flops")):
        assert f"{what} {before[key]:,.0f} -> {after[key]:,.0f} ({after[key] / before[key] - 1:+.1%})" in cut
    assert plan[-2:] == ["  net.0  8 -> 4", "  net.4  10 -> 5"]
    assert any(cut.removeprefix("cut when training ended: ") in record.message for record in caplog.records)
    assert found["sparsity"] == callback.sparsity_now > 0.4
    assert not re.search(r"\b0\.0+%", page)  # nothing that would read as if nothing were pruned
