"""The benchmarks follow the package: each can be imported, and measures an update that prunes what it should."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "benchmarks"
CODE = """
import sys
from importlib import import_module
for name in sys.argv[1:]:
    import_module(name)
import mask_update
model = mask_update.make_model(2, 64)
for name, make in mask_update.updates(model).items():
    masks = make()().values()
    print(name, sum(int((~mask).sum()) for mask in masks) / sum(mask.numel() for mask in masks), sep=": ")
print("passes", round(mask_update.passes(model, scope="local")), sep=": ")
"""


def test_every_benchmark_can_be_imported_and_an_update_prunes_90_percent() -> None:
    names = sorted(path.stem for path in FOLDER.glob("*.py"))
    # in a process of its own: two of these modules have the names of modules of the tests
    settings = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{FOLDER}", "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, "-c", CODE, *names], env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = dict(line.split(": ") for line in done.stdout.splitlines())
    assert int(found.pop("passes")) >= 1
    assert all(abs(float(zeros) - 0.9) < 0.01 for zeros in found.values()), found
