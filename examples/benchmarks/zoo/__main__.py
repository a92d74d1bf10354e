"""Prune the models that people bring: ``python examples/benchmarks/zoo``.

Every family of transformers, and the models of torchvision and timm where these are installed, with random weights:
pruned by single weights, by channels, by heads, by channels to 80 % of the FLOPs, and shrunk; beside them the pruner of
Torch-Pruning. Each model has a process of its own, and each part a limit of processor time. Results are kept in
results/zoo.jsonl, from which the table in docs/strategies/structured.md is written; models that are there are not run
again. With names of zoos or of models as arguments, these alone, again; -v shows errors.
"""

import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # behind its own folder, where models.py is another one
from marked import replace, table
from models import ZOOS
from trial import run

RESULTS = Path(__file__).parents[1] / "results" / "zoo.jsonl"
PAGE = Path(__file__).parents[3] / "docs" / "strategies" / "structured.md"
HEADER = ["", "models", "weights", "`Channel`", "`Head`", '`of="flops"`', "Torch-Pruning", "wrong", "slowest"]
LIMIT = 1800  # seconds for a model, where its parts have no limit of their own or hang
EXACT = 1e-10
PARTS = ("weights", "channels", "heads", "flops", "peer")
# processes that share the imports, where there are such
PROCESSES: Any = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")


def tried(zoo: str, name: str) -> dict[str, Any]:
    """Return what a process found about a model."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=run, args=(zoo, name, sender), daemon=True)
    process.start()
    sender.close()
    result: dict[str, Any] = {}
    end = time.monotonic() + LIMIT
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            result = receiver.recv()
        result["ended"] = f"over {LIMIT} s"
    except EOFError:  # it has ended
        process.join(1)
        if process.exitcode:
            result["ended"] = f"the process ended with {process.exitcode}"
    process.kill()
    return {"zoo": zoo, "model": name, **result}


def works(part: Any) -> bool:
    """Return whether a part did what it should: exact, equal and smaller."""
    if not isinstance(part, dict):
        return part is True
    return part.get("difference", 0.0) <= EXACT and part["left"] < 1


def cell(part: Any) -> str:
    """Return the parameters that are left and the time, or that it failed."""
    if not isinstance(part, dict):
        return "exact" if part is True else "failed"
    off = "" if part.get("difference", 0.0) <= EXACT else f" off by {part['difference']:.0e}"
    flops = f" ({100 * part['flops']:.0f} % FLOPs)" if "flops" in part else ""
    return f"{100 * part['left']:.0f} %{flops}{off} {part['seconds']:.1f} s"


def show(found: dict[str, Any]) -> None:
    """Print what was found about a model, on a line."""
    reasons = [found[word] for word in ("built", *PARTS, "ended") if isinstance(found.get(word), str)]
    cells = [cell(found.get(word)) for word in PARTS]
    told = " | ".join(reason[:160].replace("\n", " ") for reason in reasons)
    print(f"{found['model']:26}{cells[0]:8}{cells[1]:16}{cells[2]:16}{cells[3]:28}{cells[4]:16}{told}", flush=True)


def summed(zoo: str, found: list[dict[str, Any]]) -> list[str]:
    """Return how many models of a zoo work, as a row of a table."""
    tested = [model for model in found if model["zoo"] == zoo and "parameters" in model]
    attend = [model for model in tested if "no attention" not in str(model.get("heads"))]
    counts = [str(sum(works(model.get(word)) for model in tested)) for word in PARTS]
    counts[2] += f" of {len(attend)}"
    wrong = sum(isinstance(m.get(w), dict) and m[w].get("difference", 0.0) > EXACT for m in tested for w in PARTS)
    times = [model["channels"]["seconds"] for model in tested if isinstance(model.get("channels"), dict)]
    return [zoo, str(len(tested)), *counts, str(wrong), f"{max(times, default=0.0):.0f} s"]


def main() -> None:
    """Print a line for each model, and the summary."""
    wanted = [argument for argument in sys.argv[1:] if argument != "-v"]
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    known = {(found["zoo"], found["model"]): found for found in map(json.loads, lines)}
    print(
        f"{'model':26}{'weights':8}{'channels':16}{'heads':16}{'20 % of the FLOPs':28}{'Torch-Pruning':16}what failed"
    )
    for zoo, (names, _) in ZOOS.items():
        for name in names():
            asked = name in wanted or zoo in wanted
            if asked or (not wanted and (zoo, name) not in known):
                known[zoo, name] = tried(zoo, name)
                RESULTS.write_text("".join(f"{json.dumps(found)}\n" for found in known.values()))
            if asked or not wanted:
                show(known[zoo, name])
    rows = [summed(zoo, list(known.values())) for zoo in ZOOS]
    replace(PAGE, "zoo", table(HEADER, [row for row in rows if row[1] != "0"]))


if __name__ == "__main__":
    main()
