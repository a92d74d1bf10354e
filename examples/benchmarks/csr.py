"""The sparsity from which CSR is faster than dense: `python examples/benchmarks/csr.py [--full]`.

Linear layers of several sizes with random zeros, at several batch sizes, on one core: CPU time of `CSRLinear` against
`nn.Linear`, as the median of the ratios within rounds. The last column is the lowest sparsity from which, up to 98 %,
CSR is faster at every batch size; `lightning_prune.export.sparse_layers` takes its defaults from it.
"""

import time
from functools import partial

import torch
from timing import alternate, parser, ratio, save, table
from torch import Tensor, nn

from lightning_prune.export.sparse_layers import CSRLinear

SPARSITIES = [0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98]
BATCHES = [1, 8, 32, 128]


@torch.inference_mode()
def repeat(layer: nn.Module, inputs: Tensor, times: int) -> None:
    """Run a layer often enough for the resolution of the clock."""
    for _ in range(times):
        layer(inputs)


def speed_up(size: int, sparsity: float, batch: int, rounds: int) -> float:
    """Return the speed-up of CSR over dense."""
    linear = nn.Linear(size, size)
    with torch.no_grad():
        linear.weight[torch.rand_like(linear.weight) < sparsity] = 0.0
    inputs, times = torch.randn(batch, size), max(4, 10**8 // (size * size * batch))
    layers = {"dense": linear, "csr": CSRLinear(linear)}
    functions = {name: partial(repeat, layer, inputs, times) for name, layer in layers.items()}
    seconds = alternate(functions, rounds, clock=time.process_time)
    return ratio(seconds["dense"], seconds["csr"])


def main() -> None:
    """Measure every size, sparsity and batch size."""
    options = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes, rounds = ([256, 512, 1024, 2048, 4096], 9) if options.full else ([256, 512, 1024, 2048], 5)
    rows, cells = [], [["weight", "batch", *[f"{sparsity:.0%}" for sparsity in SPARSITIES], "faster from"]]
    for size in sizes:
        found = {b: [round(speed_up(size, s, b, rounds), 2) for s in SPARSITIES] for b in BATCHES}
        least = [min(column) for column in zip(*found.values(), strict=True)]  # over all batch sizes
        slow = [place for place, times in enumerate(least) if times < 1.0]
        first = slow[-1] + 1 if slow else 0
        limit = SPARSITIES[first] if first < len(SPARSITIES) else None
        for batch, speeds in found.items():
            cells.append([f"{size} x {size}", str(batch), *[f"{speed:.2f}" for speed in speeds], ""])
            rows.append({"size": size, "batch": batch, "speed_up": dict(zip(SPARSITIES, speeds, strict=True))})
        cells[-1][-1] = "never" if limit is None else f"{limit:.0%}"
        rows.append({"size": size, "faster_from": limit})
    print(table(cells))
    save("csr", options.full, rows)


if __name__ == "__main__":
    main()
