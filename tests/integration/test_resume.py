"""A run that was killed and resumed ends with the same bits as the run that was not."""

import copy
import io
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from models import Attention, GroupedAttention, Mean, Residual, agrees, fit
from modes import ADAM, KINDS, SGD, Probe, Regression, StatefulLoader, assert_masked, assert_pruned, leftovers, mlp
from torch import Tensor, nn
from variants import COUPLED, CRITERIA, GRANULARITIES, METHODS, OF_LAYERS, OF_STREAMS, label

from lightning_prune import (
    BatchNormScale,
    Channel,
    ConstantSparsity,
    Criterion,
    Granularity,
    Head,
    Knapsack,
    LatencyTable,
    Layer,
    LearnedMasks,
    MagnitudePruning,
    MaskedAdapters,
    Pruning,
    ResidualChannel,
    Sensitivity,
    SharedFanIn,
    Weight,
    prune,
)
from lightning_prune.tensors.packing import pack_all, unpack_all
from lightning_prune.training import observed
from lightning_prune.updates.latency import LayerTime

# resumed runs save nothing, so the callbacks that saved are not among theirs
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
BATCHES = 3
REGIMES: dict[str, dict[str, Any]] = {
    "one_shot": {"schedule": "one_shot", "start": 4},
    "step": {"schedule": "linear", "start": 0, "end": 7, "frequency": 2},
    "epoch": {"schedule": "linear", "start": 0, "end": 2, "interval": "epoch"},
}


class Resumable(Regression):
    """Takes up its data where a checkpoint left them. Its weights are others each time it is made."""

    def __init__(self, batches: int = BATCHES, optimizer: Callable[..., Any] = ADAM) -> None:
        super().__init__(mlp(), optimizer=optimizer)
        self.batches = batches

    def train_dataloader(self) -> StatefulLoader:
        return StatefulLoader(batches=self.batches)


class Manual(Resumable):
    """Steps two optimizers by hand."""

    def __init__(self, raw: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.raw = raw

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers(use_pl_optimizer=not self.raw):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [ADAM(self.net[:3].parameters()), SGD(self.net[3:].parameters(), lr=0.01)]


class Saver(Callback):
    """Saves a checkpoint after every batch, from a place of its own among the callbacks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.batches = 0

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.batches += 1
        trainer.save_checkpoint(self.folder / f"batch={self.batches}.ckpt")


def savers(folder: Path) -> list[Callback]:
    """Return callbacks that save after every optimizer step, at the end of every epoch, and after every validation."""
    return [
        ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1),
        ModelCheckpoint(folder, "end-{epoch}", every_n_epochs=1, save_on_train_epoch_end=True, save_top_k=-1),
        ModelCheckpoint(folder, "validated-{epoch}", monitor="val_loss", save_top_k=-1),
    ]


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.ckpt"), key=lambda path: (len(path.name), path.name))


def bits(trainer: Trainer, model: nn.Module, *callbacks: Any) -> dict[str, Tensor]:
    """Return copies of all that a run leaves behind: parameters, buffers, masks and the state of the optimizers."""
    found = dict(model.state_dict())
    for i, callback in enumerate(callbacks):
        found |= {f"mask {i} of {name}": mask for name, mask in callback.masks.items()}
    for i, optimizer in enumerate(trainer.optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            found |= {f"{key} of {i}.{j}": value for key, value in state.items() if isinstance(value, Tensor)}
    return {name: tensor.clone() for name, tensor in found.items()}


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    same = {name for name in expected if name in found and torch.equal(found[name], expected[name])}
    return sorted((found.keys() | expected.keys()) - same)


def resume(
    folder: Path,
    expected: dict[str, Tensor],
    callback: Callable[[], Any],
    model: Callable[[], LightningModule],
    taken: slice = slice(None),
    **trainer_kwargs: Any,
) -> dict[str, list[str]]:
    """Resume from the checkpoints taken and return what differs at the end, by the name of the checkpoint."""
    wrong = {}
    paths = checkpoints(folder)[taken]
    assert len(paths) > 2
    for path in paths:
        other, again = model(), callback()
        with Probe(other, again) as probe:
            trainer = fit(other, again, ckpt_path=str(path), num_sanity_val_steps=1, **trainer_kwargs)
        found = differences(bits(trainer, other, again), expected)
        if found or (probe.dense and not isinstance(again, LearnedMasks)):  # whose masks are soft in training
            wrong[path.name] = found
    return wrong


def assert_resumes_exactly(
    folder: Path,
    callback: Callable[[], Any],
    model: Callable[[], LightningModule] = Resumable,
    sparsity: float = 0.5,
    saving: slice = slice(None),
    taken: slice = slice(None),
    check: Callable[..., None] = assert_pruned,
    **trainer_kwargs: Any,
) -> None:
    """Save a run after every step, resume from the checkpoints taken, and compare the ends bit by bit."""
    kwargs = {"max_epochs": 3, "limit_val_batches": 1, **trainer_kwargs}
    one, first = model(), callback()
    if isinstance(first, ConstantSparsity):
        prune(one, sparsity)
    trainer = fit(one, first, *savers(folder)[saving], enable_checkpointing=True, **kwargs)
    check(one, first, sparsity)
    assert not resume(folder, bits(trainer, one, first), callback, model, taken, **kwargs)


def third(turn: int) -> slice:
    """Every third checkpoint: of three cases with other turns, each checkpoint is taken by one."""
    return slice(turn % 3, None, 3)


def fifth(turn: int) -> slice:
    """Every fifth checkpoint."""
    return slice(turn % 5, None, 5)


# Criteria and granularities all meet. The regimes, and the fifths of the checkpoints that are taken, go by turns, so
# that each criterion and granularity meets every regime, and each of all three is resumed from every checkpoint.
CASES = [
    (criterion, granularity, list(REGIMES)[(i + j) % 3], (i + 2 * j) % 5)
    for i, criterion in enumerate(CRITERIA)
    for j, granularity in enumerate(GRANULARITIES)
]


def test_every_pair_of_variants_resumes_and_each_from_every_checkpoint() -> None:
    axes: list[tuple[Any, ...]] = [CRITERIA, GRANULARITIES, tuple(REGIMES), tuple(range(5))]
    for i, j in combinations(range(4), 2):
        met = {(str(case[i]), str(case[j])) for case in CASES}
        assert met == {(str(one), str(other)) for one in axes[i] for other in axes[j]}
    assert sorted(i for turn in range(5) for i in range(15)[fifth(turn)]) == list(range(15))


@pytest.mark.parametrize(("criterion", "granularity", "regime", "turn"), CASES, ids=label)
def test_every_combination_resumes_exactly(
    criterion: Criterion, granularity: Granularity, regime: str, turn: int, tmp_path: Path
) -> None:
    arguments = {"criterion": criterion, "granularity": granularity, **REGIMES[regime]}
    assert_resumes_exactly(tmp_path, partial(Pruning, 0.5, **arguments), taken=fifth(turn))
    assert torch.load(checkpoints(tmp_path)[5 + turn], weights_only=True)["callbacks"]


@pytest.mark.parametrize(("turn", "regime"), list(enumerate(REGIMES)))
def test_a_criterion_that_needs_a_norm_resumes_exactly(regime: str, turn: int, tmp_path: Path) -> None:
    granularity = (Weight(), Channel())[turn % 2]
    arguments = {"criterion": BatchNormScale(), "granularity": granularity, **REGIMES[regime]}
    assert_resumes_exactly(tmp_path, partial(Pruning, 0.5, targets=("net.0.*",), **arguments), taken=third(turn))


class Attending(Resumable):
    """Attention of 4 heads over sequences of 3 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.size = (3, 8)
        self.net = nn.Sequential(Attention(8, 4), nn.Flatten(), nn.Linear(24, 4))

    def train_dataloader(self) -> StatefulLoader:
        return StatefulLoader(self.size, self.batches)


def assert_zero(model: nn.Module, callback: Pruning, sparsity: float) -> None:
    assert agrees(model, callback.masks)
    assert 0.3 < callback.sparsity_now < 0.75  # a count of weights, where the goal is one of units


OF_EACH_KIND = {criterion.needs: criterion for criterion in reversed(CRITERIA)}.values()


@pytest.mark.parametrize("granularity", COUPLED, ids=label)
@pytest.mark.parametrize(
    ("turn", "criterion", "regime"), list(zip(range(3), OF_EACH_KIND, REGIMES, strict=True)), ids=label
)
def test_coupled_units_resume_exactly(
    criterion: Criterion, granularity: Granularity, regime: str, turn: int, tmp_path: Path
) -> None:
    arguments = {"criterion": criterion, "granularity": granularity, **REGIMES[regime]}
    model = Resumable if isinstance(granularity, Channel) else Attending
    assert_resumes_exactly(tmp_path, partial(Pruning, 0.5, **arguments), model, taken=third(turn), check=assert_zero)


class Sharing(Attending):
    """Attention of 4 queries over sequences of 3 tokens, of which 2 each share keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(GroupedAttention(8, 4, 2), nn.Flatten(), nn.Linear(24, 4))


def test_single_queries_resume_exactly(tmp_path: Path) -> None:
    arguments = {"criterion": Sensitivity(window=2), "granularity": Head(queries=True), **REGIMES["step"]}
    assert_resumes_exactly(tmp_path, partial(Pruning, 0.5, **arguments), Sharing, taken=fifth(1), check=assert_zero)


def test_groups_of_rows_resume_exactly_by_the_times_that_were_measured(tmp_path: Path) -> None:
    levels = ((0.0, 0.0), (0.5, 1.0), (1.0, 1.0))  # a layer is faster from half of its zeros on
    layers = tuple(LayerTime(f"net.{n}.weight", (0, None), (0.0,) * 4, levels=levels) for n in (0, 3, 5))
    table = LatencyTable(layers, (0.0, 0.0), 3.0, "SharedFanIn")
    arguments = {"granularity": SharedFanIn(2), "of": "latency", "scope": Knapsack(), **REGIMES["step"]}

    def assert_half(model: nn.Module, callback: Pruning, sparsity: float) -> None:
        assert agrees(model, callback.masks)
        times = [min(1.0, 2.0 * float(mask.double().mean())) for mask in callback.masks.values()]
        assert 1.2 < sum(times) <= 1.5 + 1e-6

    with patch.object(observed, "latency_table", side_effect=[table]):  # resumed runs that measure again would fail
        assert_resumes_exactly(tmp_path, partial(Pruning, 0.5, **arguments), taken=fifth(2), check=assert_half)


class Deep(Attending):
    """Four residual blocks over sequences of 3 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(Residual(8, 2) for _ in range(4)), nn.Flatten(), nn.Linear(24, 4))


# a criterion that observes the blocks, and one that looks at their weights
@pytest.mark.parametrize(("turn", "criterion"), list(enumerate(OF_LAYERS[:2])), ids=label)
def test_layers_resume_exactly(criterion: Criterion, turn: int, tmp_path: Path) -> None:
    arguments = {"criterion": criterion, "granularity": Layer(), **REGIMES[list(REGIMES)[turn % 3]]}
    taken = fifth(turn)  # to find the blocks again takes a few forward passes of the model under the probe
    assert_resumes_exactly(tmp_path, partial(Pruning, 0.5, **arguments), Deep, taken=taken, check=assert_zero)


class Narrow(Attending):
    """Two residual blocks over sequences of 3 tokens, whose mean is classified."""

    def __init__(self) -> None:
        super().__init__()
        blocks = (Residual(8, 2) for _ in range(2))
        self.net = nn.Sequential(nn.Linear(8, 8), *blocks, nn.LayerNorm(8), Mean(), nn.Linear(8, 4))


@pytest.mark.parametrize(("turn", "criterion"), list(enumerate(OF_STREAMS[:2])), ids=label)
def test_the_hidden_width_resumes_exactly(criterion: Criterion, turn: int, tmp_path: Path) -> None:
    arguments = {"criterion": criterion, "granularity": ResidualChannel(), **REGIMES[list(REGIMES)[turn % 3]]}
    assert_resumes_exactly(tmp_path, partial(Pruning, 0.5, **arguments), Narrow, taken=fifth(turn), check=assert_zero)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_exactly(method: str, tmp_path: Path) -> None:
    # by turns the even checkpoints or the odd ones: with two ways to run a class, all of them
    alike = [name for name in METHODS if name.partition("-")[0] == method.partition("-")[0]]
    turn = alike.index(method)
    first = turn if len(alike) > 1 else list(METHODS).index(method)
    assert_resumes_exactly(tmp_path, METHODS[method], taken=slice(first % 2, None, 2), check=assert_masked)
    assert torch.load(checkpoints(tmp_path)[5 + turn], weights_only=True)["callbacks"]


@pytest.mark.parametrize("optimizer", [ADAM, partial(torch.optim.LBFGS, lr=0.1, max_iter=3)], ids=["adam", "lbfgs"])
def test_constant_sparsity_resumes_exactly(optimizer: Callable[..., Any], tmp_path: Path) -> None:
    assert_resumes_exactly(tmp_path, ConstantSparsity, partial(Resumable, optimizer=optimizer), sparsity=0.75)


@pytest.mark.parametrize(("optimizer", "precision"), [(ADAM, "bf16-true"), (SGD, "32-true")], ids=["adam", "sgd"])
def test_adapters_resume_exactly(optimizer: Callable[..., Any], precision: Any, tmp_path: Path) -> None:
    model = partial(Resumable, optimizer=optimizer)
    assert_resumes_exactly(tmp_path, partial(MaskedAdapters, 2), model, sparsity=0.75, precision=precision)


def assert_weights(model: nn.Module, callback: Any, sparsity: float) -> None:
    """The weights are those that the callback holds, or zero, and it has masks for each of them."""
    assert agrees(model, callback.masks)
    for name, dense in callback.state.dense.items():
        assert torch.equal(model.get_parameter(name), dense * callback.masks[name])


@pytest.mark.parametrize(("optimizer", "precision"), [(ADAM, "bf16-true"), (SGD, "32-true")], ids=["adam", "sgd"])
def test_learned_masks_resume_exactly(optimizer: Callable[..., Any], precision: Any, tmp_path: Path) -> None:
    model = partial(Resumable, optimizer=optimizer)
    assert_resumes_exactly(tmp_path, LearnedMasks, model, check=assert_weights, precision=precision)


@pytest.mark.parametrize(
    "trainer_kwargs",
    [
        {"accumulate_grad_batches": 2, "max_epochs": 5},  # the last batch of an epoch steps alone
        {
            "max_epochs": 9,
            "max_steps": 11,
        },  # ends in mid-epoch; from an epoch's end Lightning resumes an epoch too late
        {"val_check_interval": 2},
        {"check_val_every_n_epoch": 2},
        {"gradient_clip_val": 0.1, "precision": "bf16-mixed"},
        {"precision": "bf16-true"},
    ],
    ids=lambda kwargs: ",".join(kwargs),
)
@pytest.mark.parametrize("kind", ["gradients", "forwards"])  # whose windows a step must not fall out of
def test_every_way_to_train_resumes_exactly(kind: str, trainer_kwargs: dict[str, Any], tmp_path: Path) -> None:
    callback = partial(Pruning, 0.5, **KINDS[kind], **REGIMES["step"])
    saving = slice(1)  # after every step
    taken = slice(list(KINDS).index(kind) % 2, None, 2)
    assert_resumes_exactly(tmp_path, callback, saving=saving, taken=taken, **trainer_kwargs)


@pytest.mark.parametrize(("kind", "raw"), [("weights", True), ("gradients", False), ("forwards", True)])
def test_manual_optimization_resumes_exactly(kind: str, raw: bool, tmp_path: Path) -> None:
    callback = partial(Pruning, 0.5, **KINDS[kind], **REGIMES["step"])
    one, first = Manual(raw), callback()
    expected = bits(fit(one, first, Saver(tmp_path), max_epochs=3), one, first)
    assert_pruned(one, first)
    taken = third(list(KINDS).index(kind) + raw)
    assert not resume(tmp_path, expected, callback, partial(Manual, raw), taken, max_epochs=3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_saved_before_the_callback_has_seen_the_step_resumes_exactly(kind: str, tmp_path: Path) -> None:
    callback = partial(Pruning, 0.5, **KINDS[kind], **REGIMES["step"])
    one, first = Resumable(), callback()
    expected = bits(fit(one, Saver(tmp_path), first, max_epochs=3), one, first)
    assert not resume(tmp_path, expected, callback, Resumable, third(list(KINDS).index(kind)), max_epochs=3)


@pytest.mark.parametrize(
    ("interval", "kind"), [("step", "weights"), ("step", "gradients"), ("epoch", "gradients"), ("epoch", "forwards")]
)
def test_a_longer_resumed_run_keeps_the_window_of_the_first(interval: str, kind: str, tmp_path: Path) -> None:
    axes = {**KINDS[kind], "schedule": "linear", "interval": interval}
    length = 2 if interval == "epoch" else 2 * BATCHES
    fractions = partial(Pruning, 0.5, **axes, start=0.0, end=0.5)
    callback = Pruning(0.5, **axes, start=0, end=length // 2)
    one, long = Resumable(), Resumable()
    long.load_state_dict(copy.deepcopy(one.state_dict()))
    expected = bits(fit(long, callback, max_epochs=4), long, callback)
    assert_pruned(long, callback)
    fit(one, fractions(), *savers(tmp_path), enable_checkpointing=True, max_epochs=2)
    taken = third(list(KINDS).index(kind) + (interval == "epoch"))
    assert not resume(tmp_path, expected, fractions, Resumable, taken, max_epochs=4)


def test_a_resumed_run_can_prune_further(tmp_path: Path) -> None:
    first, second = MagnitudePruning(0.5, start=0, end=6), MagnitudePruning(0.75, start=0, end=9)
    fit(Resumable(), first, ModelCheckpoint(tmp_path, "last"), enable_checkpointing=True)
    model = Resumable()
    with Probe(model, second) as probe, pytest.warns(UserWarning, match=r"resumes with sparsity=0\.75 \(0\.5 before\)"):
        fit(model, second, ckpt_path=str(tmp_path / "last.ckpt"), max_epochs=4)
    assert not probe.dense
    assert all(not (mask & ~first.masks[name]).any() for name, mask in second.masks.items())
    assert probe.levels[0] == 0.5


# ------------------------------------------------------------------------------------------- crashes


class Crash(Callback):
    """Ends the process, or raises, in the middle of a step: the weights of the step before are saved."""

    def __init__(self, step: int, kill: bool) -> None:
        self.step, self.kill = step, kill

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        # not behind the backward pass: where somebody may read gradients, those of pruned weights are masked
        if trainer.global_step == self.step:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ConnectionError("lost")


def crashing_run(folder: Path, model: LightningModule, *callbacks: Callback) -> Pruning:
    callback = Pruning(0.5, **KINDS["forwards"], **REGIMES["step"])
    fit(model, callback, *callbacks, *savers(folder)[:1], enable_checkpointing=True, max_epochs=3)
    return callback


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_again_and_again_ends_like_one_that_is_not(kind: str, tmp_path: Path) -> None:
    callback = partial(Pruning, 0.5, **KINDS[kind], **REGIMES["step"])
    one, first = Resumable(), callback()
    start = copy.deepcopy(one.state_dict())
    expected = bits(fit(one, first, max_epochs=3), one, first)
    path = None
    # not at the last batch of an epoch: a run resumed there saves wrong counters, with or without pruning
    for step in (1, 2, 4, 5, 7, 8):
        model = Resumable()
        model.load_state_dict(start)
        kwargs = {"ckpt_path": path, "max_epochs": 3, "enable_checkpointing": True}
        with pytest.raises(ConnectionError):
            fit(model, callback(), Crash(step, False), *savers(tmp_path)[:1], **kwargs)
        path = str(tmp_path / f"step={step}.ckpt")
    last, again = Resumable(), callback()
    trainer = fit(last, again, ckpt_path=path, max_epochs=3)
    assert not differences(bits(trainer, last, again), expected)


def seeded() -> Resumable:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return Resumable()


def killed_run(folder: Path) -> None:
    crashing_run(folder, seeded(), Crash(5, True))


def test_a_killed_process_resumes_exactly(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=killed_run, args=(tmp_path / "killed",))
    process.start()
    process.join(100)
    assert process.exitcode == -signal.SIGKILL
    last = checkpoints(tmp_path / "killed")[-1]
    assert last.name == "step=5.ckpt"
    one, other = seeded(), Resumable()
    first, again = crashing_run(tmp_path / "whole", one), Pruning(0.5, **KINDS["forwards"], **REGIMES["step"])
    trainer = fit(other, again, ckpt_path=str(last), max_epochs=3)
    assert not differences(bits(trainer, other, again), bits(one.trainer, one, first))
    assert_pruned(other, again)


@pytest.mark.filterwarnings("ignore:.*was called without a model", "ignore:.*there is no last checkpoint available")
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_saved_at_an_exception_resumes_at_its_sparsity(kind: str, tmp_path: Path) -> None:
    callback, kwargs = Pruning(0.5, **KINDS[kind], **REGIMES["step"]), {"enable_checkpointing": True, "max_epochs": 3}
    with pytest.raises(ConnectionError):
        fit(Resumable(), callback, Crash(5, False), OnExceptionCheckpoint(tmp_path, "broken"), **kwargs)
    level = callback.sparsity_now
    model, again = Resumable(), Pruning(0.5, **KINDS[kind], **REGIMES["step"])
    with Probe(model, again) as probe:
        fit(model, again, ckpt_path=str(tmp_path / "broken.ckpt"), max_epochs=3)
    assert not probe.dense
    assert 0 < level < 0.5
    assert_pruned(model, again)


# ------------------------------------------------------------------------------------------- the state


def sizes(wide: int, deep: int) -> nn.Sequential:
    return nn.Sequential(*[layer for _ in range(deep) for layer in (nn.Linear(wide, wide), nn.BatchNorm1d(wide))])


@pytest.mark.parametrize("granularity", [Weight(), Channel()], ids=label)
@pytest.mark.parametrize(("wide", "deep"), [(1000, 1), (64, 60)])
def test_saved_masks_take_one_bit_a_weight(wide: int, deep: int, granularity: Granularity) -> None:
    model = Regression(sizes(wide, deep), (wide,))
    callback = MagnitudePruning(0.5, schedule="one_shot", start=0, granularity=granularity)
    fit(model, callback, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    file = io.BytesIO()
    torch.save(callback.state_dict(), file)
    weights = sum(mask.numel() for mask in callback.masks.values())
    assert weights >= wide * wide * deep
    assert callback.sparsity_now == pytest.approx(0.5)
    assert len(file.getvalue()) <= weights * 4 / 32 + 10_000


@pytest.fixture
def checkpoint(tmp_path: Path) -> dict[str, Any]:
    """A checkpoint in mid-run, in the middle of a window."""
    callback = Pruning(0.5, **KINDS["forwards"], **REGIMES["step"])
    fit(Resumable(), callback, Saver(tmp_path), max_epochs=3)
    return torch.load(tmp_path / "batch=5.ckpt", weights_only=True)


NAME = "net.3.weight"


def mid_run() -> Pruning:
    return Pruning(0.5, **KINDS["forwards"], **REGIMES["step"])


def edited(state: Any, edit: Callable[[Any], Any]) -> Any:
    """Return a copy of a nested state with every part of it passed through a function."""
    if isinstance(state, dict):
        return {edit(key): edited(value, edit) for key, value in state.items()}
    if isinstance(state, list) and not all(isinstance(part, int) for part in state):
        return [edited(part, edit) for part in state]
    return edit(state)


def without_a_mask(state: dict[str, Any]) -> dict[str, Any]:
    masks = unpack_all(state["masks"])
    del masks[NAME]
    return {**state, "masks": pack_all(masks)}


def packed(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dtype == torch.uint8


DAMAGES: dict[str, Callable[[Any], Any]] = {
    "a mask is missing": without_a_mask,
    "a parameter is renamed": partial(edited, edit=lambda part: "net.4.weight" if part == NAME else part),
    "a shape is another": partial(edited, edit=lambda part: [4, 16] if part == [8, 8] else part),
    "a shape is larger": partial(edited, edit=lambda part: [9, 8] if part == [8, 8] else part),
    "bits are cut off": partial(edited, edit=lambda part: part[:-1] if packed(part) else part),
    "bits are of another type": partial(edited, edit=lambda part: part.float() if packed(part) else part),
}


def damaged(checkpoint: dict[str, Any], how: str) -> dict[str, Any]:
    """Damage the state of the pruning callback, in which all weights are pruned: applying it would show."""
    (key,) = (key for key in checkpoint["callbacks"] if key.startswith("Pruning"))
    pruned = edited(checkpoint["callbacks"][key], lambda part: torch.zeros_like(part) if packed(part) else part)
    state = DAMAGES[how](pruned)
    assert pickle.dumps(state) != pickle.dumps(pruned)
    return {**checkpoint, "callbacks": {key: state}}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_state_is_refused_by_the_parameters_name(
    how: str, checkpoint: dict[str, Any], tmp_path: Path
) -> None:
    torch.save(damaged(checkpoint, how), tmp_path / "damaged.ckpt")
    model, callback = Resumable(), mid_run()
    with pytest.raises(ValueError, match=r"net\.\d\.(weight|bias)"):
        fit(model, callback, ckpt_path=str(tmp_path / "damaged.ckpt"), max_epochs=3)
    # Lightning has loaded the weights before it gives the callback its state; the damaged masks have not touched them
    assert not differences(dict(model.state_dict()), checkpoint["state_dict"])
    assert leftovers(model) == []


@pytest.mark.parametrize("how", ["a mask is missing", "bits are cut off", "bits are of another type"])
def test_a_damaged_state_leaves_the_callback_as_it_was(how: str, checkpoint: dict[str, Any]) -> None:
    callback = mid_run()
    fit(Resumable(), callback, max_epochs=3)
    masks, level = dict(callback.masks), callback.sparsity_now
    (state,) = damaged(checkpoint, how)["callbacks"].values()
    with pytest.raises(ValueError, match=r"net\.\d\.(weight|bias)"):
        callback.load_state_dict(state)
    assert not differences(dict(callback.masks), masks)
    assert callback.sparsity_now == level == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("key", ["masks", "steps"])
def test_a_state_without_an_entry_says_which(key: str, checkpoint: dict[str, Any]) -> None:
    (state,) = (state for name, state in checkpoint["callbacks"].items() if name.startswith("Pruning"))
    with pytest.raises(ValueError, match=rf"Pruning must have .*{key}"):
        Pruning(0.5).load_state_dict({name: value for name, value in state.items() if name != key})


def test_a_truncated_file_changes_nothing(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "batch=5.ckpt"
    path.write_bytes(path.read_bytes()[:5000])
    model, callback = Resumable(), MagnitudePruning(0.5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((OSError, RuntimeError)):  # what torch says
        fit(model, callback, ckpt_path=str(path), max_epochs=3)
    assert not differences(dict(model.state_dict()), before)
    assert not callback.masks
    assert leftovers(model) == []


@pytest.mark.parametrize("lost", ["state", "key"])
def test_zeros_without_masks_are_noticed(lost: str, checkpoint: dict[str, Any], tmp_path: Path) -> None:
    kept = checkpoint["callbacks"] if lost == "key" else {}
    torch.save({**checkpoint, "callbacks": kept}, tmp_path / "lost.ckpt")
    # other names of targets are the key of another callback: its state is not found
    callback = MagnitudePruning(0.5, start=0, end=9, targets=("net.0.weight", "net.3.weight"))
    with pytest.warns(UserWarning, match=r"MagnitudePruning holds no masks.*ConstantSparsity"):
        fit(Resumable(), callback, ckpt_path=str(tmp_path / "lost.ckpt"), max_epochs=3)


@pytest.mark.parametrize("dense", ["random", "zero", "restored"])
def test_dense_weights_are_no_reason_to_warn(dense: str, checkpoint: dict[str, Any], tmp_path: Path) -> None:
    model, path = Resumable(), None
    if dense == "zero":  # as the last layer of an adapter is initialised
        nn.init.zeros_(model.net[5].weight)
    if dense == "restored":
        path = str(tmp_path / "batch=5.ckpt")
    callback = mid_run()
    fit(model, callback, ckpt_path=path, max_epochs=3)  # a warning is an error
    assert callback.sparsity_now > 0.4
