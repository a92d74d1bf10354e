"""Ask for half of the time, and measure what it takes: `python examples/benchmarks/latency.py [--accuracy] [--onnx]`.

Networks like ResNet-18 and MobileNet-v2 and a small transformer, with random weights, are pruned with `of="latency"`,
and with `of="flops"` to the same fraction, shrunk, and timed in turns with the dense model; with `--onnx`, in ONNX
Runtime. Groups of rows that share their inputs are not shrunk: there every layer takes its fastest form (`to_fast`).
With `--accuracy`, two small networks are trained on 5,000 images of Fashion-MNIST, pruned to equal time by both and by
a knapsack, shrunk, and fine-tuned.
Finished runs are not repeated: delete results/latency.jsonl to start over.
"""

import argparse
import copy
import os
import sys
import time
import warnings
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from fast import with_onnx
from marked import replace, spread, table
from models import Transformer, cnn, mlp, mobilenet
from runs import Runs
from timing import alternate, machine
from torch import Tensor, nn

from lightning_prune import Channel, Head, Knapsack, LatencyTable, Layer, SharedFanIn, measure_latency, prune, shrink
from lightning_prune.export.fast import fastest

sys.path.insert(0, str(Path(__file__).parent / "scopes"))
from networks import DATA, accuracy, fit
from networks import cnn as small_cnn
from networks import mobilenet as small_mobilenet

REMOVED = 0.3  # of the time of the small networks; they hardly learn with much less
RESULTS = Path(__file__).parent / "results" / "latency.jsonl"
NETWORKS = {"CNN": "three convolutions, two linear layers", "MobileNet": "four inverted residual blocks"}


def images() -> Tensor:
    return torch.randn(16, 3, 64, 64)


def tokens() -> Tensor:
    return torch.randint(100, (8, 64))


def wide_transformer() -> nn.Module:
    """Return a transformer of which half can go: its feed-forward layers take most of the time."""
    return Transformer(words=100, width=256)


def rows() -> Tensor:
    return torch.randn(32, 784)


CASES: dict[str, tuple[Any, Any, Any, float]] = {
    "ResNet-18-like, round_to=16": (cnn, images, Channel(round_to=16), 0.5),
    "ResNet-18-like, round_to=8": (cnn, images, Channel(round_to=8), 0.5),
    "MobileNet-like, round_to=8": (mobilenet, images, Channel(round_to=8), 0.5),
    "MobileNet-like, round_to=16": (mobilenet, images, Channel(round_to=16), 0.5),
    "transformer, Channel": (wide_transformer, tokens, Channel(round_to=8), 0.3),
    "transformer, Head": (wide_transformer, tokens, Head(), 0.15),
    "transformer, Layer": (wide_transformer, tokens, Layer(), 0.45),
    "MLP, SharedFanIn": (partial(mlp, 1024), rows, SharedFanIn(16), 0.5),
    "transformer, SharedFanIn": (wide_transformer, tokens, SharedFanIn(16), 0.5),
}


def ratios(models: dict[str, nn.Module], inputs: Tensor, rounds: int, runtime: str = "torch") -> dict[str, float]:
    """Return the CPU time of each model relative to the first one: the median over rounds."""
    runs = {name: lambda model=model: model.eval()(inputs) for name, model in models.items()}
    if runtime == "onnxruntime":
        runs = {name: session(model, inputs) for name, model in models.items()}
    with torch.inference_mode():
        seconds = alternate(runs, rounds, clock=time.process_time)
    dense = next(iter(seconds.values()))
    return {name: round(median(a / b for a, b in zip(s, dense, strict=True)), 3) for name, s in seconds.items()}


def session(model: nn.Module, inputs: Tensor) -> Any:
    """Return a function that runs a model in ONNX Runtime on one thread."""
    with TemporaryDirectory() as folder:
        return with_onnx(model, inputs, folder)


def half(results: Runs, name: str, runtime: str) -> None:
    """Prune a network to a fraction of its time, and measure it."""
    kind = "time" if runtime == "torch" else "time in ONNX Runtime"
    build, example, granularity, sparsity = CASES[name]
    if results.have(kind=kind, case=name):
        return
    torch.manual_seed(0)
    dense, inputs = build().eval(), example()
    began = time.perf_counter()
    times = measure_latency(dense, inputs, granularity, runtime)
    took = time.perf_counter() - began
    models: dict[str, nn.Module] = {"dense": dense}
    for measure, of in {"latency": times, "flops": "flops"}.items():
        if measure in granularity.measures:
            model = copy.deepcopy(dense)
            prune(model, sparsity, granularity=granularity, of=of, example_inputs=inputs)
            models[measure] = shrink(model, inputs) if "flops" in granularity.measures else fastest(model, inputs)[0]
    found = ratios(models, inputs, 31, runtime)
    shown = {"asked": round(1 - sparsity, 3), "latency": found["latency"], "flops": found.get("flops")}
    facts = {"dense_ms": round(times.dense, 2), "measuring_s": round(took, 1), "load": round(os.getloadavg()[0], 1)}
    results.add(kind=kind, case=name, **shown, **facts, cpu=machine()["cpu"])
    print(results.rows[-1], flush=True)


def compare(results: Runs, network: str, seed: int) -> None:
    """Train, prune by latency and by FLOPs to about the same time, fine-tune, and compare accuracies."""
    if results.have(kind="accuracy", network=network, seed=seed):
        return
    data = DATA["Fashion-MNIST"]()
    torch.manual_seed(seed)
    dense = {"CNN": small_cnn, "MobileNet": small_mobilenet}[network]()
    fit(dense, data, data.epochs, seed)
    example = data.train[0][:64]
    known = measure_latency(dense.eval(), example, Channel(round_to=4))
    models, goals = {"dense": dense}, {"latency": REMOVED}
    models["latency"] = pruned(dense, example, known, REMOVED)
    models["knapsack"] = pruned(dense, example, known, REMOVED, Knapsack())
    goals["flops"] = equal_time(dense, example, known)
    models["flops"] = pruned(dense, example, "flops", goals["flops"])
    times = ratios(models, example, 51)
    if shapes(models["flops"]) == shapes(models["latency"]):  # the same share of every layer
        models["flops"] = models["latency"]
    for model in {models[name]: None for name in ("latency", "knapsack", "flops")}:
        fit(model, data, data.fine_tuning, seed)
    accuracies = {name: accuracy(model, data) for name, model in models.items()}
    place = {"kind": "accuracy", "network": network, "seed": seed, "load": round(os.getloadavg()[0], 1)}
    results.add(**place, goals=goals, times=times, accuracies=accuracies)
    print(results.rows[-1], flush=True)


def pruned(dense: nn.Module, example: Tensor, of: Any, sparsity: float, scope: Any = None) -> nn.Module:
    """Return a smaller copy of a network."""
    model = copy.deepcopy(dense)
    prune(model, sparsity, granularity=Channel(round_to=4), of=of, scope=scope, example_inputs=example)
    return shrink(model, example)


def shapes(model: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in model.parameters()]


def equal_time(dense: nn.Module, example: Tensor, known: LatencyTable) -> float:
    """Return the fraction of FLOPs, in steps of 2 %, whose removal saves as much time according to the table."""
    for percent in range(10, 98, 2):
        small = pruned(dense, example, "flops", percent / 100)
        whole = dict(dense.named_parameters())
        parts = {
            (name, dim): after / before
            for name, parameter in small.named_parameters()
            for dim, (after, before) in enumerate(zip(parameter.shape, whole[name].shape, strict=True))
        }
        if known.left(parts) <= 1 - REMOVED:
            return percent / 100
    return 0.96


def make_table(results: Runs) -> str:
    """Return the accuracies at equal time, of the seeds that the rule of the knapsack was chosen on, and of others."""
    lines = []
    for network, seeds in product(NETWORKS, (range(5), range(5, 10))):
        runs = [run for seed in seeds for run in results.have(kind="accuracy", network=network, seed=seed)]
        if len(runs) < 2:
            continue
        cells = [spread([run["accuracies"]["dense"] for run in runs])]
        for way in ("flops", "latency", "knapsack"):
            accuracies, times = ([run[what][way] for run in runs] for what in ("accuracies", "times"))
            cells.append(f"{spread(accuracies)} ({mean(times):.2f})")
        ahead = sum(run["accuracies"]["knapsack"] > run["accuracies"]["flops"] for run in runs)
        lines.append([NETWORKS[network], f"{seeds[0]} to {seeds[-1]}", *cells, f"{ahead} of {len(runs)}"])
    ways = ['`of="flops"`, local', '`of="latency"`, local', '`of="latency"`, `Knapsack()`']
    return table(["network", "seeds", "dense", *ways, "`Knapsack()` ahead of FLOPs"], lines)


def main() -> None:
    """Measure what is missing, and write the accuracies into the docs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accuracy", action="store_true", help="compare accuracies at equal time as well")
    parser.add_argument("--onnx", action="store_true", help="measure in ONNX Runtime")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    results = Runs(RESULTS)
    for name in options.cases:
        half(results, name, "onnxruntime" if options.onnx else "torch")
    for network, seed in product(NETWORKS, range(options.seeds)) if options.accuracy else ():
        compare(results, network, seed)
    replace(Path(__file__).parents[2] / "docs" / "speed.md", "equal time", make_table(results))


if __name__ == "__main__":
    main()
