"""Typing: a user's code that type checks with mypy's strict settings is what the README shows."""

import re
from pathlib import Path

import pytest
from mypy import api

import lightning_prune

ROOT = Path(lightning_prune.__file__).parents[1]
SETTINGS = ("--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache"))  # of make lint
MISTAKES = """
from lightning_prune import MagnitudePruning, Pruning, RigL

MagnitudePruning(0.9, sechedule="linear")
MagnitudePruning(0.9, schedule="quadratic")
RigL(0.9, scope="layer")
Pruning(0.9, criterion="magnitude")
Pruning(0.9, targets=[1])
"""


@pytest.mark.timeout(600)  # without a cache mypy reads all of PyTorch
def test_the_readme_passes_mypy_and_mistakes_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) > 10
    for number, block in enumerate(blocks):
        (tmp_path / f"readme_{number}.py").write_text(block)
    (tmp_path / "mistakes.py").write_text(MISTAKES)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    found, errors, _ = api.run([*SETTINGS, *map(str, sorted(tmp_path.glob("*.py")))])
    assert not errors
    mistaken = [line for line in found.splitlines() if "/mistakes.py:" in line and ": error:" in line]
    assert [int(line.split(":")[1]) for line in mistaken] == [4, 5, 6, 7, 8], found
    assert f"Found {len(mistaken)} errors in 1 file" in found, found
