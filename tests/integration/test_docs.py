"""Every page of the documentation does what it says: its code runs, its configs are accepted, its API is complete."""

import re
import shlex
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from models import MLP
from pages import needs, new_module, run_block

import lightning_prune

DOCS = Path(__file__).parents[2] / "docs"
SNIPPETS = DOCS / "snippets"
PAGES = {str(path.relative_to(DOCS)): path for path in sorted(DOCS.rglob("*.md")) if path.parent != SNIPPETS}
FENCE = re.compile(r"^( *)```(\w*).*?\n(.*?)^\1```$", flags=re.MULTILINE | re.DOTALL)

# Packages that pages use and that development does without: their blocks run where they are installed.
MISSING = [name for name in ("executorch", "mlflow", "wandb") if find_spec(name) is None]


def included(name: str) -> str:
    """Return the text of a snippet, or of a file at the root."""
    return next(folder / name for folder in (SNIPPETS, DOCS.parent) if (folder / name).exists()).read_text()


def blocks(path: Path) -> list[tuple[str, str]]:
    """Return the code blocks of a page, and of what it includes, as (language, text)."""
    page = re.sub(r'^--8<-- "(.+)"$', lambda found: included(found[1]), path.read_text(), flags=re.M)
    return [(language, textwrap.dedent(text)) for _, language, text in FENCE.findall(page)]


def pages_with(language: str) -> list[str]:
    return [name for name, path in PAGES.items() if language in dict(blocks(path))]


def test_no_block_is_left_out() -> None:
    languages = {language for path in PAGES.values() for language, _ in blocks(path)}
    assert languages == {"python", "yaml", "bash", "text"}


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")  # by SQLAlchemy, in MLflow
@pytest.mark.parametrize("page", pages_with("python"))
def test_python_runs_from_top_to_bottom_and_prints_what_stands_below_it(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    module = new_module(f"docs_{page}")
    code, printed = "", ""
    for language, text in blocks(PAGES[page]):
        if language == "text" and code:
            assert printed.endswith(text), f"what is printed by\n{code}"
        code, printed = "", ""
        if language == "python" and not any(name in text for name in MISSING):
            code = text
            if missing := needs(code):
                pytest.skip(f"{missing} is not installed: make cookbook runs this page to its end")
            run_block(code, module)
            printed = capsys.readouterr().out


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_configs_are_accepted(page: str) -> None:
    for language, text in blocks(PAGES[page]):
        if language == "yaml":
            cli = LightningCLI(MLP, args=yaml.safe_load(text), run=False, save_config_callback=None)
            assert any(type(callback).__module__.startswith("lightning_prune") for callback in cli.trainer.callbacks)


@pytest.mark.parametrize("page", pages_with("bash"))
def test_command_lines_are_accepted(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = blocks(PAGES[page])
    configs = [text for language, text in found if language == "yaml"]
    Path("prune.yaml").write_text("".join(configs[:1]))
    commands = "".join(text for language, text in found if language == "bash").replace("\\\n", "")
    for command in commands.splitlines():
        if command.startswith("python main.py fit "):  # the others install, show or serve
            cli = LightningCLI(MLP, args=shlex.split(command)[3:], run=False, save_config_callback=None)
            assert any(type(callback).__module__.startswith("lightning_prune") for callback in cli.trainer.callbacks)


def test_every_public_name_stands_on_one_page_of_the_api() -> None:
    text = "".join(path.read_text() for name, path in PAGES.items() if name.startswith("api/"))
    named = re.findall(r"^::: lightning_prune\.(\w+)$", text, flags=re.MULTILINE)
    assert sorted(named) == sorted(lightning_prune.__all__)
