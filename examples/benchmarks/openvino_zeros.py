"""Whether OpenVINO gains from zeros: `pip install openvino`, `python examples/benchmarks/openvino_zeros.py`.

An MLP and a CNN, dense and with 90 % zeros of single weights or of groups of rows, on one core, in float32, as CPU
time, medians of rounds in which all take turns. Beside it torch, ONNX Runtime and `to_fast`, and the CNN with half of
its channels cut.
"""

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fast import compare, with_onnx
from models import MODELS
from timing import parser, save
from torch import Tensor, nn

from lightning_prune import Channel, SharedFanIn, export_onnx, prune, shrink
from lightning_prune.export.fast import fastest


def with_openvino(model: nn.Module, inputs: Tensor, folder: str) -> Callable[[], Any]:
    """Return a function that runs a model with OpenVINO, on one thread and in float32."""
    import openvino

    file = Path(folder) / f"{id(model)}.onnx"
    export_onnx(model, inputs, file, batch_axis=None)
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(file, "CPU", options).create_infer_request()
    feed = {0: inputs.numpy()}
    return lambda: request.infer(feed, share_inputs=True)


def variants(dense: nn.Module, inputs: Tensor, convolutional: bool) -> dict[str, nn.Module]:
    """Return the model dense, with zeros of two shapes and, if it is convolutional, with channels cut."""
    found = {"dense": dense, "90 % zeros": copy.deepcopy(dense), "90 % zeros by SharedFanIn(16)": copy.deepcopy(dense)}
    prune(found["90 % zeros"], 0.9, scope="local")
    prune(found["90 % zeros by SharedFanIn(16)"], 0.9, granularity=SharedFanIn(16), scope="local")
    if convolutional:
        cut = copy.deepcopy(dense)
        prune(cut, 0.5, granularity=Channel(round_to=8), example_inputs=inputs, scope="local")
        found["half of the channels cut"] = shrink(cut, inputs)
    return found


def measure(kind: str, batch: int, rounds: int) -> dict[str, Any]:
    """Return the milliseconds of every form of a model."""
    torch.manual_seed(0)
    dense = MODELS[kind].model().eval()
    inputs = torch.randn(batch, 784) if kind == "mlp" else torch.randn(batch, 3, 64, 64)
    models = variants(dense, inputs, kind == "cnn")
    fast, _ = fastest(models["90 % zeros by SharedFanIn(16)"], inputs)
    with tempfile.TemporaryDirectory() as folder:
        calls = {f"OpenVINO, {name}": with_openvino(model, inputs, folder) for name, model in models.items()}
        calls["torch, dense"] = partial(dense, inputs)
        calls["ONNX Runtime, dense"] = with_onnx(dense, inputs, folder)
        calls["torch, 90 % zeros by SharedFanIn(16), to_fast"] = partial(fast, inputs)
        return {"model": kind, "batch": batch, "ms": compare(calls, rounds)}


def main() -> None:
    """Measure, print a table, and store the results."""
    options = parser(__doc__.splitlines()[0]).parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = []
    for kind, batch in (("mlp", 1), ("mlp", 32), ("cnn", 1), ("cnn", 32)):
        rows.append(measure(kind, batch, options.rounds or (25 if options.full else 9)))
        print(f"{kind}, batch of {batch}")
        for name, ms in rows[-1]["ms"].items():
            print(f"  {name:48}{ms:>9.3f} ms", flush=True)
    save("openvino_zeros", options.full, rows)


if __name__ == "__main__":
    main()
