"""Typing: a user's code that type checks with mypy's strict settings is what the README shows."""

import re
from pathlib import Path

import pytest
from mypy import api
from pages import needs

import lightning_prune

ROOT = Path(lightning_prune.__file__).parents[1]
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
    code = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(code) > 3
    for number, block in enumerate(code):
        if not needs(block):
            (tmp_path / f"readme_{number}.py").write_text(block)
    (tmp_path / "mistakes.py").write_text(MISTAKES)
    monkeypatch.chdir(ROOT)  # the settings, and the cache, of make lint
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    files = map(str, sorted(tmp_path.glob("*.py")))
    found, errors, _ = api.run(list(files))
    assert not errors
    wrong = re.findall(r"\b(readme_\d+|mistakes)\.py:(\d+): error:", found)
    assert wrong == [("mistakes", line) for line in "45678"], found
