"""Do learned L0 gates beat gradual pruning? `python examples/benchmarks/hard_concrete.py [--tune]`.

Hard-concrete gates (Louizos et al., 2018, arXiv:1712.01312) on every weight, or on every hidden neuron, of the
LeNet-300-100 of the evidence, in the same 20 epochs. The gates are trained for 70 % of the run, which is when gradual
pruning ends; then the weights are multiplied by them, exactly as many units as asked for stay, those of the most open
gates, and the rest of the run fine-tunes them. The strengths of the penalty are interpolated on seed 0 (`--tune`), so
that about so many gates are closed by then. Finished runs are not repeated: delete their lines in
results/second_order.jsonl to start over.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import seed_everything
from torch import Tensor, nn
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "evidence"))
from marked import replace, spread, table
from methods import METHODS
from runs import Runs
from second_order import PAGE, RESULTS, accuracy, be_quiet, fill, gradual, signed, train
from tasks import SGD, TASKS, Classifier, cosine, lenet

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1  # of the paper
OPEN, RATE = 2.0, 0.05  # where gates start, and the learning rate of Adam for them
END = 0.7  # the part of the run in which they are trained
STRENGTHS = {  # of the penalty, by unit and sparsity: those with which so many gates are closed on seed 0
    "weights": {0.9: 11.0, 0.95: 21.6, 0.98: 45.5, 0.99: 80.0, 0.995: 140.0},
    "neurons": {0.5: 0.8, 0.75: 2.2, 0.9: 7.5},
}
LEVELS = [(units, level) for units, levels in STRENGTHS.items() for level in levels]
BESIDE = {"weights": ("gradual", "magnitude"), "neurons": ("neurons", "L2")}  # task and way to compare with


def sample(log_alpha: Tensor) -> Tensor:
    """Return gates drawn from the hard-concrete distribution, in [0, 1]."""
    noise = torch.rand_like(log_alpha).clamp(1e-6, 1 - 1e-6).logit()
    return (((noise + log_alpha) / TEMPERATURE).sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


def settled(log_alpha: Tensor) -> Tensor:
    """Return the gates without noise, as they are used after training."""
    return (log_alpha.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


def chance(log_alpha: Tensor) -> Tensor:
    """Return the probability of each gate to be open: the expected L0 norm is their sum."""
    return (log_alpha - TEMPERATURE * torch.tensor(-LOW / HIGH).log()).sigmoid()


class Gated(Classifier):
    """LeNet-300-100 under hard-concrete gates, which become masks after a part of the run.

    Args:
        units: "weights" or "neurons".
        sparsity: The fraction of units that is zero in the end.
        strength: Factor of the expected fraction of open gates in the loss.
    """

    def __init__(self, units: str, sparsity: float, strength: float) -> None:
        super().__init__(lenet(), SGD, cosine)
        self.automatic_optimization = False
        self.sparsity, self.strength = sparsity, strength
        weights = {name: weight for name, weight in self.network.named_parameters() if weight.ndim > 1}
        if units == "neurons":
            weights = {name: weight[:, :1] for name, weight in weights.items() if "head" not in name}
        self.log_alpha = {name: torch.full_like(weight, OPEN, requires_grad=True) for name, weight in weights.items()}
        self.masks: dict[str, Tensor] = {}
        self.open = 1.0

    def gated(self, gates: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights times their gates; the bias of a neuron goes with it."""
        found = dict(self.network.named_parameters())
        for name, gate in gates.items():
            found[name] = found[name] * gate
            bias = name.replace("weight", "bias")
            found[bias] = found[bias] * gate.view(-1) if gate.shape[1] == 1 else found[bias]
        return found

    def configure_optimizers(self) -> Any:
        self.of_gates = torch.optim.Adam(self.log_alpha.values(), lr=RATE)
        return super().configure_optimizers()

    def training_step(self, batch: tuple[Tensor, Tensor]) -> None:
        if not self.masks and self.global_step >= END * self.trainer.estimated_stepping_batches:
            self.close()
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.of_gates.zero_grad()
        gates = self.masks or {name: sample(alpha) for name, alpha in self.log_alpha.items()}
        loss = nn.functional.cross_entropy(functional_call(self.network, self.gated(gates), (batch[0],)), batch[1])
        if not self.masks:
            loss = loss + self.strength * torch.cat([chance(a).flatten() for a in self.log_alpha.values()]).mean()
        self.manual_backward(loss)
        optimizer.step()
        if not self.masks:
            self.of_gates.step()
        self.lr_schedulers().step()

    @torch.no_grad()
    def close(self) -> None:
        """Multiply the weights by their gates, and keep exactly as many units as asked for."""
        gates = {name: settled(alpha) for name, alpha in self.log_alpha.items()}
        self.open = float(torch.cat([gate.flatten() for gate in gates.values()]).count_nonzero())
        order = torch.cat([alpha.flatten() for alpha in self.log_alpha.values()])
        self.open /= len(order)
        keep = torch.zeros_like(order, dtype=torch.bool)
        keep[order.topk(round((1 - self.sparsity) * len(order))).indices] = True
        parts = keep.split([alpha.numel() for alpha in self.log_alpha.values()])
        self.masks = {n: part.view_as(a).float() for (n, a), part in zip(self.log_alpha.items(), parts, strict=True)}
        for name, value in self.gated({name: gate * self.masks[name] for name, gate in gates.items()}).items():
            self.network.get_parameter(name).copy_(value)

    @torch.no_grad()
    def on_train_end(self) -> None:
        for name, value in self.gated(self.masks).items():
            self.network.get_parameter(name).copy_(value)


def gated(units: str, sparsity: float, seed: int, strength: float) -> dict[str, Any]:
    """Train with gates; return the accuracy, and how many gates were open before the count was made exact."""
    seed_everything(seed, verbose=False)
    model, data = Gated(units, sparsity, strength), TASKS["mnist"].data(seed)
    train(model, data, seed, max_epochs=TASKS["mnist"].epochs)
    return {"tuned": accuracy(model, data), "open": round(model.open, 4)}


def run(task: str, way: str, sparsity: float, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the finished run of one way to prune."""
    be_quiet()
    row = {"task": task, "way": way, "level": sparsity, "seed": seed}
    if way == "L0":
        yield {**row, **gated(task, sparsity, seed, STRENGTHS[task][sparsity])}
    elif task == "gradual":
        yield from gradual(task, way, sparsity, seed)
    else:
        model, data, callback = TASKS["mnist"].model(seed), TASKS["mnist"].data(seed), METHODS["neurons, L2"]
        train(model, data, seed, callback(sparsity, seed), max_epochs=TASKS["mnist"].epochs)
        yield {**row, "tuned": accuracy(model, data)}


def tune(units: str) -> None:
    """Print the fraction of open gates for some strengths of the penalty, to interpolate between."""
    for strength in (1, 3, 8, 20, 50, 120):
        found = gated(units, 0.9, 0, strength)
        print(f"{units}, {strength}: {found['open']:.1%} open", flush=True)


def make_table(runs: Runs) -> str:
    """Return the accuracies of L0 and of the method beside it, and their paired difference."""
    lines = []
    for units, level in LEVELS:
        task, way = BESIDE[units]
        gates = {row["seed"]: row for row in runs.have(task=units, way="L0", level=level)}
        beside = {row["seed"]: row for row in runs.have(task=task, way=way, level=level)}
        seeds = sorted(gates.keys() & beside.keys())
        if len(seeds) > 1:
            one, other = ([rows[seed]["tuned"] for seed in seeds] for rows in (gates, beside))
            gains = [a - b for a, b in zip(one, other, strict=True)]
            closed = [100 - 100 * gates[seed]["open"] for seed in seeds]
            name = f"{level:.1%} of {units}"
            lines.append([name, str(len(seeds)), spread(other), spread(one), signed(gains), spread(closed)])
    return table(["", "seeds", "magnitude", "L0", "paired", "gates closed before the exact count, %"], lines)


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description="Compare hard-concrete gates with pruning.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tune", action="store_true", help="only print how many gates each strength leaves open")
    parser.add_argument("--tables", action="store_true", help="run nothing, only write the table")
    args = parser.parse_args()
    be_quiet()
    if args.tune:
        for units in STRENGTHS:
            tune(units)
        return
    runs = Runs(RESULTS)
    if not args.tables:
        ways = [(*way, level) for units, level in LEVELS for way in ((units, "L0"), BESIDE[units])]
        fill(runs, run, [(*way, seed) for seed in range(args.seeds) for way in ways], args.jobs)
    replace(PAGE, "hard-concrete", make_table(runs))


if __name__ == "__main__":
    main()
