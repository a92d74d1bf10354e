"""What the version before this one wrote: checkpoints, models, configurations and paths go on as they would have then.

The files in ``tests/data`` were written by ``tests/data/write.py`` with the code of that version.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from earlier import DATA, KEPT, RUNS, WHERE, ConvNet, Model, end, load, probe, run, unpack
from lightning.pytorch.cli import LightningCLI
from torch import Tensor

import lightning_prune
from lightning_prune import load_compressed, load_shrunk, sensitivity
from lightning_prune._moved import _MOVED

# what a run wrote is gone when it goes on elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_and_ends_as_it_did(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the report is written
    path = unpack(f"{name}.ckpt", tmp_path)
    assert torch.load(path, weights_only=True)["global_step"] == KEPT.get(name, WHERE)
    model, callback, _ = run(name, ckpt_path=path)
    expected = load(f"{name}.end.pt")
    found = end(model, callback)
    assert found["masks"].keys() == expected["masks"].keys()
    assert all(torch.equal(found["masks"][key], mask) for key, mask in expected["masks"].items())
    assert any(not mask.all() for mask in expected["masks"].values())
    assert_same(found["weights"], expected["weights"])


@pytest.mark.parametrize("name", ["Wanda", "Entropy", "Movement", "Sensitivity", "RigL"])
def test_the_window_was_open_when_it_was_saved(name: str) -> None:
    (state,) = load(f"{name}.ckpt")["callbacks"].values()
    assert state["observed"]["steps"] % 3 > 0
    assert state["observed"]["statistics"]


# ------------------------------------------------------------------------------------------------ models


def test_a_shrunk_model_outputs_what_it_did(tmp_path: Path) -> None:
    model = load_shrunk(ConvNet, unpack("small.pt", tmp_path)).eval()
    torch.testing.assert_close(model(probe(model.size)), load("small.outputs.pt"))
    assert model.net[0].out_channels < 6


def test_the_checkpoint_of_a_run_that_shrunk_its_model_outputs_what_it_did(tmp_path: Path) -> None:
    path = unpack("shrunk.ckpt", tmp_path)
    saved = torch.load(path, weights_only=True)["hyper_parameters"]
    assert saved["_instantiator"] == "lightning_prune.loading.instantiate"
    model = ConvNet.load_from_checkpoint(path).eval()
    torch.testing.assert_close(model(probe(model.size)), load("shrunk.outputs.pt"))
    assert model.net[0].out_channels < 6


def test_a_compressed_file_has_the_bits_that_it_had(tmp_path: Path) -> None:
    found, expected = load_compressed(unpack("compressed.safetensors", tmp_path)), load("compressed.state.pt")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_an_analysis_goes_on_with_the_scores_that_it_saved(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text((DATA / "scores.json").read_text())

    def loss(model: Model, batches: Any) -> float:
        pytest.fail("a score that is known is measured again")

    loss.__module__, loss.__qualname__ = "__main__", "loss"
    model = Model()
    batches = model.train_dataloader()
    found = sensitivity(model, batches, loss, (0.5, 0.9), mode="min", path=path, progress=False)
    assert set(found.scores) == {"net.0.weight", "net.3.weight", "net.5.weight"}


# ------------------------------------------------------------------------------------------------ configurations


def built(config: Path) -> list[Any]:
    """Return the callbacks that a configuration describes."""
    made = LightningCLI(Model, args=["--config", str(config)], run=False, save_config_callback=None)
    return [callback for callback in made.trainer.callbacks if type(callback).__name__ in lightning_prune.__all__]


@pytest.mark.parametrize("config", sorted(DATA.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_lightning_cli_printed_builds_the_same_callback(config: Path, tmp_path: Path) -> None:
    told = yaml.safe_load(config.read_text())
    sections = {key: told[key] for key in ("seed_everything", "trainer")}  # the others are those of a subcommand
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(sections, sort_keys=False))
    (callback,) = built(tmp_path / "config.yaml")
    (entry,) = told["trainer"]["callbacks"]
    assert type(callback) is getattr(lightning_prune, config.stem)
    for name, value in entry.get("init_args", {}).items():
        if isinstance(value, str | int | float) and hasattr(callback, name):
            assert getattr(callback, name) == value, name


BY_HAND = """
trainer:
  callbacks:
    - class_path: lightning_prune.strategies.MagnitudePruning
      init_args: {sparsity: 0.75, end: 5, targets: ["net.0.*"]}
    - class_path: lightning_prune.pruning.Pruning
      init_args:
        sparsity: 0.6
        criterion: {class_path: lightning_prune.criteria.weights.Magnitude, init_args: {p: 2.0}}
        granularity: {class_path: lightning_prune.granularities.Channel}
        scope: {class_path: lightning_prune.erdos_renyi.ERK}
        targets: ["net.3.*"]
    - class_path: lightning_prune.sparse_training.RigL
      init_args: {sparsity: 0.5, targets: ["net.5.*"]}
    - class_path: lightning_prune.pruning_report.PruningReport
"""


def test_a_configuration_with_the_former_paths_builds_what_it_built(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(BY_HAND)
    magnitude, general, rigl, report = built(tmp_path / "config.yaml")
    assert type(magnitude) is lightning_prune.MagnitudePruning
    assert (magnitude.sparsity, magnitude.end, list(magnitude.targets)) == (0.75, 5, ["net.0.*"])
    assert type(general) is lightning_prune.Pruning
    assert type(general.criterion) is lightning_prune.Magnitude
    assert type(general.granularity) is lightning_prune.Channel
    assert type(general.scope) is lightning_prune.ERK
    assert type(rigl) is lightning_prune.RigL
    assert type(report) is lightning_prune.PruningReport


# ------------------------------------------------------------------------------------------------ paths


@pytest.mark.parametrize("former", _MOVED)
def test_a_module_that_moved_is_imported_from_where_it_was(former: str) -> None:
    module = importlib.import_module(f"lightning_prune.{former}")
    assert module is sys.modules[f"lightning_prune.{_MOVED[former]}"]


@pytest.mark.parametrize("path", (DATA / "paths.txt").read_text().split())
def test_a_public_name_is_imported_from_where_it_was(path: str) -> None:
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert callable(found)
    assert name not in lightning_prune.__all__ or found is getattr(lightning_prune, name)


def test_the_package_shows_public_names_and_rooms_only() -> None:
    folder = Path(lightning_prune.__file__).parent
    rooms = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    shown = {name for name in dir(lightning_prune) if not name.startswith("_")}
    public = set(lightning_prune.__all__)
    assert public <= shown <= public | {room for room in rooms if not room.startswith("_")}  # some load when needed
