"""Shared by the benchmarks: time functions in alternation, describe the machine, store the results."""

import argparse
import gc
import json
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"


def quiet() -> None:
    """Make Lightning log errors only."""
    for namespace in ("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(namespace).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, help="number of rounds; each variant runs once per round")
    parser.add_argument("--full", action="store_true", help="all sizes and more rounds")
    return parser


def machine() -> dict[str, Any]:
    """Return what a reader needs to know about the machine, and nothing that identifies it."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[2], 1),  # above 1: other processes were running
        "system": f"{platform.system()}, Python {platform.python_version()}",
        "torch": version("torch"),
        "lightning": version("lightning"),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def alternate(
    functions: dict[str, Callable[[], Any]],
    rounds: int,
    before: dict[str, Callable[[], Any]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds of every function in every round; each runs once per round, after one warm-up round.

    Whatever else the machine is doing then affects all of them alike: compare within rounds (``ratio``).

    Args:
        functions: The functions to time, by name.
        rounds: Number of rounds.
        before: Called before the function of the same name, untimed.
        clock: The clock to read; ``time.process_time`` counts only the CPU time of this process.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for count in range(rounds + 1):
        for name, function in functions.items():
            if before and name in before:
                before[name]()
            began = clock()
            result = function()
            passed = clock() - began
            del result
            if count:
                seconds[name].append(passed)
    return seconds


def ratio(seconds: Iterable[float], baseline: Iterable[float]) -> float:
    """Return the median of the ratios within the rounds."""
    return median(a / b for a, b in zip(seconds, baseline, strict=True))


def peak_memory(function: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> int | None:
    """Return the peak memory of the process during a call, in bytes above what it held before; None if not Linux.

    The function is called twice, each time after ``before``; the first call makes the allocations that stay. The
    kernel's high-water mark includes the allocations of torch and misses no peak.
    """
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    before()
    function()
    before()
    gc.collect()
    _give_back()
    reset.write_text("5")
    held = _status("VmRSS")
    result = function()
    peak = _status("VmHWM") - held
    del result
    return max(0, peak)


def _give_back() -> None:
    """Make the C library return freed memory to the system, so that it cannot hide the next allocation."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def save(name: str, full: bool, rows: list[dict[str, Any]]) -> None:
    """Write the measurements of one benchmark, and print where."""
    content = write(name, full, rows)
    print(f"\n{describe(content['machine'])}\nwritten: results/{name}.json")


def write(name: str, full: bool, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the measurements of one benchmark as JSON, one row each, and return what was written."""
    RESULTS.mkdir(exist_ok=True)
    content = {"benchmark": name, "sizes": "full" if full else "quick", "machine": machine(), "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    return content


def load(name: str) -> dict[str, Any]:
    """Return what ``save`` wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def describe(machine: dict[str, Any]) -> str:
    """Return the description of a machine as one line."""
    return (
        f"{machine['cpu']}, {machine['cores']} cores; {machine['system']}; "
        f"torch {machine['torch']}, lightning {machine['lightning']}"
    )


def table(rows: list[list[str]]) -> str:
    """Return rows of cells as lines, with the first column left-aligned and the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def significant(value: float, digits: int = 3) -> float:
    """Return a number rounded to that many significant digits, to keep the JSON small."""
    return float(f"{value:.{digits}g}")
