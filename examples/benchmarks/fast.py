"""How much faster zeros make models, against the fastest dense run: `python examples/benchmarks/fast.py [--full]`.

On one core, in float32, as CPU time, medians of rounds in which all take turns. Dense is the faster of torch and ONNX
Runtime on the same model. Layers are pruned by magnitude; whole models too, `SharedFanIn(16)` and `scope="local"`,
and converted by `to_fast`, to run with torch or, exported, with ONNX Runtime. Of whole models it also says what
ONNX Runtime spends its time on. The tables go into docs/speed.md.
"""

import copy
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from marked import replace
from models import MODELS, mobilenet
from onnx_session import single_threaded
from timing import alternate, describe, load, parser, save
from torch import Tensor, nn

from lightning_prune import SharedFanIn, Weight, export_onnx, prune
from lightning_prune.export.fast import fastest
from lightning_prune.export.shared_fan_in import SharedFanInLinear
from lightning_prune.export.sparse_layers import CSRLinear

PAGE = Path(__file__).parents[2] / "docs" / "speed.md"
SHAPES = [(3072, 768), (2048, 2048), (512, 512)]
SPARSITIES = [0.8, 0.9, 0.95]
BATCHES = [1, 8, 64]
RUNS = 10  # that are profiled
KINDS = {
    "products, convolutions": ("Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Conv", "FusedConv"),
    "selected inputs": ("Gather",),
    "change of layout": ("Transpose", "ReorderInput", "ReorderOutput", "Reshape", "Slice", "Concat", "Split"),
    "norms and activations": ("BatchNormalization", "LayerNormalization", "Clip", "Relu", "Gelu", "BiasGelu", "Add"),
}
OTHERS = "others"
WHOLE: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "MLP of 5.8 M weights": (MODELS["mlp"].model, lambda batch: torch.randn(batch, 784)),
    "transformer of 3.4 M weights, 64 tokens a sample": (
        MODELS["transformer"].model,
        lambda batch: torch.randint(1000, (batch, 64)),
    ),
    "MobileNetV2 (2.5 M weights), 64 x 64 pixels": (mobilenet, lambda batch: torch.randn(batch, 3, 64, 64)),
}


def with_onnx(model: nn.Module, inputs: Tensor, folder: str) -> Callable[[], Any]:
    """Return a function that runs a model with ONNX Runtime, on one thread."""
    file = f"{folder}/{id(inputs)}.onnx"
    export_onnx(model, inputs, file, batch_axis=None)
    session = single_threaded(file)
    feed = {session.get_inputs()[0].name: inputs.numpy()}
    return lambda: session.run(None, feed)


@torch.inference_mode()
def repeat(call: Callable[[], Any], times: int) -> None:
    """Call often enough for the resolution of the clock."""
    for _ in range(times):
        call()


def compare(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the milliseconds of each call."""
    first = next(iter(calls.values()))
    repeat(first, 2)
    began = time.perf_counter()
    repeat(first, 1)
    times = max(1, int(0.01 / (time.perf_counter() - began)))
    seconds = alternate(
        {name: partial(repeat, call, times) for name, call in calls.items()}, rounds, clock=time.process_time
    )
    return {name: 1e3 * median(found) / times for name, found in seconds.items()}


def layer(shape: tuple[int, int], sparsity: float, batch: int, rounds: int) -> dict[str, Any]:
    """Return the milliseconds of one linear layer, dense and in each sparse form."""
    outputs, inputs = shape
    data, dense = torch.randn(batch, inputs), nn.Linear(inputs, outputs).requires_grad_(False)
    calls: dict[str, Callable[[], Any]] = {"torch": partial(dense, data)}
    for size in (16, 32):
        pruned = copy.deepcopy(dense)
        prune(pruned.requires_grad_(True), sparsity, granularity=SharedFanIn(size))
        for by_column in (False, True):
            form = SharedFanInLinear.of(pruned.requires_grad_(False), size, by_column)
            calls[f"{size} rows{', by column' if by_column else ''}"] = partial(form, data)
    single = copy.deepcopy(dense)
    prune(single.requires_grad_(True), sparsity, granularity=Weight())
    calls["CSR"] = partial(CSRLinear(single.requires_grad_(False)), data)
    with tempfile.TemporaryDirectory() as folder:
        calls["ONNX Runtime"] = with_onnx(dense, data, folder)
        return {"shape": list(shape), "sparsity": sparsity, "batch": batch, "ms": compare(calls, rounds)}


def whole(name: str, batch: int, sparsity: float, rounds: int) -> dict[str, Any]:
    """Return the milliseconds of a whole model, dense and by ``to_fast``, in torch and ONNX Runtime."""
    torch.manual_seed(0)
    build, make = WHOLE[name]
    model, inputs = build().eval(), make(batch)
    pruned = copy.deepcopy(model)
    prune(pruned, sparsity, granularity=SharedFanIn(16), scope="local")
    fast, found = fastest(pruned, inputs)
    forms: dict[str, int] = {}
    for row in found.layers:
        forms[row.form] = forms.get(row.form, 0) + 1
    calls: dict[str, Callable[[], Any]] = {"torch": partial(model, inputs), "fast": partial(fast, inputs)}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
        calls["ONNX Runtime"] = with_onnx(model, inputs, folder)
        calls["fast, ONNX Runtime"] = with_onnx(fast, inputs, other)
        row = {"model": name, "batch": batch, "sparsity": sparsity, "forms": forms, "ms": compare(calls, rounds)}
        return row | {"profile": {"dense": profile(folder, inputs), "fast": profile(other, inputs)}}


def profile(folder: str, inputs: Tensor) -> dict[str, float]:
    """Return the milliseconds that ONNX Runtime spends on each kind of operator: medians, summed over a model."""
    (file,) = Path(folder).glob("*.onnx")
    session = single_threaded(file, profile=f"{folder}/profile")
    for _ in range(RUNS):
        session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    took: dict[tuple[str, str], list[float]] = {}
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event["name"].endswith("_kernel_time"):
            took.setdefault((event["name"], event["args"]["op_name"]), []).append(event["dur"] / 1000)
    found = dict.fromkeys((*KINDS, OTHERS), 0.0)
    for (_, operator), times in took.items():
        kind = next((kind for kind, operators in KINDS.items() if operator in operators), OTHERS)
        found[kind] += median(times)
    return found


def dense(ms: dict[str, float]) -> float:
    """Return the milliseconds of the fastest dense run."""
    return min(ms["torch"], ms["ONNX Runtime"])


def tables(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the tables of the page by the name of their mark."""
    layers = [
        "| linear layer | zeros | batch | torch, ms | ONNX Runtime, ms | groups of 16 rows | groups of 32 rows | CSR |",
        "|---|---|---|---|---|---|---|---|",
    ]
    models = [
        "| model, 90 % zeros | batch | torch, ms | ONNX Runtime, ms | `to_fast` in torch, ms | in ONNX Runtime, ms "
        "| speed-up |",
        "|---|---|---|---|---|---|---|",
    ]
    spent = [
        f"| ms in ONNX Runtime | batch | | {' | '.join((*KINDS, OTHERS))} |",
        "|---|---|---|" + "---|" * (len(KINDS) + 1),
    ]
    for row in rows:
        ms = row["ms"]
        both = f"{ms['torch']:.2f} | {ms['ONNX Runtime']:.2f}"
        if "shape" in row:
            best = {size: min(t for name, t in ms.items() if name.startswith(f"{size} rows")) for size in (16, 32)}
            speeds = [dense(ms) / best[16], dense(ms) / best[32], dense(ms) / ms["CSR"]]
            cells = " | ".join(f"{speed:.1f}" for speed in speeds)
            shape = " x ".join(map(str, row["shape"]))
            layers.append(f"| {shape} | {row['sparsity']:.0%} | {row['batch']} | {both} | {cells} |")
        else:
            fast = [ms["fast"], ms["fast, ONNX Runtime"]]
            times = " | ".join(f"{time:.2f}" for time in (*fast, dense(ms) / min(fast)))
            models.append(f"| {row['model']} | {row['batch']} | {both} | {times} |")
            for form, by_kind in row["profile"].items():
                cells = " | ".join(f"{by_kind[kind]:.2f}" for kind in (*KINDS, OTHERS))
                label = form if form == "dense" else "`to_fast`"
                spent.append(f"| {row['model'].partition(',')[0]} | {row['batch']} | {label} | {cells} |")
    return {"layers": layers, "models": models, "spent": spent}


def main() -> None:
    """Measure layers and whole models, and write the tables."""
    options = parser(__doc__.splitlines()[0]).parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rounds = options.rounds or (15 if options.full else 7)
    shapes = SHAPES if options.full else SHAPES[:1]
    rows = [layer(shape, s, batch, rounds) for shape in shapes for s in SPARSITIES for batch in BATCHES]
    rows += [whole(name, batch, 0.9, rounds) for name in WHOLE for batch in (1, 32)]
    save("fast", options.full, rows)
    for name, lines in tables(rows).items():
        print("\n".join(lines))
        replace(PAGE, name, "\n".join([*lines, "", describe(load("fast")["machine"]) + "."]))


if __name__ == "__main__":
    main()
