"""Does the block Fisher gain anything? `python examples/benchmarks/second_order.py [--seeds 5] [--jobs 2]`.

The saliency of oBERT and WoodFisher, `w**2 / (2 [F^-1]_qq)`, with the empirical Fisher of blocks of 32 weights that
follow each other, beside magnitude and the diagonal Fisher: in gradual pruning from scratch, and one-shot from a
converged network, without training and after 100 steps, with and without the update of the weights that stay. Runs of
a seed share initialisation and batches. Finished runs are not repeated: delete results/second_order.jsonl to rerun.
"""

import argparse
import copy
import itertools
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any, ClassVar, NamedTuple

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "evidence"))
from marked import replace, spread, table
from runs import Runs
from tasks import QUIET, TASKS, Classifier, Task, mnist, small_cnn

from lightning_prune import ConstantSparsity, Criterion, Fisher, Magnitude, Pruning, Units, prune

Way = Callable[..., Iterator[dict[str, Any]]]

RESULTS = Path(__file__).parent / "results" / "second_order.jsonl"
PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"
BLOCK = 32
IN_TRAINING, AT_END = 1e-5, 1e-7  # damping: the best of five in gradual pruning, and that of oBERT
CRITERIA = ("magnitude", "Fisher", "block Fisher")
LEVELS = {"gradual": (0.9, 0.95, 0.98, 0.99, 0.995), "transfer": (0.97,)}
AT_ONCE = {"mnist": (0.8, 0.9, 0.95, 0.98), "cnn": (0.7, 0.9)}
TITLES = {"gradual": "from scratch", "transfer": "from other digits", "mnist": "LeNet", "cnn": "CNN"}
BATCHES, SMALL = 36, 16  # one-shot pruning observes so many batches, in parts of so many images
STEPS = {"mnist": 100}  # of fine-tuning
OF_MAGNITUDE = ("magnitude, updated", "magnitude, recalibrated", "magnitude, reconstructed")
WAYS = (*CRITERIA, "block Fisher, updated", "block Fisher, recalibrated", *OF_MAGNITUDE)


@dataclass(frozen=True)
class BlockFisher(Criterion):
    """The loss of removing a weight while the others of its block adapt: ``w**2 / (2 [F^-1]_qq)``.

    It holds 32 floats for each weight. The inverse of the sum over the window is that of the Woodbury recursion.
    """

    needs: ClassVar[str] = "gradients"
    elementwise: ClassVar[bool] = True
    window: int = 16

    def observe(self, units: Units, inputs: tuple[Any, ...] = (), output: Any = None) -> Tensor:
        weight = units.weight()
        assert weight.grad is not None
        return add_gradient(units.statistic, weight.grad * (weight != 0))

    def finalize(self, units: Units, over_ranks: Any) -> Tensor:
        assert units.statistic is not None
        return inverse_diagonal(units.statistic / units.steps, units.parameter, IN_TRAINING)

    def scores(self, units: Units) -> Tensor:
        return units.sum(lambda weight: weight.square() / (2 * units.statistic))


@dataclass(frozen=True)
class Known(Criterion):
    """Scores that are there already, by the name of the parameter."""

    table: dict[str, Tensor] = field(default_factory=dict)

    def scores(self, units: Units) -> Tensor:
        return self.table[units.name]


def blocks(values: Tensor) -> Tensor:
    """Return values in rows of a block; the last one is filled up with zeros."""
    flat = values.reshape(-1)
    return nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


def add_gradient(fisher: Tensor | None, gradient: Tensor) -> Tensor:
    """Add the products of the gradients inside each block, in place."""
    rows = blocks(gradient)
    fisher = rows.new_zeros(len(rows), BLOCK, BLOCK) if fisher is None else fisher
    return fisher.baddbmm_(rows[:, :, None], rows[:, None])


def damped(fisher: Tensor, damping: float) -> Tensor:
    """Return the Fisher with damping, in double precision."""
    return fisher.double() + damping * torch.eye(BLOCK, dtype=torch.float64)


def inverse_diagonal(fisher: Tensor, like: Tensor, damping: float) -> Tensor:
    """Return the diagonal of the inverse, in the shape of the weight."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(fisher, damping)))
    return inverse.diagonal(dim1=1, dim2=2).flatten()[: like.numel()].view(like.shape).float()


def updated(weight: Tensor, mask: Tensor, fisher: Tensor, damping: float) -> Tensor:
    """Return what is kept of a weight, changed so that the loss rises least to second order: the OBS update."""
    kept, old, fisher = blocks(mask.double()), blocks(weight.double()), damped(fisher, damping)
    among = fisher * kept[:, :, None] * kept[:, None] + torch.diag_embed(1 - kept)
    pull = kept * (fisher @ ((1 - kept) * old)[..., None])[..., 0]
    new = kept * (old + torch.linalg.solve(among, pull[..., None])[..., 0])
    return new.flatten()[: weight.numel()].view(weight.shape).float()


def accuracy(model: LightningModule, data: LightningDataModule) -> float:
    return round(100 * Trainer(**QUIET).validate(model, datamodule=data, verbose=False)[0]["val_acc"], 2)


def train(model: LightningModule, data: LightningDataModule, seed: int, *callbacks: Callback, **length: Any) -> None:
    seed_everything(seed, verbose=False)
    Trainer(limit_val_batches=0, callbacks=list(callbacks), **length, **QUIET).fit(model, datamodule=data)


def gradual(task: str, way: str, level: float, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the accuracy of gradual pruning, from scratch or from other digits."""
    be_quiet()
    own = TASKS["mnist" if task == "gradual" else task]
    criterion = {"magnitude": Magnitude(), "Fisher": Fisher(), "block Fisher": BlockFisher()}[way]
    model, data = own.model(seed), own.data(seed)
    train(model, data, seed, Pruning(level, criterion), max_epochs=own.epochs)
    yield {"task": task, "way": way, "level": level, "seed": seed, "tuned": accuracy(model, data)}


def digits_cnn() -> nn.Module:
    """Return the CNN of the evidence, for images in rows of 784 numbers."""
    return nn.Sequential(nn.Unflatten(1, (1, 28, 28)), small_cnn())


ONE_SHOT = {"mnist": TASKS["mnist"], "cnn": Task("MNIST-5k, CNN of 70 k weights, 5 epochs", mnist, digits_cnn, 5)}


class Converged(NamedTuple):
    """A converged network with its data, the batches and the Fisher that one-shot pruning may use, and scores."""

    model: LightningModule
    data: LightningDataModule
    batches: list[tuple[Tensor, Tensor]]
    fisher: dict[str, Tensor]
    scores: dict[str, Known]


@cache
def converged(name: str, seed: int) -> Converged:
    """Return a network trained as the task says; copy it before use, since it is cached."""
    task = ONE_SHOT[name]
    model, data = task.model(seed), task.data(seed)
    train(model, data, seed, max_epochs=task.epochs)
    batches = list(itertools.islice(data.train_dataloader(), BATCHES))
    weights = {name: weight for name, weight in model.named_parameters() if weight.ndim > 1}
    fisher = observe(model.eval(), weights, batches)
    scores = {
        criterion: Known({name: saliency(criterion, old.detach(), fisher[name]) for name, old in weights.items()})
        for criterion in CRITERIA
    }
    return Converged(Classifier(model.network, task.optimizer, task.rate), data, batches, fisher, scores)


def at_once(task: str, way: str, level: float, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the accuracies of one-shot pruning of a converged network, before and after fine-tuning."""
    be_quiet()
    dense, data, batches, fisher, scores = converged(task, seed)
    model = copy.deepcopy(dense)
    row = {"task": task, "way": way, "level": level, "seed": seed}
    if way == "dense":
        yield {**row, "pruned": accuracy(model, data)}
        return
    criterion, _, recovery = way.partition(", ")
    masks = prune(model, level, criterion=scores[criterion], **recover(recovery, [images for images, _ in batches]))
    if recovery == "updated":
        for name, mask in masks.items():
            weight = model.get_parameter(name).data
            weight.copy_(updated(dense.get_parameter(name).detach(), mask, fisher[name], AT_END))
    row["pruned"] = accuracy(model, data)
    if task in STEPS:
        train(model, data, seed, ConstantSparsity(), max_steps=STEPS[task])
        row["tuned"] = accuracy(model, data)
    yield row


def recover(recovery: str, images: list[Tensor]) -> dict[str, Any]:
    """Return the arguments of ``prune`` for what the package has to recover without training."""
    given = {"recalibrated": {"recalibrate": len(images)}, "reconstructed": {"reconstruct": True}}.get(recovery)
    return {"data": images, **given} if given else {}


def observe(
    model: LightningModule, weights: dict[str, nn.Parameter], batches: list[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Return the mean over small batches of the empirical Fisher of each weight, in blocks."""
    fisher: dict[str, Tensor] = {}
    small = [part for images, labels in batches for part in zip(images.split(SMALL), labels.split(SMALL), strict=True)]
    for images, labels in small:
        found = torch.autograd.grad(nn.functional.cross_entropy(model(images), labels), list(weights.values()))
        for name, gradient in zip(weights, found, strict=True):
            fisher[name] = add_gradient(fisher.get(name), gradient)
    return {name: total / len(small) for name, total in fisher.items()}


def saliency(criterion: str, weight: Tensor, fisher: Tensor) -> Tensor:
    """Return the score of every weight, up to a factor that all share."""
    if criterion == "magnitude":
        return weight.square()
    if criterion == "block Fisher":
        return weight.square() / inverse_diagonal(fisher, weight, AT_END)
    return weight.square() * fisher.diagonal(dim1=1, dim2=2).flatten()[: weight.numel()].view(weight.shape)


def be_quiet() -> None:
    """Use one core, and say nothing."""
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")


def fill(runs: Runs, run: Way, wanted: Iterable[tuple[str, str, float, int]], jobs: int) -> None:
    """Run what is missing of these tasks, ways, levels and seeds, in parallel processes."""
    missing = [one for one in wanted if not runs.have(task=one[0], way=one[1], level=one[2], seed=one[3])]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_listed, run, *given) for given in missing]):
            for row in done.result():
                runs.add(**row)
                print(row, flush=True)


def _listed(run: Way, *given: Any) -> list[dict[str, Any]]:
    return list(run(*given))  # generators cannot be sent between processes


def signed(gains: Sequence[float]) -> str:
    """Return mean and standard deviation of differences as a cell of a table."""
    return f"{mean(gains):+.1f} ± {stdev(gains):.1f}"


def of_gradual(runs: Runs) -> str:
    """Return the accuracies of gradual pruning by criterion, and the differences to magnitude of the same seeds."""
    lines = []
    for task, levels in LEVELS.items():
        for level in levels:
            found = values_of(runs, "tuned", [(task, way, level) for way in CRITERIA])
            if len(found[0]) > 1:
                gains = [signed([a - b for a, b in zip(one, found[0], strict=True)]) for one in found[1:]]
                name = f"{TITLES[task]}, {level:.1%}"
                lines.append([name, str(len(found[0])), *map(spread, found), *gains])
    return table(["", "seeds", *CRITERIA, "Fisher, paired", "block Fisher, paired"], lines)


def of_at_once(runs: Runs) -> str:
    """Return the accuracies of one-shot pruning, right after it and fine-tuned, and the seeds."""
    cases = [
        (task, level, kind)
        for task, levels in AT_ONCE.items()
        for kind in ("pruned", "tuned")[: 1 + (task in STEPS)]
        for level in levels
    ]
    when = {"pruned": "", "tuned": ", tuned"}
    lines = []
    for way in WAYS:
        found = [values_of(runs, kind, [(task, way, level)])[0] for task, level, kind in cases]
        lines.append([way, *(spread(values) if len(values) > 1 else "" for values in found)])
    return table(["", *(f"{TITLES[task]} {level:.0%}{when[kind]}" for task, level, kind in cases)], lines)


def values_of(runs: Runs, kind: str, columns: Sequence[tuple[str, str, float]]) -> list[list[float]]:
    """Return a list of accuracies for each task, way and level, those of the seeds that all have."""
    found = [
        {row["seed"]: row[kind] for row in runs.have(task=task, way=way, level=level)} for task, way, level in columns
    ]
    seeds = sorted(set.intersection(*(set(rows) for rows in found)))
    return [[rows[seed] for seed in seeds] for rows in found]


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description="Compare second-order scores with magnitude.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tables", action="store_true", help="run nothing, only write the tables")
    args = parser.parse_args()
    be_quiet()
    runs = Runs(RESULTS)
    if not args.tables:
        grid = [(task, way, level) for task, levels in LEVELS.items() for level in levels for way in CRITERIA]
        fill(runs, gradual, [(*one, seed) for seed in range(args.seeds) for one in grid], args.jobs)
        grid = [(task, way, level) for task, levels in AT_ONCE.items() for level in levels for way in WAYS]
        grid = [one for one in grid if one[0] == "cnn" or "recalibrated" not in one[1]]  # LeNet has no norms
        fill(runs, at_once, [(*one, seed) for seed in range(args.seeds) for one in grid], args.jobs)
    replace(PAGE, "second-order", of_gradual(runs))
    replace(PAGE, "one-shot-second-order", of_at_once(runs))


if __name__ == "__main__":
    main()
