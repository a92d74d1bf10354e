"""CONTRIBUTING.md: short, of this package as it is, and part of what is published."""

import re
from pathlib import Path

import lightning_prune

ROOT = Path(lightning_prune.__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
PACKAGE = ROOT / "lightning_prune"


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= 60


def test_the_picture_has_every_room() -> None:
    picture = re.search(r"^```text\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
    assert picture is not None
    drawn = [name for line in picture[1].splitlines() for name in line[:34].split()]
    rooms = [path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    assert sorted(drawn) == sorted(room for room in rooms if not room.startswith("_"))


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
