"""The callbacks serve ``lightning.pytorch`` and ``pytorch_lightning`` alike, in Trainers and on the command line."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_either_namespace_prunes_and_judges_and_takes_a_command_line(namespace: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("namespace.py")
    done = subprocess.run([sys.executable, script, namespace, tmp_path], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_package_leaves_the_other_namespace_alone() -> None:
    code = "import sys, lightning_prune; assert 'pytorch_lightning' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
