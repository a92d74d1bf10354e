"""Prune a small model of every family of transformers: ``python examples/benchmarks/zoo``.

It is pruned by single weights, by channels and by heads, and shrunk.

Each model has a process of its own and a time limit. With names as arguments, these models alone.
"""

import multiprocessing
import sys
import time
from typing import Any

from models import MODELS
from trial import run

LIMIT = 60  # seconds
EXACT = 1e-10
# processes that share the imports, where there are such
PROCESSES: Any = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")


def tried(name: str) -> dict[str, Any]:
    """Return what a process found about a model."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=run, args=(name, sender), daemon=True)
    process.start()
    sender.close()
    result: dict[str, Any] = {}
    end = time.monotonic() + LIMIT
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            result = receiver.recv()
    except EOFError:  # it has ended
        why = f"the process ended with {process.exitcode}" if process.exitcode else ""
    else:
        why = f"over {LIMIT} s"
    process.kill()
    return result if "heads" in result or "built" in result else {"built": why or "ended", **result}


def cell(found: Any) -> str:
    """Return the parameters that are left and the time, or that it failed."""
    if not isinstance(found, dict):
        return "failed"
    equal = "=" if found["difference"] <= EXACT else f"off by {found['difference']:.0e}"
    return f"{100 * found['left']:.0f} % {equal} {found['seconds']:.1f} s"


def main() -> None:
    """Print a line for each model, and a summary."""
    good = dict.fromkeys(("weights", "channels", "heads"), 0)
    names = sys.argv[1:] or list(MODELS)
    print(f"{'model':14}{'weights':9}{'channels left':21}{'heads left':21}what failed")
    for name in names:
        found = tried(name)
        parts = {word: found.get(word, "not reached") for word in good}
        for word, part in parts.items():
            good[word] += part is True or (isinstance(part, dict) and part["difference"] <= EXACT and part["left"] < 1)
        failed = [found[word] for word in ("built", *good) if isinstance(found.get(word), str)]
        exact = "exact" if parts["weights"] is True else "failed"
        reasons = " | ".join(reason[:160].replace("\n", " ") for reason in failed)
        print(f"{name:14}{exact:9}{cell(parts['channels']):21}{cell(parts['heads']):21}{reasons}", flush=True)
    print(", ".join(f"{word}: {count} of {len(names)}" for word, count in good.items()))


if __name__ == "__main__":
    main()
