"""Which scope should channels have by default: `python examples/benchmarks/scopes [--seeds 5]`.

Three small networks with batch norms, on two sets of images, are trained, pruned once to 30, 50 and 70 % fewer FLOPs,
shrunk and fine-tuned. Finished runs are not repeated: delete results/scopes.jsonl to start over.
"""

import argparse
import copy
import itertools
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from marked import replace
from networks import DATA, NETWORKS, Data, accuracy, fit
from runs import Runs
from tables import make_tables
from variants import CRITERIA, VARIANTS

from lightning_prune import Channel, prune, shrink

RESULTS = Path(__file__).parents[1] / "results" / "scopes.jsonl"
PAGE = Path(__file__).parents[3] / "docs" / "strategies" / "structured.md"
LEVELS = (0.3, 0.5, 0.7)


def kept(model: nn.Module) -> list[int]:
    """Return the output channels of each layer."""
    return [len(module.weight) for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def pruned(dense: nn.Module, data: Data, criterion: str, variant: str, level: float) -> nn.Module:
    """Return a smaller copy of a network."""
    model = copy.deepcopy(dense)
    example = data.train[0][:8]
    batches = [(x, y) for x, y in zip(*(part[:512].split(64) for part in data.train), strict=True)]
    given = {} if criterion == "magnitude" else {"data": batches}
    options = VARIANTS[variant]
    prune(
        model,
        level,
        criterion=CRITERIA[criterion](),
        granularity=Channel(coupled=True),
        of="flops",
        example_inputs=example,
        **given,
        **options,
    )
    return shrink(model, example)


def run(results: Runs, network: str, images: str, seed: int, criterion: str) -> None:
    """Train a network, then prune and fine-tune copies of it; two scopes that keep the same share one run."""
    setting: dict[str, Any] = {"network": network, "data": images, "seed": seed}
    wanted = [(level, variant) for level in LEVELS for variant in VARIANTS]
    missing = [w for w in wanted if not results.have(**setting, criterion=criterion, level=w[0], variant=w[1])]
    if not missing:
        return
    torch.manual_seed(seed)
    data, dense = DATA[images](), NETWORKS[network]()
    fit(dense, data, data.epochs, seed)
    if not results.have(**setting, variant="dense"):
        results.add(**setting, variant="dense", accuracy=accuracy(dense, data), kept=kept(dense))
    for level, variant in missing:
        start = time.process_time()
        model = pruned(dense, data, criterion, variant, level)
        place = {**setting, "criterion": criterion, "level": level}
        same = [row for row in results.have(**place) if row["kept"] == kept(model)]
        if same:
            results.add(**place, variant=variant, accuracy=same[0]["accuracy"], kept=kept(model))
            continue
        fit(model, data, data.fine_tuning, seed)
        results.add(**place, variant=variant, accuracy=accuracy(model, data), kept=kept(model))
        print(f"{place} {variant}: {results.rows[-1]['accuracy']} {time.process_time() - start:.1f} s", flush=True)


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description="Compare scopes for channels.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tables", action="store_true", help="run nothing, only write the tables")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".* leaves ")  # what the floor is there for
    results = Runs(RESULTS)
    grid = itertools.product(DATA, CRITERIA, range(args.seeds), NETWORKS)
    for images, criterion, seed, network in () if args.tables else grid:
        run(results, network, images, seed, criterion)
    replace(PAGE, "scopes", make_tables(results.rows))


if __name__ == "__main__":
    main()
