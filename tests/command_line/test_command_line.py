"""The command line as a user types it: what it says of every kind of file, and one line where it cannot."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from models import MLP, fit
from safetensors.torch import save_file
from torch import nn

import lightning_prune
from lightning_prune import (
    Channel,
    ConstantSparsity,
    GuardedPruning,
    MagnitudePruning,
    PruningReport,
    load_compressed,
    prune,
    save_compressed,
    save_shrunk,
    shrink,
)
from lightning_prune.command_line.main import main

LINEAR: dict[str, Any] = {"schedule": "linear", "start": 0, "end": 8, "frequency": 4}


def said(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """Run a command that succeeds, and return what it prints."""
    assert main([str(argument) for argument in argv]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """Run a command that fails, and return its one line."""
    assert main([str(argument) for argument in argv]) == 2
    out, line = capsys.readouterr()
    assert not out
    assert line.count("\n") == 1
    return line


def trained(folder: Path, callback: Any, epochs: int = 2, **trainer_kwargs: Any) -> Path:
    saver = ModelCheckpoint(folder, "last", save_last=True)
    fit(MLP(), callback, saver, enable_checkpointing=True, max_epochs=epochs, **trainer_kwargs)
    return folder / "last.ckpt"


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells of a table behind the shape, by name."""
    split = (line.split() for line in text.splitlines() if line.startswith(("net", "total", "weight")))
    return {cells[0]: cells[4 if "x" in cells else 1 :] for cells in split}


# ------------------------------------------------------------------------------------------------ summary


@pytest.mark.filterwarnings("ignore:MagnitudePruning (will not reach its target|ended at a sparsity)")
def test_summary_of_a_checkpoint_in_the_middle_of_its_schedule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trained(tmp_path, MagnitudePruning(0.5, scope="local", **{**LINEAR, "end": 16}))
    text = said(capsys, "summary", path)
    assert text.startswith(f"{path}: a Lightning checkpoint, epoch 1, step 8, 212 values in 11 tensors\n")
    assert rows(text)["net.0.weight"] == ["48", "12", "25.00%", "25.00%"]
    assert rows(text)["total"] == ["158", "40", "25.32%", "25.32%"]
    assert text.endswith(
        "MagnitudePruning: 3 masks, 25.32% pruned\n"
        "  after 8 optimizer steps: to sparsity 0.5, step 0 to 16, last update at step 8, 8 steps to go\n"
    )


def test_summary_of_a_search_and_of_weights_that_were_changed_after_their_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trained(tmp_path, GuardedPruning("val_loss", max_drop=9.0, step=0.4, precision=0.2), epochs=3)
    text = said(capsys, "summary", path)
    assert "3 validations judged: the highest sparsity held is 80.0%" in text
    saved = torch.load(path, weights_only=True)
    saved["state_dict"]["net.0.weight"].fill_(1.0)
    torch.save(saved, path)
    assert "pruned weights not zero: the weights were changed after the masks" in said(capsys, "summary", path)
    path = trained(tmp_path / "constant", ConstantSparsity())
    assert "ConstantSparsity: " in said(capsys, "summary", path)


def test_every_kind_of_file_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    prune(model, 0.5, granularity=Channel(), scope="local")
    state = model.state_dict()
    save_shrunk(shrink(model, torch.zeros(1, 4)), tmp_path / "small.ckpt")
    torch.save(state, tmp_path / "state.pt")
    torch.save({"model_state_dict": state, "epoch": 3}, tmp_path / "other.pt")
    torch.save({f"_orig_mod.{name}": value for name, value in state.items()}, tmp_path / "compiled.pt")
    save_file(state, tmp_path / "state.safetensors")
    save_compressed(state, tmp_path / "packed.safetensors")
    kinds = {
        "state.pt": "a state_dict",
        "compiled.pt": "a state_dict",
        "other.pt": "a checkpoint, epoch 3",
        "state.safetensors": "a safetensors file",
        "packed.safetensors": "a compressed file",
    }
    tables = set()
    for name, kind in kinds.items():
        title, _, table = said(capsys, "summary", tmp_path / name).partition("\n")
        assert title.startswith(f"{tmp_path / name}: {kind}, 44 values in 4 tensors")
        tables.add(table)
    assert len(tables) == 1, "the same weights make the same table, whatever file they are in"
    assert rows(tables.pop())["total"] == ["36", "12", "33.33%"]
    assert "small.ckpt: a checkpoint of a shrunk model, " in said(capsys, "summary", tmp_path / "small.ckpt")


def test_tied_weights_count_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = torch.eye(3)
    torch.save({"weight": weight, "weight_again": weight}, tmp_path / "tied.pt")
    assert rows(said(capsys, "summary", tmp_path / "tied.pt"))["total"] == ["9", "6", "66.67%"]


# ------------------------------------------------------------------------------------------------ diff


def test_diff_counts_what_both_keep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = {"weight": torch.tensor([[1.0, 1.0, 0.0, 0.0]]), "net": torch.eye(3), "gone": torch.eye(2)}
    b = {"weight": torch.tensor([[1.0, 0.0, 1.0, 0.0]]), "net": torch.eye(4)}
    torch.save(a, tmp_path / "a.pt")
    save_file(b, tmp_path / "b.safetensors")
    text = said(capsys, "diff", tmp_path / "a.pt", tmp_path / "b.safetensors")
    assert rows(text)["weight"] == ["50.00%", "50.00%", "1", "1", "33.33%"]
    assert text.splitlines()[-2:] == ["net: 3 x 3 in a, 4 x 4 in b", "only in a: gone"]


def test_diff_takes_the_masks_of_callbacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = trained(tmp_path / "a", MagnitudePruning(0.25, scope="local", schedule="one_shot", start=1))
    b = trained(tmp_path / "b", MagnitudePruning(0.5, scope="local", schedule="one_shot", start=1))
    text = said(capsys, "diff", a, b)
    assert rows(text)["total"] == ["25.32%", "50.00%", "0", "39", "66.95%"]
    same = said(capsys, "diff", a, a)
    assert {cells[-1] for cells in rows(same).values()} == {"100.00%"}


# ------------------------------------------------------------------------------------------------ compress, expand


def test_compressed_and_expanded_weights_are_the_same_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = trained(tmp_path, MagnitudePruning(0.5, **LINEAR))
    state = torch.load(path, weights_only=True)["state_dict"]
    text = said(capsys, "compress", path)
    packed = tmp_path / "last.compressed.safetensors"
    assert text.startswith(f"{packed}: ")
    assert "masks, optimizer and loop state stay behind in the checkpoint" in text
    assert said(capsys, "expand", packed).startswith(f"{tmp_path / 'last.pt'}: ")
    said(capsys, "expand", packed, tmp_path / "plain.safetensors")
    from safetensors.torch import load_file

    expanded = torch.load(tmp_path / "last.pt", weights_only=True)
    for found in (load_compressed(packed), expanded, load_file(tmp_path / "plain.safetensors")):
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], value) for name, value in state.items())
    assert "output must be a new file" in refused(capsys, "expand", packed)
    said(capsys, "expand", packed, "--force")
    assert "output must be another file than the input" in refused(capsys, "compress", packed, packed, "--force")
    assert "output must be in an existing folder" in refused(capsys, "compress", path, tmp_path / "no" / "a")


# ------------------------------------------------------------------------------------------------ report


@pytest.mark.slow
def test_a_report_is_printed_and_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    fit(MLP(), MagnitudePruning(0.5, scope="local", **LINEAR), PruningReport(str(page)), max_epochs=3)
    data = tmp_path / "report.json"
    text = said(capsys, "report", data)
    assert text.startswith("Pruning of MLP: 50.00% of the targets are pruned after 12 optimizer steps\n")
    assert "2 updates, step (sparsity): 4 (25.0%), 8 (50.0%)" in text
    assert rows(text)["total"] == ["158", "79", "50.00%"]
    assert "val_loss: first " in text
    again = tmp_path / "again.html"
    said(capsys, "report", data, again)
    before, after = page.read_text(), again.read_text()
    assert before.partition("<h2>Masks</h2>")[0] == after.partition("<h2>Masks</h2>")[0]
    assert "The JSON file of a report has no masks." in after
    found = json.loads(data.read_text())
    found["history"]["metrics"]["val_loss"][0][1] = None  # not finite
    found["history"]["metrics"]["loss"] = [[4, None]]
    data.write_text(json.dumps(found))
    assert "loss: no finite value" in said(capsys, "report", data)
    said(capsys, "report", data, again, "--force")
    del found["layers"][0]["zeros"]
    data.write_text(json.dumps(found))
    assert "got a damaged one: KeyError('zeros')" in refused(capsys, "report", data)


# ------------------------------------------------------------------------------------------------ refusals


class Own:
    """A class that safe loading does not know."""


def test_what_cannot_be_read_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, pickled, numbers, empty, cut = (tmp_path / name for name in ("text", "own.pt", "n.pt", "empty", "cut"))
    text.write_text("hello")
    torch.save({"state_dict": {}, "hyper_parameters": Own()}, pickled)
    torch.save([1, 2], numbers)
    empty.touch()
    save_file({"a": torch.eye(9)}, tmp_path / "a.safetensors")
    cut.write_bytes((tmp_path / "a.safetensors").read_bytes()[:-9])
    damaged = tmp_path / "damaged.pt"
    torch.save(
        {"state_dict": {"w": torch.eye(2)}, "callbacks": {"P{}": {"masks": {"shapes": {"w": [9]}, "bits": 1}}}}, damaged
    )
    line = refused(capsys, "summary", pickled)
    assert "must load with weights_only=True, got one with an object of test_command_line.Own" in line
    assert "torch.load(path, weights_only=False)" in line
    rule = "must be a Lightning checkpoint, a state_dict, a safetensors file or a compressed one"
    for path in (text, empty, cut, numbers):
        assert f"{path} {rule}, got " in refused(capsys, "summary", path)
    assert "must have complete masks of P" in refused(capsys, "summary", damaged)
    assert "No such file or directory" in refused(capsys, "summary", tmp_path / "missing")
    assert "must be a file, got a folder" in refused(capsys, "compress", tmp_path)
    assert "must be a file that `compress` or save_compressed wrote" in refused(capsys, "expand", text)
    assert "got no JSON" in refused(capsys, "report", text)
    (tmp_path / "other.json").write_text("{}")
    assert "got one without ['after', 'before', 'callbacks']" in refused(capsys, "report", tmp_path / "other.json")
    torch.save({"a": torch.eye(2)}, tmp_path / "one.pt")
    torch.save({"b": torch.eye(2)}, tmp_path / "two.pt")
    assert "must have weights of the same names" in refused(capsys, "diff", tmp_path / "one.pt", tmp_path / "two.pt")


@pytest.mark.slow
def test_as_a_user_types_it(tmp_path: Path) -> None:
    torch.save({"weight": torch.eye(2)}, tmp_path / "a.pt")
    environment = {**os.environ, "PYTHONPATH": str(Path(lightning_prune.__file__).parents[1])}
    command = [sys.executable, "-m", "lightning_prune", "summary", "a.pt"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert rows(done.stdout)["total"] == ["4", "2", "50.00%"]


def test_the_exit_code_is_that_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-prune", "summary", "b.pt"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("lightning_prune", run_name="__main__")
    assert capsys.readouterr().err == "lightning-prune summary: b.pt: No such file or directory\n"
    with pytest.raises(SystemExit, match="2"):
        main(["prune", "b.pt"])
    assert "invalid choice: 'prune'" in capsys.readouterr().err
