"""Every code block of the README does what it says."""

import re
import runpy
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from pages import new_module, run_block

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
PYTHON = [block for language, block in BLOCKS if language == "python" and not block.startswith("# main.py")]
COMMANDS = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines()]


LINES = [line for line in COMMANDS if line.startswith("python")]


def run(*command: str | Path, folder: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_block_is_left_out() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "yaml", "bash", "text"}
    assert sum(language == "yaml" for language, _ in BLOCKS) == 1
    assert all(command.startswith(("make ", "python main.py ")) for command in COMMANDS)


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_python_runs_and_prints_what_stands_below_it(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_block(block, new_module(f"readme_{PYTHON.index(block)}"))
    printed = capsys.readouterr().out
    below = TEXT[TEXT.index(block) + len(block) :]
    if below.startswith("```\n\n```text\n"):
        expected = below.removeprefix("```\n\n```text\n").partition("```")[0]
        assert printed.endswith(expected)


@pytest.mark.parametrize("command", LINES)
def test_command_lines_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for language, block in BLOCKS:
        if language == "yaml":
            (tmp_path / "prune.yaml").write_text(block)
        if block.startswith("# main.py"):
            (tmp_path / "main.py").write_text(block)
    words = shlex.split(command)[1:]
    if command == LINES[0]:  # in a process of its own, which takes seconds to import all that is imported here
        printed = run(sys.executable, *words, folder=tmp_path)
    else:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # what the command sets is unset again
        with pytest.raises(SystemExit) if "help" in command else nullcontext():
            runpy.run_path(words[0], run_name="__main__")
        printed = capsys.readouterr().out
    if "help" in command:
        assert "--trainer.callbacks.threshold" in printed
        return
    from torch import load, nn

    from lightning_prune import sparsity

    checkpoint = next(tmp_path.rglob("*.ckpt"))
    layer = nn.Linear(32, 2)
    weights = load(checkpoint, weights_only=True)["state_dict"]
    layer.load_state_dict({name.removeprefix("layer."): value for name, value in weights.items()})
    assert sparsity(layer) == 58 / 64


@pytest.mark.parametrize("command", [line.partition("#")[0] for line in COMMANDS if line.startswith("make")])
def test_make_knows_its_targets(command: str) -> None:
    run(*command.split(), "--dry-run", folder=ROOT)


def test_links_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(links) >= 3
    assert all((ROOT / link).exists() for link in links)
