"""What the package adds to `import lightning.pytorch`: `python examples/benchmarks/import_time.py [--full]`.

Each round is a new process. It imports Lightning, then this package with cached bytecode, then the package again
without, as the very first import does. Measured in CPU time, which other processes do not affect.
"""

import os
import subprocess
import sys
from statistics import median

import matplotlib.pyplot as plt
from timing import RESULTS, parser, save, significant, table

NAMES = ("import lightning.pytorch", "import lightning_prune after it", "the same, sources compiled")
CODE = """
import sys, time

def seconds(code):
    began = time.process_time()
    exec(code)
    return time.process_time() - began

found = [seconds("import lightning.pytorch"), seconds("import lightning_prune")]
for name in [name for name in sys.modules if name.partition(".")[0] == "lightning_prune"]:
    del sys.modules[name]
sys.pycache_prefix = "/dev/null"  # no bytecode there, and none can be written
found.append(seconds("import lightning_prune"))
print(*found)
"""


def run() -> list[float]:
    """Return the seconds of the three imports in a new interpreter, one that caches bytecode as it does by default."""
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, "-c", CODE], env=settings, check=True, stdout=subprocess.PIPE, text=True)
    return [float(number) for number in done.stdout.split()]


def plot(seconds: dict[str, tuple[float, ...]]) -> None:
    """Plot all runs as points, with their medians."""
    figure, axes = plt.subplots(figsize=(7, 2.4), layout="constrained")
    for place, found in enumerate(seconds.values()):
        axes.plot(found, [place] * len(found), "o", alpha=0.4)
        axes.plot(median(found), place, "|", color="black", markersize=24)
    axes.set_yticks(range(len(seconds)), list(seconds))
    axes.set_ylim(len(seconds) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.margins(x=0.08)
    axes.set_xlabel("CPU time (s); bars are medians")
    figure.savefig(RESULTS / "import_time.png", dpi=120)


def main() -> None:
    """Measure and report."""
    options = parser(__doc__.splitlines()[0]).parse_args()
    run()  # caches the bytecode
    found = [run() for _ in range(options.rounds or (20 if options.full else 3))]
    seconds = dict(zip(NAMES, zip(*found, strict=True), strict=True))
    rows = [{"code": code, "seconds": significant(median(times))} for code, times in seconds.items()]
    print(table([["", "ms"], *([row["code"], f"{1e3 * row['seconds']:.0f}"] for row in rows)]))
    save("import_time", options.full, rows)
    plot(seconds)


if __name__ == "__main__":
    main()
