"""From a trained network to a smaller and faster ONNX file: `python examples/shrink.py`."""

import logging
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from statistics import median

import onnxruntime
import torch
from lightning import LightningModule, Trainer, seed_everything
from mnist5k import MNIST5k
from torch import Tensor, nn

from lightning_prune import Channel, Pruning, export_onnx, save_compressed, shrink

logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of missing packages that are not needed
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "limit_val_batches": 0,
}


def layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Return a convolution with its norm and activation."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class Net(LightningModule):
    """Four convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(2, 784)
        self.layers = nn.Sequential(layer(1, 16, 1), layer(16, 32, 2), layer(32, 32, 1), layer(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images.view(-1, 1, 28, 28)).mean((2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 3e-3)


class Runtime:
    """A model in ONNX Runtime, on one core."""

    def __init__(self, model: LightningModule, path: Path) -> None:
        export_onnx(model, None, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.size = path.stat().st_size

    def __call__(self, images: Tensor) -> Tensor:
        (name,) = (entry.name for entry in self.session.get_inputs())
        return torch.from_numpy(self.session.run(None, {name: images.numpy()})[0])


def milliseconds(runtimes: list[Runtime], images: Tensor, rounds: int = 50) -> list[float]:
    """Return the median CPU time of each; the runtimes alternate."""
    seconds: list[list[float]] = [[] for _ in runtimes]
    for _ in range(rounds):
        for runtime, each in zip(runtimes, seconds, strict=True):
            began = time.process_time()
            runtime(images)
            each.append(time.process_time() - began)
    return [1000 * median(each) for each in seconds]


def main() -> None:
    """Train, prune half of the channels of each layer during further training, shrink, export, compare."""
    seed_everything(0, verbose=False)
    data, model = MNIST5k(), Net()
    Trainer(max_epochs=3, **QUIET).fit(model, datamodule=data)
    dense = deepcopy(model)

    pruning = Pruning(0.5, granularity=Channel(), scope="local", start=0, end=0.5, ignore=["head.*"])
    Trainer(max_epochs=4, callbacks=[pruning], **QUIET).fit(model, datamodule=data)
    small = shrink(model)

    with tempfile.TemporaryDirectory() as folder:
        runtimes = [Runtime(dense, Path(folder) / "dense.onnx"), Runtime(small, Path(folder) / "small.onnx")]
        save_compressed(model, Path(folder) / "masked.safetensors")
        compressed = (Path(folder) / "masked.safetensors").stat().st_size
    images, labels = data.test.tensors
    accuracies = [(runtime(images).argmax(1) == labels).float().mean().item() for runtime in runtimes]
    parameters = [sum(parameter.numel() for parameter in each.parameters()) for each in (dense, small)]
    print(f"{'in ONNX Runtime, on one core':<30}{'dense':>10}{'shrunk':>10}")
    print(f"{'accuracy on held-out digits':<30}{accuracies[0]:>10.1%}{accuracies[1]:>10.1%}")
    print(f"{'parameters':<30}{parameters[0]:>10,}{parameters[1]:>10,}")
    print(f"{'file, bytes':<30}{runtimes[0].size:>10,}{runtimes[1].size:>10,}")
    for batch in (1, 32):
        times = milliseconds(runtimes, images[:batch])
        print(f"{f'batch of {batch}, CPU milliseconds':<30}{times[0]:>10.3f}{times[1]:>10.3f}")
    print(f"The masked model takes {compressed:,} bytes as a compressed file, and outputs the same as the shrunk one.")
    torch.testing.assert_close(runtimes[1](images), model.eval()(images).detach(), rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    main()
