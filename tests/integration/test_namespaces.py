"""The callbacks serve ``lightning.pytorch`` and ``pytorch_lightning`` alike, in Trainers and on the command line."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_either_namespace_prunes_and_judges_and_takes_a_command_line(namespace: str, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "support" / "namespace.py"
    done = subprocess.run([sys.executable, script, namespace, tmp_path], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_import_loads_nothing_but_the_package_itself() -> None:
    """All that needs time to load, and the other namespace, waits until a function needs it."""
    code = """
import sys
import lightning.pytorch
known = set(sys.modules)
import lightning_prune
print(*(set(sys.modules) - known), sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = done.stdout.split()
    assert "lightning_prune.training.pruning" in names
    assert [name for name in names if name.partition(".")[0] != "lightning_prune"] == []
