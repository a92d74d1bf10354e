"""Every code block of the README does what it says."""

import re
import runpy
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from pages import needs, new_module, run_block

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
PYTHON = [block for language, block in BLOCKS if language == "python" and not block.startswith("# main.py")]
COMMANDS = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines()]


LINES = [line for line in COMMANDS if line.startswith("python")]


def test_no_block_is_left_out() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "yaml", "bash", "text"}
    assert sum(language == "yaml" for language, _ in BLOCKS) == 1
    assert all(command.startswith(("pip install .", "make ", "python main.py ")) for command in COMMANDS)


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= 180
    assert len(TEXT.split()) <= 1300


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_python_runs_and_prints_what_stands_below_it(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if missing := needs(block):
        pytest.skip(f"{missing} is not installed: make cookbook runs this block")
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
    # in this process: one of its own would take seconds to import all that is imported here
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
    done = subprocess.run([*command.split(), "--dry-run"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


RECIPES = {"gradual": 0.9, "smaller": None, "guarded": None, "sparse": 0.9}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.filterwarnings("ignore:GuardedPruning holds")  # the dense model is not trained here
def test_recipes_train(name: str) -> None:
    import torch
    from models import MLP, fit, size, zeros

    block = next(block for block in PYTHON if "# gradual:" in block)
    module = new_module(f"recipe_{name}")
    run_block(block, module)
    callback = getattr(module, name)
    assert isinstance(callback, Callback)

    class Model(MLP):
        example_input_array = torch.zeros(2, 6)

        def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    model = Model()
    fit(model, callback, max_epochs=20)
    if RECIPES[name] is not None:
        assert zeros(model) == round(RECIPES[name] * size(model))
    if name == "smaller":
        assert size(model) < size(Model())


def test_the_readme_has_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    from front_page import WHY, resnet, why

    for name, text in (("why", why()), ("resnet", resnet())):
        assert f"<!-- {name}:begin -->\n{text}\n<!-- {name}:end -->" in TEXT
    tests = (ROOT / "tests" / "integration" / "test_model_pruning.py").read_text()
    assert len(WHY) == 7  # and speed
    assert all(f"def {test}(" in tests for *_, test in WHY)


def test_badges_are_true(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "theme"))
    from badges import badges

    for name, text in badges(ROOT).items():
        assert (ROOT / "docs" / "badges" / f"{name}.svg").read_text() == text
        assert f"docs/badges/{name}.svg" in TEXT


def test_links_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXT)
    assert len(links) >= 20
    assert not [link for link in links if not link.startswith("https://") and not (ROOT / link).exists()]
