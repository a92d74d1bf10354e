"""What the package adds to `import lightning.pytorch`: `python examples/benchmarks/import_time.py [--full]`.

Each import runs in a process of its own, in alternation; what is added is also timed inside one process. All in
processor time, to which other processes do not add.
"""

import resource
import subprocess
import sys
from statistics import median

import matplotlib.pyplot as plt
from timing import RESULTS, alternate, parser, save, significant, table

LIGHTNING = "import lightning.pytorch"
OURS = "import lightning_prune"
INSIDE = f"""
import time
{LIGHTNING}
began = time.process_time()
{OURS}
print(time.process_time() - began)
"""


def run(code: str) -> str:
    """Return what a new interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def of_children() -> float:
    """Return the processor seconds of all processes that have been started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def plot(seconds: dict[str, list[float]]) -> None:
    """Draw all runs as points, with their medians."""
    figure, axes = plt.subplots(figsize=(7, 2.4), layout="constrained")
    for place, found in enumerate(seconds.values()):
        axes.plot(found, [place] * len(found), "o", alpha=0.4)
        axes.plot(median(found), place, "|", color="black", markersize=24)
    axes.set_yticks(range(len(seconds)), list(seconds))
    axes.set_ylim(-0.6, len(seconds) - 0.4)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("processor time of a new interpreter (s); the bars are medians")
    figure.savefig(RESULTS / "import_time.png", dpi=120)


def main() -> None:
    """Measure and report."""
    options = parser(__doc__.splitlines()[0]).parse_args()
    rounds = options.rounds or (20 if options.full else 7)
    inside: list[float] = []
    seconds = alternate(
        {
            LIGHTNING: lambda: run(LIGHTNING),
            OURS: lambda: run(OURS),
            "both, one after the other": lambda: inside.append(float(run(INSIDE))),
        },
        rounds,
        clock=of_children,
    )
    rows = [{"code": code, "seconds": significant(median(found))} for code, found in seconds.items()]
    added = median(a - b for a, b in zip(seconds[OURS], seconds[LIGHTNING], strict=True))
    rows.append({"code": "added, between processes", "seconds": significant(added)})
    rows.append({"code": "added, inside one process", "seconds": significant(median(inside[1:]))})
    print(table([["", "ms"], *([row["code"], f"{1e3 * row['seconds']:.0f}"] for row in rows)]))
    save("import_time", options.full, rows)
    plot(seconds)


if __name__ == "__main__":
    main()
