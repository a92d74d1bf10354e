"""The notebooks are valid, say what to install, and keep the outputs of one run; `make examples` runs them."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

import lightning_prune

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
NOTEBOOKS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.ipynb"))}


def cells(notebook: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def code(notebook: dict[str, Any]) -> str:
    """Return the code of all cells without magics."""
    lines = "".join("".join(cell["source"]) + "\n" for cell in cells(notebook, "code")).splitlines()
    return "\n".join(line for line in lines if not line.startswith("%"))


def test_readers_find_them() -> None:
    assert NOTEBOOKS
    listed = (FOLDER.parent / "README.md").read_text()
    assert all(f"notebooks/{name}.ipynb" in listed for name in NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_format(name: str) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.reads(json.dumps(NOTEBOOKS[name]), as_version=4))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_starts_with_what_to_install(name: str) -> None:
    first = NOTEBOOKS[name]["cells"][0]
    assert first["cell_type"] == "markdown"
    assert re.search(r"^pip install '\.\[", "".join(first["source"]), flags=re.MULTILINE)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_those_of_one_run(name: str) -> None:
    ran = cells(NOTEBOOKS[name], "code")
    assert [cell["execution_count"] for cell in ran] == list(range(1, len(ran) + 1))
    outputs = [output for cell in ran for output in cell["outputs"]]
    assert outputs
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    text = json.dumps(outputs)
    assert not re.findall(r"/(?:root|home|tmp|work|Users)/", text)  # nothing of the machine that ran it
    assert "Warning" not in text
    assert len(text) < 200_000


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_it_imports_exists(name: str) -> None:
    tree = ast.parse(code(NOTEBOOKS[name]))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "lightning_prune"]
    names = {alias.name for node in imports for alias in node.names}
    assert names
    assert names <= set(lightning_prune.__all__)
