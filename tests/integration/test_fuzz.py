"""Random small runs keep all promises together. One that does not is shrunk to a short ``Case``, to be run alone:

    check(Case(layers=(Layer(3, norm="batch"),), granularity=Channel(), resume=("step", 1)))

``FUZZ=5000 pytest tests/test_fuzz.py -s`` tries that many, and others each time.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import pytest
import torch
from distributed import fit, rank, ranks
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from models import MaskRecorder
from modes import Regression, StatefulLoader, leftovers
from ranks import run
from torch import Tensor, nn
from variants import CRITERIA, SCHEDULES, SCOPES, at_least, label

from lightning_prune import (
    Channel,
    Criterion,
    Entropy,
    Granularity,
    Magnitude,
    Pruning,
    Random,
    Sensitivity,
    Weight,
    schedules,
)

EXAMPLES = int(os.environ.get("FUZZ", "0"))
pytestmark = [
    # resumed runs save nothing, so the callbacks that saved are not among theirs
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    # a failing example is shrunk before it is shown
    pytest.mark.timeout(0 if EXAMPLES else 600),
]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1),
}
SCOPE_NAMES = {label(scope): scope for scope in SCOPES if not isinstance(scope, dict)}
SCHEDULE_NAMES = {label(schedule): schedule for schedule in SCHEDULES}
SIZES = {"linear": (5,), "conv1d": (2, 4), "conv2d": (2, 3, 3)}


# ------------------------------------------------------------------------------------------------ a case


class _Short:
    """Shows what differs from the defaults only."""

    def __repr__(self) -> str:
        values = [(field.name, getattr(self, field.name), field.default) for field in fields(self)]
        changed = [f"{name}={value!r}" for name, value, default in values if value != default]
        return f"{type(self).__name__}({', '.join(changed)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # what hypothesis prints otherwise is long


@dataclass(frozen=True, repr=False)
class Layer(_Short):
    """A layer with what follows it.

    Attributes:
        width: Output channels.
        norm: "layer" is over all dimensions but the batch, so its weight has as many as a convolution has spatial ones.
        bias: Whether the layer has one.
        frozen: What is not trained: the weight, everything but the weight, or both.
    """

    width: int = 2
    norm: Literal["none", "batch", "layer", "group"] = "none"
    bias: bool = True
    frozen: Literal["nothing", "weight", "rest", "all"] = "nothing"


@dataclass(frozen=True, repr=False)
class Case(_Short):
    """One run: a model, the arguments of ``Pruning``, a way to train, and where it is interrupted.

    Attributes:
        layers: In front of a linear one with two outputs, which is always there.
        tied: Whether two more, like the last of the layers, share one square weight.
        resume: After which ("step", n), ("epoch", n), or ("early", n), by a callback that comes before the pruning.
    """

    kind: Literal["linear", "conv1d", "conv2d"] = "linear"
    layers: tuple[Layer, ...] = (Layer(),)
    tied: bool = False
    sparsity: float | dict[str, float] | None = 0.5
    threshold: float | None = None
    criterion: Criterion = Magnitude()
    granularity: Granularity = Weight()
    scope: str = "global"
    schedule: str = "linear"
    start: int | float = 0
    end: int | float = 6
    interval: Literal["step", "epoch"] = "step"
    frequency: int | None = None
    ignore: tuple[str, ...] = ()
    optimizer: str = "sgd"
    accumulate: int = 1
    clip: tuple[str, float] | None = None
    epochs: int = 2
    batches: int = 3
    resume: tuple[Literal["step", "epoch", "early"], int] | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps an epoch."""
        return math.ceil(self.batches / self.accumulate)

    def pruning(self, criterion: Criterion) -> Pruning:
        return Pruning(
            self.sparsity,
            criterion,
            self.granularity,
            SCOPE_NAMES[self.scope],
            SCHEDULE_NAMES[self.schedule],
            self.start,
            self.end,
            self.interval,
            self.frequency,
            targets=("*",),  # neurons that are outputs, too
            ignore=self.ignore,
            threshold=self.threshold,
            min_density=0.0,
        )

    def train(self, model: nn.Module, *callbacks: Callback, ckpt_path: Path | None = None) -> Trainer:
        by, value = self.clip or (None, None)
        return fit(
            model,
            *callbacks,
            ckpt_path=ckpt_path,
            max_epochs=self.epochs,
            accumulate_grad_batches=self.accumulate,
            gradient_clip_val=value,
            gradient_clip_algorithm=by,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        )


class Prunable(NamedTuple):
    """A trainable weight: all its names, and what dies with its channels."""

    names: tuple[str, ...]
    followers: tuple[str, ...]


class Loader(StatefulLoader):
    """Every rank takes its own part of each batch."""

    def __iter__(self) -> Iterator[list[Tensor]]:
        for batch in super().__iter__():
            yield [tensor[rank() :: ranks()] for tensor in batch]


class Model(Regression):
    """The model of a case, and, under the first name of each weight that can be pruned, what belongs to it."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        super().__init__(None, SIZES[case.kind], OPTIMIZERS[case.optimizer])
        self.layout = "ddp" if ranks() > 1 else "one"
        self.batches = case.batches
        self.prunable: dict[str, Prunable] = {}
        self._modules_so_far: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            width, *spatial = self.size
            for layer in case.layers:
                self._add(layer, width, spatial)
                width = layer.width
            if case.tied:
                twin = self._add(case.layers[-1], width, spatial)
                self._add(case.layers[-1], width, spatial, twin)
            self._modules_so_far.append(nn.Flatten())
            self._remember(nn.Linear(width * math.prod(spatial), 2), None, True)
            self.net = nn.Sequential(*self._modules_so_far)
        del self._modules_so_far

    def _add(self, layer: Layer, width: int, spatial: list[int], twin: nn.Module | None = None) -> nn.Module:
        make = [nn.Linear, partial(nn.Conv1d, kernel_size=3, padding=1), partial(nn.Conv2d, kernel_size=3, padding=1)]
        module = make[len(spatial)](width, layer.width, bias=layer.bias)
        if twin is not None:
            module.weight = twin.weight
        batch = [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d][len(spatial)]
        norm = {
            "none": lambda: None,
            "batch": lambda: batch(layer.width),
            "layer": lambda: nn.LayerNorm([layer.width, *spatial]),
            "group": lambda: nn.GroupNorm(1, layer.width),
        }[layer.norm]()
        for parameter in norm.parameters() if norm is not None else ():
            nn.init.normal_(parameter, 1.0, 0.1)  # no zeros to begin with
        module.weight.requires_grad_(layer.frozen not in ("weight", "all"))
        for parameter in (module.bias, *(norm.parameters() if norm is not None else ())):
            if parameter is not None:
                parameter.requires_grad_(layer.frozen not in ("rest", "all"))
        self._remember(module, norm, follows=layer.norm != "layer" or not spatial)
        self._modules_so_far.append(nn.ReLU())
        return module

    def _remember(self, module: nn.Module, norm: nn.Module | None, follows: bool) -> None:
        name = f"net.{len(self._modules_so_far)}"
        behind = f"net.{len(self._modules_so_far) + 1}"
        self._modules_so_far += [module] if norm is None else [module, norm]
        followers = [(f"{name}.bias", module.bias)]
        if norm is not None and follows:
            followers += [(f"{behind}.weight", norm.weight), (f"{behind}.bias", norm.bias)]
        found = tuple(name for name, parameter in followers if parameter is not None and parameter.requires_grad)
        if not module.weight.requires_grad:
            return
        first = next((n for n, _ in self.prunable.items() if self._weight(n) is module.weight), f"{name}.weight")
        before = self.prunable.get(first, Prunable((), ()))
        self.prunable[first] = Prunable((*before.names, f"{name}.weight"), (*before.followers, *found))

    def _weight(self, name: str) -> nn.Parameter:
        return self._modules_so_far[int(name.split(".")[1])].weight

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.smooth_l1_loss(self(batch[0]), batch[1].expand(-1, 2))  # its gradients are bounded

    def train_dataloader(self) -> Loader:
        return Loader(self.size, self.batches)


def decided(patterns: Mapping[str, float], names: tuple[str, ...]) -> float | None:
    """The fraction that the first matching pattern gives."""
    return next((f for pattern, f in patterns.items() if any(fnmatchcase(name, pattern) for name in names)), None)


def targets(case: Case, model: Model) -> dict[str, Prunable]:
    """The weights that the case prunes."""
    found = {name: p for name, p in model.prunable.items() if not set(p.names).intersection(case.ignore)}
    if isinstance(case.sparsity, dict):
        found = {name: p for name, p in found.items() if decided(case.sparsity, p.names) is not None}
    return found


# ------------------------------------------------------------------------------------------------ strategies

# the first of a list is the simplest; what makes a case tell more stands there more than once
HUNDREDTHS = st.integers(0, 99).map(lambda percent: percent / 100)
LAYERS = st.builds(
    Layer,
    st.integers(2, 5),
    st.sampled_from(["none", "batch", "layer", "group"]),
    st.sampled_from([True, False]),
    st.sampled_from(["nothing", "nothing", "nothing", "nothing", "weight", "rest", "all"]),
)


def criteria(longest: int) -> st.SearchStrategy[Criterion]:
    """Criteria with windows of so many steps at most."""
    windows = st.integers(1, longest)
    entropy = {"prune": st.sampled_from(["high", "low"]), "bins": st.sampled_from([2, 8]), "window": windows}
    return st.one_of(
        st.sampled_from([criterion for criterion in CRITERIA if criterion.window <= longest]),
        st.builds(Magnitude),
        st.builds(Random, st.integers(0, 9)),
        st.builds(Sensitivity, windows),
        st.builds(Entropy, **entropy, positions=st.sampled_from([1, 16])),
    )


def highest(criterion: Criterion) -> float | None:
    """A level in the middle of what the criterion gives for such models; None if it depends too much on the model."""
    levels = {Magnitude: 0.5, Random: 1.0, Sensitivity: 1e-3, Entropy: math.log(getattr(criterion, "bins", 2))}
    return levels.get(type(criterion))


@st.composite
def models(draw: st.DrawFn) -> Case:
    layers = draw(st.lists(LAYERS, min_size=1, max_size=3))
    return Case(draw(st.sampled_from(list(SIZES))), tuple(layers), draw(st.booleans()))


@st.composite
def goals(draw: st.DrawFn, case: Case) -> Case:
    """Give the case targets, and a sparsity, sparsities per layer or a threshold."""
    names = [prunable.names[-1] for prunable in Model(case).prunable.values()]
    if len(names) > 1 and draw(st.integers(0, 3)) == 3:
        ignored = draw(st.sampled_from(names))
        names.remove(ignored)
        case = replace(case, ignore=(ignored,))
    level = highest(case.criterion)
    with_level = [] if level is None else ["threshold", "threshold"]
    goal = draw(st.sampled_from(["global", "erk", "per layer", *with_level, *SCOPE_NAMES]))
    if goal == "threshold":
        return replace(case, sparsity=None, threshold=level * draw(HUNDREDTHS))
    if goal != "per layer":
        return replace(case, sparsity=draw(HUNDREDTHS), scope=goal)
    patterns = [name for name in names[1:] if draw(st.booleans())]
    patterns.append(draw(st.sampled_from(["net.*", names[0]])))
    return replace(case, sparsity={pattern: draw(HUNDREDTHS) for pattern in patterns})


@st.composite
def windows(draw: st.DrawFn, case: Case) -> Case:
    """Give the case a schedule that its run is long enough for."""
    window = case.criterion.window
    steps = case.epochs * case.steps
    interval = draw(st.sampled_from(["step", "step", "epoch"]))
    room = steps - max(0, window - 1)  # an update a step before the last one lets it wait for its window
    length, latest = (steps, room) if interval == "step" else (case.epochs, min(case.epochs - 1, room // case.steps))
    end = latest - draw(st.sampled_from([0, 0, 0, draw(st.integers(0, latest))]))
    start = draw(st.sampled_from([0, 0, 0, draw(st.integers(0, end))]))
    ends = [at / length if draw(st.booleans()) else at for at in (start, end)]
    return replace(
        case,
        schedule=draw(st.sampled_from(["linear", *SCHEDULE_NAMES])),
        start=ends[0],
        end=ends[1],
        interval=interval,
        frequency=draw(st.sampled_from([None, None, 1, 2, 3])),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    case = replace(
        draw(models()),
        optimizer=draw(st.sampled_from(list(OPTIMIZERS))),
        accumulate=draw(st.sampled_from([1, 1, 1, 2, 3])),
        clip=draw(st.sampled_from([None, ("norm", 0.05), ("value", 0.005)])),
        epochs=draw(st.sampled_from([2, 3, 4, 3, 2, 1])),
        batches=draw(st.sampled_from([3, 4, 5, 6, 5, 4, 1])),
        granularity=draw(st.sampled_from([Weight(), Channel()])),
    )
    steps = case.epochs * case.steps
    case = _with_factors(replace(case, criterion=draw(criteria(min(3, steps)))))
    case = draw(windows(draw(goals(case))))
    points = [("step", n + 1) for n in range(steps)] + [("epoch", n) for n in range(case.epochs)]
    points += [("early", n + 1) for n in range(steps)]
    return replace(case, resume=draw(st.sampled_from([None, *points])))


def _with_factors(case: Case) -> Case:
    """Let batch norms train their factors where channels are scored by gradients, which they are refused without."""
    if case.granularity == Weight() or case.criterion.needs != "gradients":
        return case
    frozen = [layer.norm == "batch" and layer.frozen == "rest" for layer in case.layers]
    layers = [replace(one, frozen="nothing") if own else one for one, own in zip(case.layers, frozen, strict=True)]
    return replace(case, layers=tuple(layers))


def several(most: int) -> st.SearchStrategy[list[Case]]:
    """Up to so many cases. They are unique, since hypothesis tries each of these by itself, and no variations of it."""
    return st.lists(cases(), min_size=1, max_size=most, unique_by=repr)


# ------------------------------------------------------------------------------------------------ what is expected


def timeline(case: Case) -> list[float | None]:
    """The fraction of the goal that the masks show before each batch and at the end; None as long as there are none.

    An update happens at the first moment (the start of an epoch, or the end of a step) at which one is due and the
    window since the last one is full (what accumulates needs one window only). After the last step of an epoch it
    serves for what the next epoch begins with.
    """
    schedule = schedules.resolve(SCHEDULE_NAMES[case.schedule])
    length = case.epochs * (case.steps if case.interval == "step" else 1)
    start, end = (round(at * length) if isinstance(at, float) else at for at in (case.start, case.end))
    end = start if case.schedule == "one_shot" else end
    plan, due = [], 0.0
    for at in [*range(start, end, case.frequency or 1), end]:
        fraction = schedule((at - start) / (end - start)) if at < end else 1.0
        if fraction != due:
            plan.append((at, fraction))
            due = fraction
    levels: list[float | None] = []
    level, applied, since, steps = None, -1, 0, 0

    def advance(epoch: int) -> None:
        nonlocal level, applied, since
        clock, begins = (steps, steps) if case.interval == "step" else (epoch, max(epoch, steps // case.steps))
        if any(applied < at <= clock for at, _ in plan) and steps >= since + case.criterion.window:
            applied, level = [update for update in plan if update[0] <= begins][-1]
            since = since if case.criterion.accumulates else steps

    for epoch in range(case.epochs):
        advance(epoch)
        for batch in range(1, case.batches + 1):
            levels.append(level)
            if batch % case.accumulate == 0 or batch == case.batches:
                steps += 1
                advance(epoch)
    return [*levels, level]


def units(case: Case, mask: Tensor) -> Tensor:
    """Which units of a mask are pruned."""
    if isinstance(case.granularity, Weight):
        return ~mask.flatten()
    rows = mask.flatten(1)
    assert torch.equal(rows.all(1), rows.any(1)), "half a channel is pruned"
    return ~rows.any(1)


def allotted(case: Case, found: Mapping[str, Prunable], sizes: Mapping[str, int], due: float) -> dict[str, int] | int:
    """How many units are pruned: of each target where the goal says so, otherwise in total."""
    if isinstance(case.sparsity, dict):
        return {name: round(decided(case.sparsity, found[name].names) * due * n) for name, n in sizes.items()}
    amount = case.sparsity * due
    if case.scope == label(at_least):
        return {name: n - math.ceil((1 - amount) * n) for name, n in sizes.items()}
    if case.scope == "local":
        return {name: round(amount * n) for name, n in sizes.items()}
    return round(amount * sum(sizes.values()))


def erk(shapes: Mapping[str, torch.Size], sizes: Mapping[str, int], keep: int) -> dict[str, float]:
    """How many units each target keeps: in proportion to sum(shape) / prod(shape) of its size, at most all."""

    def kept(scale: float) -> dict[str, float]:
        return {name: n * min(1.0, scale * sum(shapes[name]) / shapes[name].numel()) for name, n in sizes.items()}

    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(kept(middle).values()) < keep else (low, middle)
    return kept(high)


def assert_lowest(case: Case, order: dict[str, Tensor], pruned: dict[str, Tensor]) -> None:
    """Pruned are the units with the lowest scores: of all targets together, or of each of them."""
    if case.threshold is not None or (case.scope == "global" and not isinstance(case.sparsity, dict)):
        together, picked = torch.cat(list(order.values())), torch.cat(list(pruned.values()))
        lowest = together.argsort(stable=True)[: int(picked.sum())].sort().values
        assert torch.equal(picked.nonzero().flatten(), lowest)
        return
    for name, ordered in order.items():
        lowest = ordered.argsort(stable=True)[: int(pruned[name].sum())].sort().values
        assert torch.equal(pruned[name].nonzero().flatten(), lowest), name


def assert_counts(case: Case, model: Model, watch: "Watch") -> None:
    """Before every batch and at the end as many units are pruned as are due, and those with the lowest scores."""
    found = targets(case, model)
    parameters = dict(model.named_parameters())
    shapes = {name: parameters[name].shape for name in found}
    pruned = {name: units(case, torch.ones(shape, dtype=torch.bool)) for name, shape in shapes.items()}
    sizes = {name: mask.numel() for name, mask in pruned.items()}
    last = None
    for level, masks, scores in zip(timeline(case), watch.masks, watch.scores, strict=True):
        before, changed, last = pruned, level != last, level
        if level is None:
            assert not masks
            continue
        followers = [name for prunable in found.values() for name in prunable.followers]
        assert set(masks) == {*found, *(followers if case.granularity.follows else ())}
        pruned = {name: units(case, masks[name]) for name in found}
        for name, prunable in found.items():
            dying = [masks[follower] for follower in prunable.followers if follower in masks]
            assert all(torch.equal(mask, ~pruned[name]) for mask in dying)
        counts = {name: int(mask.sum()) for name, mask in pruned.items()}
        order = {name: scores[name].flatten().masked_fill(before[name], -torch.inf) for name in found}
        if case.threshold is not None:
            bar = case.criterion.level(case.threshold)
            due = round(level * sum(int((ordered < bar).sum()) for ordered in order.values()))
            due = max(due, sum(int(mask.sum()) for mask in before.values())) if changed else sum(counts.values())
        else:
            due = allotted(case, found, sizes, level)
        assert (counts if isinstance(due, dict) else sum(counts.values())) == due
        if not changed:
            assert all(torch.equal(pruned[name], before[name]) for name in found), "masks changed, and nothing was due"
            continue
        assert_lowest(case, order, pruned)
        if case.scope == "erk" and not isinstance(due, dict) and case.threshold is None:
            ideal = erk(shapes, sizes, sum(sizes.values()) - due)
            room = 2 if any(mask.any() for mask in before.values()) else 1 + 1e-6  # what is pruned stays pruned
            assert all(abs(sizes[name] - counts[name] - ideal[name]) < room for name in found), (counts, ideal)


# ------------------------------------------------------------------------------------------------ a run


class Ear(Criterion):
    """Another criterion, of which it hears the scores."""

    def __init__(self, inner: Criterion) -> None:
        self.inner = inner
        self.needs = inner.needs
        self.window = inner.window
        self.accumulates = inner.accumulates
        self.heard: dict[str, Tensor] = {}

    def scores(self, units: Any) -> Tensor:
        found = self.inner.scores(units)
        self.heard[units.name] = found.clone()
        return found

    def __repr__(self) -> str:
        return repr(self.inner)

    def __getattribute__(self, name: str) -> Any:
        passed_on = ("observe", "finalize", "empty_state", "merge_states", "level")
        return getattr(self.inner, name) if name in passed_on else super().__getattribute__(name)


class Watch(MaskRecorder):
    """Looks at the weights before every batch, and records masks and scores."""

    def __init__(self, pruning: Pruning, model: Model, case: Case, ear: Ear) -> None:
        super().__init__(pruning)
        self.model = model
        self.targets = list(targets(case, model))
        self.ear = ear
        self.keys = list(model.state_dict())
        self.frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
        self.scores: list[dict[str, Tensor]] = []

    def record(self) -> None:
        super().record()
        self.scores.append(dict(self.ear.heard))
        masks = self.masks[-1]
        for name, parameter in self.model.named_parameters():
            assert parameter.isfinite().all(), name
            kept = masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
            assert torch.equal(parameter != 0, kept), f"{name} has other zeros than its mask"
            assert parameter.requires_grad or torch.equal(parameter, self.frozen[name]), f"{name} was trained"
        for old, new in pairwise(self.masks[-2:]):
            assert all(not (new[name] & ~mask).any() for name, mask in old.items()), "a pruned weight came back"
        weights = [masks[name] for name in self.targets if masks]
        level = sum(int((~mask).sum()) for mask in weights) / max(1, sum(mask.numel() for mask in weights))
        assert self.pruning.sparsity_now == pytest.approx(level, abs=1e-12)
        assert list(self.model.state_dict()) == self.keys


class Early(Callback):
    """Saves after one step, before the callbacks behind it have seen that step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path, self.saved = step, path, False

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and not self.saved:  # all ranks save together, or none
            self.saved = True
            trainer.save_checkpoint(self.path)


def saver(case: Case, folder: Path) -> tuple[list[Callback], list[Callback], Path | None]:
    """Return what saves the resume point, in front of the pruning and behind it, and where."""
    point, number = case.resume or (None, 0)
    if point == "early":
        path = folder / "early.ckpt"
        return [Early(number, path)], [], path
    if point == "step":
        saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=number, save_top_k=-1)
        return [], [saves], folder / f"step={number}.ckpt"
    if point == "epoch":
        saves = ModelCheckpoint(
            folder, "{epoch}", every_n_epochs=number + 1, save_on_train_epoch_end=True, save_top_k=-1
        )
        return [], [saves], folder / f"epoch={number}.ckpt"
    return [], [], None


@torch.no_grad()
def apply(masks: Mapping[str, Tensor], tensors: Mapping[str, Tensor | None]) -> None:
    for name, mask in masks.items():
        if tensors[name] is not None:
            tensors[name].mul_(mask)


def replay(case: Case, masks: list[dict[str, Tensor]], size: int) -> Model:
    """Train without the package and without a Trainer, under masks that are given for each batch and for the end."""
    model = Model(case)
    parameters = dict(model.named_parameters())
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    optimizer = OPTIMIZERS[case.optimizer](trained)
    loader = StatefulLoader(model.size, case.batches)
    before = iter(masks)
    for epoch in range(case.epochs):
        loader.set_epoch(epoch)
        grads: list[list[Tensor | None]] = [[None] * len(trained) for _ in range(size)]
        for number, batch in enumerate(loader, 1):
            held = next(before)
            apply(held, parameters)
            for one, grad in enumerate(grads):  # each rank has its own part of the batch
                for parameter, so_far in zip(trained, grad, strict=True):
                    parameter.grad = so_far
                (model.loss([tensor[one::size] for tensor in batch]) / case.accumulate).backward()
                grads[one] = [parameter.grad for parameter in trained]
            if number % case.accumulate and number < case.batches:
                continue
            for parameter, *found in zip(trained, *grads, strict=True):
                parameter.grad = sum(grad / size for grad in found)
            apply(held, {name: parameter.grad for name, parameter in parameters.items()})
            if case.clip is not None:
                by, value = case.clip
                clip = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}[by]
                clip(trained, value)
            optimizer.step()
            apply(held, parameters)
            grads = [[None] * len(trained) for _ in range(size)]
    apply(next(before), parameters)
    return model


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    assert found.keys() == expected.keys(), what
    other = {name: (found[name], tensor) for name, tensor in expected.items() if not torch.equal(found[name], tensor)}
    assert not other, f"{what}: {other}"


def trial(case: Case, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Train the case, without and with its interruption, on every rank, and return parameters and masks."""
    model, ear = Model(case), Ear(case.criterion)
    callback = case.pruning(ear)
    watch = Watch(callback, model, case, ear)
    in_front, behind, path = saver(case, folder)
    trainer = case.train(model, *in_front, callback, watch, *behind)
    parameters = dict(model.named_parameters())

    assert_counts(case, model, watch)
    assert not leftovers(model, *trainer.optimizers)
    Model(case, seed=1).load_state_dict(model.state_dict(), strict=True)
    by_hand = replay(case, watch.masks, ranks())
    assert_same(dict(by_hand.named_parameters()), parameters, "not what training under these masks by hand gives")
    if path is not None:
        other, again = Model(case, seed=1), case.pruning(case.criterion)
        recorder = MaskRecorder(again)
        trainer = case.train(other, again, recorder, ckpt_path=path)
        assert_same(again.masks, callback.masks, "resumed: other masks")
        assert_same(dict(other.named_parameters()), parameters, "resumed: other weights")
        if rank() == 0:  # the buffers of other ranks are not saved
            assert_same(dict(other.named_buffers()), dict(model.named_buffers()), "resumed: other buffers")
        assert again.sparsity_now == pytest.approx(callback.sparsity_now, abs=1e-12)
        for masks, expected in zip(recorder.masks[::-1], watch.masks[::-1], strict=False):
            assert_same(masks, expected, "resumed: other masks on the way")
    return {"weights": {n: p.detach().clone() for n, p in parameters.items()}, "masks": dict(callback.masks)}


def trials(*cases: Case) -> list[dict[str, dict[str, Tensor]]]:
    with TemporaryDirectory() as folder:
        shared = [folder]
        if ranks() > 1:
            torch.distributed.broadcast_object_list(shared)
        found = []
        for i, case in enumerate(cases):
            found.append(trial(case, Path(shared[0], str(i))))
        if ranks() > 1:
            torch.distributed.barrier()
    return found


def check(*cases: Case, size: int = 1) -> None:
    """Run cases on so many ranks and check every promise."""
    if size == 1:
        trials(*cases)
        return
    for first, second in zip(*run(trials, size, *cases), strict=True):
        assert_same(second["masks"], first["masks"], "other masks on another rank")
        assert_same(second["weights"], first["weights"], "other weights on another rank")


# ------------------------------------------------------------------------------------------------ tests


@pytest.fixture(autouse=True, scope="module")
def silence() -> Iterator[None]:
    """Let a failing example be found in what is printed."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow],
    )


@fuzz(36)
@given(several(1))
def test_any_run_keeps_every_promise(cases: list[Case]) -> None:
    check(*cases)


@pytest.mark.distributed
@fuzz(2)
@given(several(6))
def test_any_run_on_two_ranks_keeps_every_promise(cases: list[Case]) -> None:
    check(*cases, size=2)  # several, since two processes take a second to start
