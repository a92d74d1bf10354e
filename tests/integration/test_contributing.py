"""CONTRIBUTING.md: short, of this package as it is, and part of what is published."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_prune

ROOT = Path(lightning_prune.__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
PACKAGE = ROOT / "lightning_prune"


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= 60


def floors() -> list[list[str]]:
    """Return the rooms that are drawn, from the top to the bottom."""
    picture = re.search(r"^```text\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
    assert picture is not None
    return [line[:34].split() for line in picture[1].splitlines()]


def imports(path: Path) -> Iterator[str]:
    """Yield the rooms that a file imports from, but for what only a type checker reads."""
    tree = ast.parse(path.read_text())
    types = {node for found in ast.walk(tree) if _is_for_types(found) for node in ast.walk(found)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in types:
            package, _, room = str(node.module).partition(".")
            if package == PACKAGE.name:
                yield from [room.partition(".")[0]] if room else [alias.name for alias in node.names]


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_the_picture_has_every_room() -> None:
    rooms = [path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    assert sorted(room for floor in floors() for room in floor) == sorted(
        room for room in rooms if not room.startswith("_")
    )


@pytest.mark.parametrize("room", [room for floor in floors() for room in floor])
def test_imports_point_down(room: str) -> None:
    level = next(number for number, floor in enumerate(floors()) if room in floor)
    below = {other for floor in floors()[level + 1 :] for other in floor}
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else (PACKAGE / room).rglob("*.py")
    found = {(file.name, other) for file in files for other in imports(file)}
    assert {(file, other) for file, other in found if other not in below | {room, "_version"}} == set()


def test_what_it_names_exists() -> None:
    paths = [name for name in re.findall(r"`([\w/]+(?:\.\w+|/))`", TEXT) if "/" in name or name.isupper()]
    assert len(paths) >= 5
    assert [path for path in paths if not (ROOT / path).exists()] == []
    named = re.findall(r"^## Add .*example: `(\w+)`", TEXT, flags=re.MULTILINE)
    assert len(named) == 4
    source = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    assert [name for name in named if not re.search(rf"^(class|def) {name}\b", source, flags=re.MULTILINE)] == []


def test_it_is_published_and_on_the_site() -> None:
    sdist = (ROOT / "pyproject.toml").read_text().partition("[tool.hatch.build.targets.sdist]")[2].partition("\n[")[0]
    assert '"/CONTRIBUTING.md"' in sdist
    assert '--8<-- "CONTRIBUTING.md"' in (ROOT / "docs" / "contributing.md").read_text()
