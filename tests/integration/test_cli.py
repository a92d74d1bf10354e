"""LightningCLI: all of it from YAML and from the command line, back into YAML, and help that can be read."""

import inspect
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import Fit
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningCLI
from models import MLP, QUIET, fit, size, weights, zeros
from torch import Tensor
from variants import CRITERIA, OF_LAYERS, at_least, label, square_root

import lightning_prune
from lightning_prune import (
    ERK,
    OWL,
    BatchNormScale,
    Channel,
    ConstantSparsity,
    Criterion,
    Entropy,
    EntropyPruning,
    Granularity,
    GraSP,
    Head,
    InputChannel,
    LatencyTable,
    Layer,
    Magnitude,
    MagnitudePruning,
    Pruning,
    PruningAtInit,
    RandomPruning,
    ResidualChannel,
    Sensitivity,
    SensitivityPruning,
    SynFlow,
    Weight,
    sparsity,
)
from lightning_prune.training.masked import MaskedTraining
from lightning_prune.training.scheduled import ScheduledTraining
from lightning_prune.updates.latency import LayerTime


class Power(Criterion):
    """A user's criterion with an argument of its own.

    Args:
        exponent: Of the absolute value.
    """

    def __init__(self, exponent: float = 1.0) -> None:
        self.exponent = exponent

    def scores(self, units: Any) -> Tensor:
        return units.mean(lambda weight: weight.abs() ** self.exponent)


def squares(model: Any, batch: list[Tensor]) -> Tensor:
    """A user's loss."""
    return model(batch[0]).square().mean()


def run(*arguments: str, train: bool = True) -> LightningCLI:
    """Type a command line; without ``train`` only build what it describes."""
    return Fit(
        MLP,
        args=[*(["fit"] if train else []), *arguments],
        run=train,
        save_config_callback=None,
        seed_everything_default=0,
        trainer_defaults=QUIET,
    )


def callback_of(cli: LightningCLI) -> Any:
    """The only callback of this package."""
    found = [c for c in cli.trainer.callbacks if type(c).__module__.startswith("lightning_prune")]
    assert len(found) == 1
    return found[0]


def yaml_file(folder: Path, *callbacks: Any, **trainer: Any) -> str:
    path = folder / "config.yaml"
    # unsorted: the first pattern of {pattern: sparsity} that matches decides
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": list(callbacks), **trainer}}, sort_keys=False))
    return str(path)


def entry(class_path: str, **init_args: Any) -> dict[str, Any]:
    """One callback, as YAML has it."""
    return {"class_path": class_path, "init_args": init_args}


def public_state(callback: Callback) -> dict[str, Any]:
    """What a callback was told: its attributes but those of a run and the methods of Lightning."""
    of_run = ("log", "log_dict", "masks", "state", "enforcement", "max_epochs")
    return {k: v for k, v in vars(callback).items() if not k.startswith("_") and k not in of_run}


# ------------------------------------------------------------------------------------------------ in


def test_a_table_of_times_from_yaml(tmp_path: Path) -> None:
    none, levels = (0.0, 0.0, 0.0, 0.0), ((0.0, 0.0), (0.5, 1.0), (1.0, 1.0))
    layers = tuple(LayerTime(f"net.{n}.weight", (0, None), none, levels=levels) for n in (0, 4, 6))
    table = LatencyTable(layers, (0.0, 0.0), 3.0, "SharedFanIn")
    table.save(tmp_path / "latency.json")
    loaded = entry("lightning_prune.LatencyTable.load", path=str(tmp_path / "latency.json"))
    cli = run("--config", yaml_file(tmp_path, entry("Pruning", sparsity=0.5, granularity="SharedFanIn", of=loaded)))
    assert callback_of(cli).of == table
    assert sparsity(cli.model) > 0.7  # half of the time takes three quarters of the weights


@pytest.mark.parametrize("path", ["lightning_prune.MagnitudePruning", "MagnitudePruning"])
def test_a_callback_from_yaml(path: str, tmp_path: Path) -> None:
    arguments = {"sparsity": 0.9, "start": 1, "end": 6, "frequency": 2, "schedule": "linear", "targets": ["net.*"]}
    cli = run("--config", yaml_file(tmp_path, entry(path, **arguments)))
    callback = callback_of(cli)
    assert type(callback) is MagnitudePruning
    assert (callback.start, callback.end, callback.frequency, callback.schedule) == (1, 6, 2, "linear")
    assert callback.targets == ("net.*",)
    assert zeros(cli.model) == round(0.9 * size(cli.model))


def test_epochs_from_yaml_as_in_the_design(tmp_path: Path) -> None:
    config = yaml_file(tmp_path, entry("MagnitudePruning", sparsity=0.9, start=2, end=10, interval="epoch"))
    callback = callback_of(run("--config", config, train=False))
    assert (callback.start, callback.end, callback.interval) == (2, 10, "epoch")
    assert isinstance(callback.start, int), "2 epochs, not twice the run"


@pytest.mark.parametrize(("typed", "value"), [("1", 1), ("1.0", 1.0), ("0", 0), ("0.0", 0.0), ("0.25", 0.25)])
def test_int_and_float_stay_what_they_are(typed: str, value: float) -> None:
    arguments = (f"--trainer.callbacks.start={typed}", "--trainer.callbacks.schedule=one_shot")
    cli = run("--trainer.callbacks+=MagnitudePruning", "--trainer.callbacks.sparsity=0.9", *arguments, train=False)
    assert callback_of(cli).start == value
    assert type(callback_of(cli).start) is type(value)


def test_a_callback_from_the_command_line() -> None:
    cli = run("--trainer.callbacks+=MagnitudePruning", "--trainer.callbacks.sparsity=0.9")
    assert type(callback_of(cli)) is MagnitudePruning
    assert zeros(cli.model) == round(0.9 * size(cli.model))


@pytest.mark.filterwarnings("ignore:EarlyStopping may take the model for the best")
def test_the_command_line_changes_and_extends_the_yaml(tmp_path: Path) -> None:
    other = entry("lightning.pytorch.callbacks.EarlyStopping", monitor="val_loss")
    config = yaml_file(tmp_path, other, entry("RandomPruning", sparsity=0.5))
    cli = run("--config", config, "--trainer.callbacks.sparsity=0.7", "--trainer.callbacks.seed=4", train=False)
    assert (callback_of(cli).sparsity, callback_of(cli).seed) == (0.7, 4)

    typed = ["--trainer.callbacks+=EntropyPruning", "--trainer.callbacks.sparsity=0.5", "--trainer.callbacks.window=2"]
    cli = run("--config", yaml_file(tmp_path, other), *typed)
    assert [type(c).__name__ for c in cli.trainer.callbacks[:2]] == ["EarlyStopping", "EntropyPruning"]
    assert sum(int((~w.any(1)).sum()) for w in weights(cli.model).values()) == 4 + 5  # without the outputs


def test_nested_axes_by_short_name(tmp_path: Path) -> None:
    arguments = {
        "sparsity": 0.5,
        "criterion": entry("Entropy", prune="low", bins=8, window=2),
        "granularity": "Channel",
        "scope": "local",
    }
    cli = run("--config", yaml_file(tmp_path, entry("Pruning", **arguments)))
    callback = callback_of(cli)
    assert callback.criterion == Entropy("low", bins=8, window=2)
    assert callback.granularity == Channel()
    assert {n: int((~w.any(1)).sum()) for n, w in weights(cli.model).items()} == {
        "net.0.weight": 4,
        "net.4.weight": 5,
        "net.6.weight": 0,  # the outputs
    }

    cli = run(
        "--trainer.callbacks+=Pruning",
        "--trainer.callbacks.sparsity=0.5",
        "--trainer.callbacks.criterion=Sensitivity",
        "--trainer.callbacks.criterion.window=3",
        "--trainer.callbacks.granularity=Channel",
        train=False,
    )
    assert callback_of(cli).criterion == Sensitivity(window=3)
    assert callback_of(cli).granularity == Channel()


def test_defaults_of_nested_axes_are_those_of_python() -> None:
    callback = callback_of(run("--trainer.callbacks+=Pruning", "--trainer.callbacks.sparsity=0.5", train=False))
    assert public_state(callback) == public_state(Pruning(0.5))
    assert callback.criterion == Magnitude()
    assert callback.granularity == Weight()
    for name in ("RandomPruning", "EntropyPruning", "SensitivityPruning"):
        callback = callback_of(run(f"--trainer.callbacks+={name}", "--trainer.callbacks.sparsity=0.5", train=False))
        assert public_state(callback) == public_state(getattr(lightning_prune, name)(0.5))
        assert callback.granularity == Channel()


def test_a_criterion_of_the_user_by_import_path(tmp_path: Path) -> None:
    criterion = entry(f"{__name__}.Power", exponent=2.0)
    cli = run("--config", yaml_file(tmp_path, entry("Pruning", sparsity=0.6, criterion=criterion)))
    assert type(callback_of(cli).criterion) is Power
    assert callback_of(cli).criterion.exponent == 2.0
    assert zeros(cli.model) == round(0.6 * size(cli.model))


def test_a_schedule_and_a_scope_of_the_user_by_import_path(tmp_path: Path) -> None:
    arguments = {"sparsity": 0.6, "schedule": "variants.square_root", "scope": "variants.at_least"}
    cli = run("--config", yaml_file(tmp_path, entry("MagnitudePruning", **arguments)))
    assert callback_of(cli).schedule is square_root
    assert callback_of(cli).scope is at_least
    kept = at_least(type("Sizes", (), {"sizes": {"net.0.weight": 48, "net.4.weight": 80, "net.6.weight": 30}}), 0.6)
    assert {name: int(weight.count_nonzero()) for name, weight in weights(cli.model).items()} == kept


@pytest.mark.parametrize(
    "criterion", [*CRITERIA, OF_LAYERS[0], BatchNormScale(), Magnitude(2), Magnitude(math.inf)], ids=label
)
def test_every_criterion_by_its_name(criterion: Criterion, tmp_path: Path) -> None:
    config = yaml_file(
        tmp_path, entry("Pruning", sparsity=0.6, criterion=entry(type(criterion).__name__, **vars(criterion)))
    )
    assert callback_of(run("--config", config, train=False)).criterion == criterion


@pytest.mark.parametrize("criterion", [*CRITERIA, GraSP(), SynFlow()], ids=label)
def test_every_criterion_at_initialisation(criterion: Criterion, tmp_path: Path) -> None:
    given = entry(type(criterion).__name__, **vars(criterion))
    arguments = {"sparsity": 0.6, "criterion": given, "rounds": 2, "loss": "test_cli.squares"}
    cli = run("--config", yaml_file(tmp_path, entry("PruningAtInit", **arguments)))
    assert (callback_of(cli).criterion, callback_of(cli).loss) == (criterion, squares)
    assert zeros(cli.model) == round(0.6 * size(cli.model))


@pytest.mark.parametrize(
    "scope", [ERK(), ERK(power=0.5, kernel=False, dense=("net.0.*",), overrides={"net.4.*": 0.9})], ids=str
)
def test_erk_with_its_arguments(scope: ERK, tmp_path: Path) -> None:
    given = entry("lightning_prune.ERK", **{**vars(scope), "dense": list(scope.dense)})
    cli = run("--config", yaml_file(tmp_path, entry("MagnitudePruning", sparsity=0.6, initial=0.3, scope=given)))
    assert (callback_of(cli).scope, callback_of(cli).initial) == (scope, 0.3)
    assert zeros(cli.model) == round(0.6 * size(cli.model))


def test_owl_with_its_arguments(tmp_path: Path) -> None:
    scope = entry("lightning_prune.OWL", outliers=1.5, spread=0.2)
    cli = run("--config", yaml_file(tmp_path, entry("MagnitudePruning", sparsity=0.6, scope=scope, min_density=0.1)))
    assert callback_of(cli).scope == OWL(outliers=1.5, spread=0.2)
    assert callback_of(cli).min_density == 0.1
    assert zeros(cli.model) == round(0.6 * size(cli.model))


def test_a_sparsity_for_each_layer_and_patterns(tmp_path: Path) -> None:
    arguments = {"sparsity": {"net.0.*": 0.25, "*": 0.5}, "ignore": ["net.6.*"]}
    cli = run("--config", yaml_file(tmp_path, entry("MagnitudePruning", **arguments)))
    assert {name: int((w == 0).sum()) for name, w in weights(cli.model).items()} == {
        "net.0.weight": 12,
        "net.4.weight": 40,
        "net.6.weight": 0,
    }
    cli = run(
        "--trainer.callbacks+=MagnitudePruning",
        "--trainer.callbacks.threshold=0.1",
        "--trainer.callbacks.targets=[net.0.weight,re:net.4]",
        train=False,
    )
    assert callback_of(cli).targets == ("net.0.weight", "re:net.4")
    assert (callback_of(cli).threshold, callback_of(cli).sparsity) == (0.1, None)


# ------------------------------------------------------------------------------------------------ and out again

PUBLIC = {
    name: value
    for name in lightning_prune.__all__
    if inspect.isclass(value := getattr(lightning_prune, name)) and issubclass(value, Callback)
}
WHEN = {"schedule": "linear", "start": 2, "end": 0.75, "frequency": 2}
SHARED = {"sparsity": 0.5, "scope": "local", "targets": ["net.*"], "ignore": ["net.6.*"], "log_layers": True, **WHEN}
SPARSE = {"sparsity": 0.5, "scope": "local", "drop_fraction": 0.25, "seed": 3, "frequency": 2, "end": 6}
# the arguments of each callback in the round trip; one that is not named here gets SHARED
GIVEN = {
    "ACDC": {"sparsity": 0.5, "start": 1, "end": 7, "frequency": 2, "scope": "local", "ignore": ["net.6.*"]},
    "ConstantSparsity": {"targets": ["net.*.weight"], "ignore": ["net.4.*"], "log_layers": True},
    "Distillation": {"teacher": entry("models.MLP", seed=1), "temperature": 1.5, "weight": 0.25, "dim": 1},
    "EntropyPruning": {**SHARED, "prune": "low", "bins": 4, "window": 2, "granularity": {"class_path": "Weight"}},
    "GroupLasso": {
        **{"strength": 0.1, "granularity": entry("Channel", coupled=False), "growth": 2.0, "proximal": True},
        **{"schedule": "linear", "end": 6, "interval": "step", "ignore": ["net.6.*"]},
    },
    "GuardedPruning": {
        **{"monitor": "val_loss", "mode": "min", "max_drop": 0.5, "sparsity": 0.8, "reference": 2.0, "step": 0.6},
        **{"precision": 0.1, "patience": 2, "criterion": "Random", "granularity": "Channel", "ignore": ["net.6.*"]},
    },
    "LearnedMasks": {
        **{"n": 1, "m": 2, "prior": "Random", "strength": 2.0, "temperature": [2.0, 0.1], "scale": [50.0, 100.0]},
        **{"regularization": 0.0, "end": 4, "train": ["bias"], "ignore": ["net.6.*"], "seed": 3},
    },
    "LotteryTicket": {
        **{"sparsity": 0.75, "rounds": 2, "rewind": "random", "rewind_to": 1, "frequency": 2, "interval": "step"},
        **{"criterion": "Random", "granularity": "Channel", "scope": "local", "seed": 3, "ignore": ["net.6.*"]},
    },
    "MaskedAdapters": {"rank": 2, "alpha": 3.0, "train": ["bias", "net.6.*"], "targets": ["net.*.weight"], "seed": 3},
    "MovementPruning": {**SHARED, "window": 2},
    "WandaPruning": {**SHARED, "window": 2, "min_density": 0.1, "scope": "lamp"},
    "MagnitudePruning": {"sparsity": {"net.4.*": 0.3, "*": 0.7}, "interval": "epoch", "start": 0, "end": 1},
    "Pruning": {**SHARED, "criterion": entry("Random", seed=7), "granularity": "Channel"},
    "PruningAtInit": {
        **{"sparsity": 0.5, "criterion": "SynFlow", "scope": "erk", "rounds": 3, "min_density": 0.1},
        **{"ignore": ["net.6.*"], "log_layers": True},
    },
    "PruningReport": {"log_figures": False},
    "RandomPruning": {**SHARED, "seed": 5},
    "SensitivityPruning": {**SHARED, "window": 2},
    "RigL": {**SPARSE, "decay": "linear", "window": 2},
    "SET": {**SPARSE, "sparsity": {"net.0.*": 0.3, "net.4.*": 0.7}},
    "SRSTE": {"n": 1, "m": 2, "decay": 0.001, "ignore": ["net.6.*"]},
    "SparseEarlyStopping": {"monitor": "val_loss", "patience": 7},
    "SparseModelCheckpoint": {"monitor": "val_loss", "save_top_k": 2},
}


def printed_config(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(*arguments, "--print_config")
    assert ended.value.code in (0, None)
    return capsys.readouterr().out


def test_there_are_callbacks_to_test() -> None:
    assert GIVEN.keys() <= PUBLIC.keys()


@pytest.mark.filterwarnings("ignore:.*finds no pruning callback in this run")
@pytest.mark.parametrize("name", PUBLIC)
def test_print_config_round_trips(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = entry(f"lightning_prune.{name}", **GIVEN.get(name, SHARED))
    trainer = {"enable_checkpointing": name == "SparseModelCheckpoint", "default_root_dir": str(tmp_path)}
    config = yaml_file(tmp_path, given, **trainer)
    dumped = printed_config(capsys, "--config", config)
    assert "Unable to serialize" not in dumped
    again = tmp_path / "again.yaml"
    again.write_text(dumped)
    by_short_name = yaml_file(tmp_path, {**given, "class_path": name}, **trainer)

    first, second = run("--config", by_short_name, train=False), run("--config", str(again))
    assert type(callback_of(first)) is type(callback_of(second)) is PUBLIC[name]
    for argument, value in GIVEN.get(name, SHARED).items():
        if argument not in ("criterion", "granularity", "prior", "teacher"):
            wanted = tuple(value) if isinstance(value, list) else value
            assert getattr(callback_of(second), argument) == wanted
    callback = callback_of(second)
    if isinstance(callback, MaskedTraining):
        assert public_state(callback) == public_state(callback_of(first))
    if isinstance(callback, Pruning | PruningAtInit | ConstantSparsity):
        assert callback.sparsity_now == sparsity(second.model, callback.targets, callback.ignore)
    if isinstance(callback, ScheduledTraining):
        assert callback.sparsity_now > 0.4
    assert second.trainer.global_step == 8


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("Channel", Channel()),
        ("InputChannel", InputChannel()),
        ({"class_path": "Layer", "init_args": {"minimum": 2}}, Layer(minimum=2)),
        ({"class_path": "ResidualChannel", "init_args": {"round_to": 8}}, ResidualChannel(round_to=8)),
        ("lightning_prune.Head", Head()),
        ({"class_path": "Head", "init_args": {"heads": 4, "minimum": 2}}, Head(heads=4, minimum=2)),
        ({"class_path": "Channel", "init_args": {"coupled": True, "round_to": 8}}, Channel(coupled=True, round_to=8)),
    ],
    ids=repr,
)
def test_granularities_are_read_from_yaml(given: Any, wanted: Granularity, tmp_path: Path) -> None:
    config = yaml_file(tmp_path, entry("Pruning", sparsity=0.5, granularity=given))
    assert callback_of(run("--config", config, train=False)).granularity == wanted


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if issubclass(value, Pruning)])
def test_every_argument_is_in_the_config(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # the criterion is what makes it that preset
    config = yaml_file(tmp_path, entry(name, sparsity=0.5))
    [callback] = yaml.safe_load(printed_config(capsys, "--config", config))["trainer"]["callbacks"]
    shared = set(inspect.signature(Pruning).parameters) - ({"criterion"} if name != "Pruning" else set())
    assert callback["init_args"].keys() == shared | set(inspect.signature(PUBLIC[name]).parameters)


def test_rigl_has_the_arguments_of_set_and_a_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml_file(tmp_path, entry("RigL", sparsity=0.5))
    [callback] = yaml.safe_load(printed_config(capsys, "--config", config))["trainer"]["callbacks"]
    assert callback["init_args"].keys() == inspect.signature(lightning_prune.SET).parameters.keys() | {"window"}
    assert (callback["init_args"]["decay"], callback["init_args"]["scope"]) == ("cosine", "erk")


# ------------------------------------------------------------------------------------------------ help


def described(cls: type) -> dict[str, str]:
    """The arguments that the docstring of a class describes, and how the description begins."""
    section = inspect.getdoc(cls).partition("Args:\n")[2].partition("\n\n")[0]
    return dict(re.findall(r"^    (\w+): (.{20})", section, re.MULTILINE))


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if issubclass(value, MaskedTraining)])
def test_help_describes_every_argument(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as ended:
        run(f"--trainer.callbacks.help=lightning_prune.{name}")
    assert ended.value.code in (0, None)
    text = " ".join(capsys.readouterr().out.split())
    cls, parent = PUBLIC[name], PUBLIC[name].__base__
    arguments = set(inspect.signature(cls).parameters)
    for argument in arguments:
        own = described(cls).get(argument) or described(parent)[argument]
        option = rf"--trainer\.callbacks\.{argument}\+? (?:\S+ )?(?:\[?ITEM,\.\.\.\]? )?"  # "+" adds to a list
        found = re.search(f"{option}{re.escape(own)}", text)
        assert found, f"--trainer.callbacks.{argument} {own} ... in {text}"
    assert inspect.getdoc(cls).split("\n")[0].rstrip(".:")[:100] in text
    if "criterion" not in arguments:
        assert "--trainer.callbacks.criterion" not in text, "a preset has its criterion"


def test_help_of_a_nested_axis(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--trainer.callbacks+=Pruning", "--trainer.callbacks.criterion.help=Entropy")
    text = " ".join(capsys.readouterr().out.split())
    for argument, beginning in described(Entropy).items():
        assert f"{argument} " in text
        assert beginning[:12] in text


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["schedule=quadratic"], "'one_shot', 'linear', 'cubic', 'cosine', 'exponential'"),
        (["scope=layer"], "'global', 'local', 'erk'"),
        (["interval=batch"], "'step', 'epoch'"),
        (["sparsity=much"], "much"),
        (["start=soon"], "soon"),
        (["criterion=Magnitude"], "Option 'criterion' is not accepted"),
        (["sparsty=0.5"], "Option 'sparsty' is not accepted"),
        (["granularity=Row"], "Row"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_values_of_the_wrong_kind_end_with_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = [f"--trainer.callbacks.{argument}" for argument in arguments]
    with pytest.raises(SystemExit) as ended:
        run("--trainer.callbacks+=MagnitudePruning", "--trainer.callbacks.sparsity=0.9", *typed)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_name_that_does_not_exist_ends_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("--trainer.callbacks+=MagnitudePrunning")
    assert ended.value.code == 2
    assert "MagnitudePrunning" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("callback", "arguments", "message"),
    [
        ("MagnitudePruning", ["sparsity=1.5"], "sparsity must be in [0, 1), got 1.5"),
        ("MagnitudePruning", [], "give either sparsity or threshold, got sparsity=None and threshold=None"),
        ("MagnitudePruning", ["sparsity=0.5", "threshold=0.1"], "give either sparsity or threshold"),
        ("RandomPruning", ["sparsity=0.5", "start=5", "end=2"], "start must not lie after end, got start=5 and end=2"),
        ("EntropyPruning", ["sparsity=0.5", "bins=1"], "bins must be at least 2, got 1"),
        ("SensitivityPruning", ["sparsity=0.5", "frequency=0"], "frequency must be at least 1 step, got 0"),
        ("Pruning", ["sparsity=0.5", "criterion=Entropy", "criterion.window=0"], "window must be at least 1, got 0"),
    ],
)
def test_values_out_of_range_are_refused_with_the_sentence_of_python(
    callback: str, arguments: list[str], message: str
) -> None:
    # the constructor runs after parsing, where LightningCLI hands its error on
    typed = [f"--trainer.callbacks.{argument}" for argument in arguments]
    with pytest.raises(ValueError, match=re.escape(message)):
        run(f"--trainer.callbacks+={callback}", *typed, train=False)


def test_the_run_is_the_one_in_python() -> None:
    cli = run("--trainer.callbacks+=MagnitudePruning", "--trainer.callbacks.sparsity=0.9", "--trainer.max_epochs=3")
    model = MLP()
    fit(model, MagnitudePruning(0.9), max_epochs=3)
    found = cli.model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())


def test_presets_are_presets() -> None:
    expected = {
        MagnitudePruning: "Magnitude",
        RandomPruning: "Random",
        EntropyPruning: "Entropy",
        SensitivityPruning: "Sensitivity",
    }
    for cls, criterion in expected.items():
        cli = run(f"--trainer.callbacks+={cls.__name__}", "--trainer.callbacks.threshold=0.1", train=False)
        assert type(callback_of(cli).criterion).__name__ == criterion
