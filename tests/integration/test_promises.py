"""Every promise of ``docs/tested.md`` names tests, and those tests exist where it says."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ROWS = [
    tuple(cell.strip() for cell in line.strip("| ").split(" | "))
    for line in (TESTS.parent / "docs" / "tested.md").read_text().splitlines()
    if line.startswith("| ") and line != "| promise | test |"
]


def functions(path: Path) -> set[str]:
    """Return the names of the tests in a file."""
    found = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    return {node.name for node in found if node.name.startswith("test_")}


EVERYWHERE = {name for path in TESTS.rglob("test_*.py") for name in functions(path)}


def test_there_are_promises() -> None:
    assert len(ROWS) > 30
    assert all(len(row) == 2 for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_a_promise_names_tests_that_exist(row: tuple[str, str]) -> None:
    files = re.findall(r"`([\w/]+\.py)`", row[1])
    names = re.findall(r"`(test_\w+)`", row[1])
    assert files or names
    assert all((TESTS / file).is_file() for file in files), files
    assert all(functions(TESTS / file) for file in files), files
    assert set(names) <= EVERYWHERE, set(names) - EVERYWHERE
    for file, name in re.findall(r"`([\w/]+\.py)`: `(test_\w+)`", row[1]):
        assert name in functions(TESTS / file), f"{name} is not in {file}"


def test_files_of_tests_have_names_of_their_own() -> None:
    names = [path.name for path in TESTS.rglob("*.py")]
    assert len(names) == len(set(names))


def test_each_folder_of_tests_is_a_room_or_serves_all() -> None:
    rooms = {path.parent.name for path in (TESTS.parent / "lightning_prune").glob("*/__init__.py")}
    folders = {path.parent.relative_to(TESTS).as_posix() for path in TESTS.rglob("*.py")}
    assert folders - {".", "integration", "support", "data"} == rooms
