"""Prune a small model of every family of transformers: ``python examples/benchmarks/zoo``.

It is pruned by single weights, by channels and by heads, and shrunk.

Each model has a process of its own and a time limit. With names as arguments, these models alone.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from models import MODELS

LIMIT = 120  # seconds, with the import of transformers
EXACT = 1e-10


def tried(name: str) -> dict[str, Any]:
    """Return what a process found about a model."""
    command = [sys.executable, str(Path(__file__).parent / "trial.py"), name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        output, why = done.stdout, done.stderr.strip().splitlines()[-1:]
    except subprocess.TimeoutExpired as error:
        found = error.stdout or ""
        output, why = found.decode() if isinstance(found, bytes) else found, [f"over {LIMIT} s"]
    lines = [line for line in output.splitlines() if line.startswith("{")]
    result: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return result if "heads" in result or "built" in result else {"built": "".join(why), **result}


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
