"""The benchmarks follow the package: each can be imported, and measures an update that prunes what it should."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "benchmarks"
CODE = """
import sys
from importlib import import_module
folder, *names = sys.argv[1:]
for name in names:
    import_module(name)
import mask_update
model = mask_update.make_model(2, 64)
for name, make in mask_update.updates(model).items():
    masks = make()().values()
    print(name, sum(int((~mask).sum()) for mask in masks) / sum(mask.numel() for mask in masks), sep=": ")
print("passes", round(mask_update.passes(model, scope="local")), sep=": ")
import pruning_bench
from networks import digits
data = digits()
for by in (pruning_bench.by_us, pruning_bench.by_peer):
    network = pruning_bench.resnet().eval()
    before = pruning_bench.operations(network, data.train[0][:1])
    small, _ = by(network, "magnitude, L1", 2, 0, data)
    print(by.__name__, before / pruning_bench.operations(small, data.train[0][:1]), sep=": ")
"""

# in the same process, which takes seconds to load; both folders have modules of the same names
ZOO = """
for name in names:
    sys.modules.pop(name, None)
sys.path.insert(0, f"{folder}/zoo")
import runpy
import transformers
zoo = runpy.run_path(f"{folder}/zoo/__main__.py", run_name="zoo")
for name in ("bert", "llama", "vit"):
    found = zoo["tried"]("transformers", name)
    print("zoo", name, *(zoo["works"](found.get(part)) for part in zoo["PARTS"][:4]), sep=": ")
"""


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """What a process prints that imports every benchmark: two of these modules have the names of modules of tests."""
    names = sorted(path.stem for path in FOLDER.glob("*.py"))
    settings = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{FOLDER}", "MPLBACKEND": "Agg"}
    code = CODE + ZOO if find_spec("transformers") else CODE
    done = subprocess.run([sys.executable, "-c", code, FOLDER, *names], env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_benchmark_can_be_imported_and_prunes_what_it_should(printed: list[str]) -> None:
    found = dict(line.split(": ") for line in printed if not line.startswith("zoo"))
    assert int(found.pop("passes")) >= 1
    for by in ("by_us", "by_peer"):
        assert abs(float(found.pop(by)) - 2) < 0.2, by
    assert all(abs(float(zeros) - 0.9) < 0.01 for zeros in found.values()), found


def test_a_sample_of_the_zoo_is_pruned_and_shrunk(printed: list[str]) -> None:
    pytest.importorskip("transformers")
    found = [line for line in printed if line.startswith("zoo")]
    # single weights, channels, heads and FLOPs
    assert found == [f"zoo: {name}: True: True: True: True" for name in ("bert", "llama", "vit")]
