"""Prune, quantize, or both: `python examples/quantization.py` compares accuracy, file size and latency.

LeNet-300-100 on 5,000 real digits. "int8" is torchao's dynamic quantization: weights and activations in 8 bits.
Without `torch.compile`, as here, it saves space but no time on a CPU.
"""

import copy
import gzip
import io
import logging
import statistics
import time
from typing import Any

import torch
from lightning import Trainer, seed_everything
from mnist5k import LeNet, MNIST5k

from lightning_prune import MagnitudePruning, sparsity

PLAIN: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def quantized(model: LeNet) -> LeNet:
    """Return a copy with 8-bit weights and activations in every linear layer."""
    logging.getLogger("torchao").setLevel(logging.CRITICAL)  # it complains about missing GPU kernels
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(model).eval()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def file_sizes(model: LeNet) -> tuple[float, float]:
    """Return the size of the saved weights in kB, plain and gzipped."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return len(file.getvalue()) / 1000, len(gzip.compress(file.getvalue())) / 1000


@torch.inference_mode()
def latencies(models: dict[str, LeNet], images: torch.Tensor, rounds: int = 50) -> dict[str, float]:
    """Return the median time of a forward pass in ms; the models alternate."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            began = time.perf_counter()
            model(images)
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    """Train, prune, quantize, and print a row for each of the four models."""
    seed_everything(0, verbose=False)
    dense, data = LeNet(), MNIST5k()
    Trainer(max_epochs=10, limit_val_batches=0, **PLAIN).fit(dense, datamodule=data)
    pruned = copy.deepcopy(dense)
    callback = MagnitudePruning(0.9, start=0)
    Trainer(max_epochs=10, limit_val_batches=0, callbacks=[callback], **PLAIN).fit(pruned, datamodule=data)

    models = {"dense": dense, "pruned": pruned, "int8": quantized(dense), "pruned, int8": quantized(pruned)}
    assert round(sparsity(pruned), 4) == 0.9
    for name, mask in callback.masks.items():  # zeros stay zero in 8 bits
        assert not models["pruned, int8"].get_parameter(name).dequantize()[~mask].any()

    times = latencies({name: model.eval() for name, model in models.items()}, data.test.tensors[0])
    print(f"{'model':14}{'accuracy':>10}{'zeros':>10}{'file':>10}{'gzip':>10}{'1,000 images':>14}")
    for name, model in models.items():
        accuracy = Trainer(**PLAIN).validate(model, datamodule=data, verbose=False)[0]["val_acc"]
        plain, packed = file_sizes(model)
        sizes = f"{plain:>7.0f} kB{packed:>7.0f} kB"
        print(f"{name:14}{accuracy:>10.1%}{sparsity(model):>10.2%}{sizes}{times[name]:>11.2f} ms")


if __name__ == "__main__":
    main()
