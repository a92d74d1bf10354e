"""What shrinking saves: `python examples/benchmarks/shrink.py [--full]`.

A network the size of ResNet-18 and one like MobileNet-v2, with random weights, lose the same fraction of the channels
of every layer, so that 30, 50 and 70 % of the FLOPs are removed: by `prune` and `shrink`, and by Torch-Pruning's own
pruner with the L1 norm and the same ratio of channels. Channels stay in multiples of eight. Times are CPU times of a
forward pass in eval mode on one core, relative to the dense model in the same round, in torch and in ONNX Runtime.
"""

import io
import logging
import tempfile
import time
import warnings
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import onnxruntime
import torch
import torch_pruning
from models import cnn, mobilenet
from onnx_session import single_threaded
from timing import RESULTS, alternate, parser, save, significant, table
from timing import ratio as within
from torch import Tensor, nn

from lightning_prune import Channel, export_onnx, prune, shrink
from lightning_prune.models.flops import dense_flops
from lightning_prune.models.forward import difference, run

MODELS = {"resnet18": cnn, "mobilenet": mobilenet}
REMOVED = [0.3, 0.5, 0.7]
BATCHES = [1, 32]
MULTIPLE = 8
GOAL = 1.25  # the target: latency at batch 32, relative to dense, is at most this times the fraction of FLOPs left


def example(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 64)


def flops(model: nn.Module) -> int:
    """Return the FLOPs of one image."""
    return sum(dense_flops(model, example(1)).values())


def masked(model: nn.Module, removed: float) -> nn.Module:
    """Return a copy with this fraction of the FLOPs removed: the same fraction of channels is zero in every layer."""
    model = deepcopy(model)
    channels = Channel(coupled=True, round_to=MULTIPLE)
    prune(model, removed, of="flops", granularity=channels, scope="local", example_inputs=example())
    return model


def width(model: nn.Module) -> int:
    """Return the number of output channels of all convolutions."""
    return sum(layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d))


def peer(model: nn.Module, ratio: float) -> nn.Module:
    """Return a copy pruned by Torch-Pruning."""
    model = deepcopy(model).eval()
    *_, last = (module for module in model.modules() if isinstance(module, nn.Linear))
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=1)
    torch_pruning.pruner.BasePruner(
        model, example(), importance, pruning_ratio=ratio, ignored_layers=[last], round_to=MULTIPLE
    ).step()
    return model


def file_size(model: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return len(file.getvalue())


@torch.inference_mode()
def forward(model: nn.Module, inputs: Tensor, times: int) -> None:
    for _ in range(times):
        model(inputs)


def forward_onnx(session: onnxruntime.InferenceSession, inputs: Any, times: int) -> None:
    for _ in range(times):
        session.run(None, inputs)


def exported(model: nn.Module, folder: Path, name: str) -> onnxruntime.InferenceSession:
    """Return a session with one thread."""
    export_onnx(model, example(), folder / f"{name}.onnx")
    return single_threaded(folder / f"{name}.onnx")


def latencies(models: dict[str, nn.Module], rounds: int) -> dict[str, dict[str, Any]]:
    """Return the milliseconds of every model, and their ratio to the first one."""
    found: dict[str, dict[str, Any]] = {name: {} for name in models}
    with tempfile.TemporaryDirectory() as folder:
        sessions = {
            name: exported(model, Path(folder), str(place)) for place, (name, model) in enumerate(models.items())
        }
        for batch in BATCHES:
            inputs, times = example(batch), max(1, 16 // batch)
            array = {"input": inputs.numpy()}
            kinds = {
                "torch": {name: partial(forward, model.eval(), inputs, times) for name, model in models.items()},
                "onnx": {name: partial(forward_onnx, session, array, times) for name, session in sessions.items()},
            }
            for kind, functions in kinds.items():
                seconds = alternate(functions, rounds, clock=time.process_time)
                dense = next(iter(seconds.values()))
                for name, each in seconds.items():
                    found[name][f"{kind}_ms_{batch}"] = significant(1e3 * median(each) / times)
                    found[name][f"{kind}_ratio_{batch}"] = round(within(each, dense), 3)
    return found


def measure(kind: str, rounds: int) -> list[dict[str, Any]]:
    """Return a row for the dense model, and two for each fraction of FLOPs removed."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):  # so that a wrong removal would show
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)
    inputs = example()
    models, facts = {"dense": model}, {"dense": {"channel_ratio": 0.0, "difference": 0.0}}
    for removed in REMOVED:
        zeros = masked(model, removed)
        small = shrink(zeros, inputs)
        ratio = 1 - width(small) / width(model)
        apart = difference(run(zeros, inputs), run(small, inputs))
        models |= {f"{removed:.0%}": small, f"{removed:.0%}, Torch-Pruning": peer(model, ratio)}
        facts |= {f"{removed:.0%}": {"channel_ratio": round(ratio, 4), "difference": significant(apart)}}
        facts |= {f"{removed:.0%}, Torch-Pruning": {"channel_ratio": round(ratio, 4), "difference": None}}
    dense = flops(model)
    times = latencies(models, rounds)
    return [
        {
            "model": kind,
            "variant": name,
            "parameters": sum(parameter.numel() for parameter in each.parameters()),
            "flops": flops(each),
            "removed": round(1 - flops(each) / dense, 4),
            "file_bytes": file_size(each),
            **facts[name],
            **times[name],
        }
        for name, each in models.items()
    ]


def tabulate(rows: list[dict[str, Any]]) -> str:
    head = ["FLOPs removed", "counted", "parameters", "file, MB", "masked - shrunk"]
    head += [f"{kind} {batch}" for kind in ("torch", "onnx") for batch in BATCHES]
    cells = []
    for row in rows:
        times = [f"{row[f'{kind}_ratio_{batch}']:.2f}" for kind in ("torch", "onnx") for batch in BATCHES]
        apart = "" if row["difference"] is None else f"{row['difference']:.0e}"
        size = f"{row['file_bytes'] / 1e6:.2f}"
        cells.append([row["variant"], f"{row['removed']:.1%}", f"{row['parameters']:,}", size, apart, *times])
    return table([head, *cells])


def plot(rows: list[dict[str, Any]]) -> None:
    """Plot the time against the FLOPs left, with the target."""
    kinds = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(kinds), figsize=(9, 4), layout="constrained", sharey=True, squeeze=False)
    for place, kind in zip(axes[0], kinds, strict=True):
        for label, end, style in (("lightning_prune", "", "o-"), ("Torch-Pruning", "Torch-Pruning", "s--")):
            for engine, colour in (("torch", "C0"), ("onnx", "C1")):
                points = [
                    (1 - row["removed"], row[f"{engine}_ratio_32"])
                    for row in rows
                    if row["model"] == kind and (row["variant"] == "dense" or ("Torch" in row["variant"]) == bool(end))
                ]
                place.plot(*zip(*points, strict=True), style, color=colour, label=f"{label}, {engine}", markersize=4)
        place.plot([0, 1], [0, GOAL], color="black", linewidth=1, label=f"{GOAL} x FLOPs")
        place.set(title=kind, xlabel="FLOPs left", xlim=(0, 1.05), ylim=(0, 1.1))
    axes[0, 0].set_ylabel("time at batch 32, dense = 1 (1 core)")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(RESULTS / "shrink.png", dpi=120)


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    options = arguments.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows = []
    for kind in options.models:
        found = measure(kind, 15 if options.full else 5)
        save("shrink", options.full, rows + found)
        print(f"{kind}\n{tabulate(found)}\n", flush=True)
        rows += found
    for row in rows:
        if row["removed"] and row["torch_ratio_32"] > GOAL * (1 - row["removed"]):
            print(f"{row['model']}, {row['variant']}: {row['torch_ratio_32']} > {GOAL} x {1 - row['removed']:.3f}")
    plot(rows)


if __name__ == "__main__":
    main()
