"""A run that is resumed with other arguments goes on with these, or refuses them: it never ignores them in silence."""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MLP, fit
from modes import plain_parameters

from lightning_prune import (
    ACDC,
    SET,
    SRSTE,
    APoZ,
    Block,
    Channel,
    Criterion,
    Entropy,
    Granularity,
    GuardedPruning,
    InputChannel,
    LotteryTicket,
    MagnitudePruning,
    Movement,
    Pruning,
    PruningAtInit,
    RigL,
    Sensitivity,
    Wanda,
    Weight,
)

Make = Callable[..., Any]


def begun(callback: Any, folder: Path, epochs: int = 3) -> str:
    """Train for some epochs of 4 steps, and save a checkpoint."""
    path = str(folder / "begun.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(will not reach its target|before the last update)")
        fit(MLP(), callback, max_epochs=epochs).save_checkpoint(path)
    return path


def zeros(model: MLP, callback: Any) -> float:
    parameters = plain_parameters(model)
    weights = [parameters[name] for name, mask in callback.masks.items() if mask.ndim >= 2]
    return float(sum((weight == 0).sum() for weight in weights) / sum(weight.numel() for weight in weights))


steps: dict[str, Any] = {"start": 2, "end": 8}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (partial(MagnitudePruning, 0.5, **steps), partial(MagnitudePruning, 0.75, **steps), 0.75),
        (partial(MagnitudePruning, 0.5, start=2, end=40), partial(MagnitudePruning, 0.5, start=2, end=16), 0.5),
        (partial(MagnitudePruning, 0.5, start=2, end=40), partial(MagnitudePruning, 0.5, **steps), 0.5),
        (partial(MagnitudePruning, 0.5, **steps), partial(MagnitudePruning, 0.75, start=16, end=20), 0.75),
        (
            partial(MagnitudePruning, 0.5, start=0, end=40),
            partial(MagnitudePruning, 0.75, start=0, end=4, interval="epoch"),
            0.75,
        ),
        (partial(MagnitudePruning, {"*": 0.5}, **steps), partial(MagnitudePruning, {"*": 0.75}, **steps), 0.75),
        (partial(ACDC, 0.5, frequency=3), partial(ACDC, 0.75, frequency=3), 0.75),
        (partial(SRSTE, 2, 4, targets=("net.4.weight",)), partial(SRSTE, 1, 4, targets=("net.4.weight",)), 0.75),
    ],
)
def test_another_goal_is_reached(first: Make, second: Make, expected: float, tmp_path: Path) -> None:
    path, model, callback = begun(first(), tmp_path), MLP(), second()
    with pytest.warns(UserWarning, match=f"{type(callback).__name__} resumes with "):
        fit(model, callback, ckpt_path=path, max_epochs=6)
    assert callback.reached
    assert callback.sparsity_now == pytest.approx(expected, abs=0.01)
    assert zeros(model, callback) == pytest.approx(expected, abs=0.01)


def test_another_threshold_holds(tmp_path: Path) -> None:
    path, model = begun(MagnitudePruning(threshold=0.1, **steps), tmp_path), MLP()
    callback = MagnitudePruning(threshold=0.3, **steps)
    with pytest.warns(UserWarning, match=r"resumes with threshold=0\.3 \(0\.1 before\): its updates are planned again"):
        fit(model, callback, ckpt_path=path, max_epochs=3 + 1)
    assert callback.sparsity_now > 0.3


def test_what_is_pruned_stays_pruned_with_a_lower_goal(tmp_path: Path) -> None:
    path, callback = begun(MagnitudePruning(0.75, **steps), tmp_path), MagnitudePruning(0.5, **steps)
    with pytest.warns(UserWarning, match="pruned weights do not come back"):
        fit(MLP(), callback, ckpt_path=path, max_epochs=4)
    assert callback.sparsity_now == pytest.approx(0.75, abs=0.01)


ticket = partial(LotteryTicket, rounds=2, frequency=4, interval="step")
guarded = partial(GuardedPruning, "val_loss", max_drop=5.0, step=0.5, patience=1)
drawn = {"sparsity": 0.5}, {"sparsity": 0.75}


@pytest.mark.parametrize(
    ("make", "before", "after"),
    [
        (SET, *drawn),
        (RigL, *drawn),
        (PruningAtInit, *drawn),
        (ticket, *drawn),
        (guarded, *drawn),
        (SET, {"sparsity": 0.5, "scope": "erk"}, {"sparsity": 0.5, "scope": "local"}),
        (ticket, {"sparsity": 0.5, "rounds": 2}, {"sparsity": 0.5, "rounds": 3}),
        (guarded, {"sparsity": 0.5, "step": 0.5}, {"sparsity": 0.5, "step": 0.25}),
    ],
    ids=str,
)
def test_what_cannot_change_is_refused(
    make: Make, before: dict[str, Any], after: dict[str, Any], tmp_path: Path
) -> None:
    path, model = begun(make(**before), tmp_path), MLP(seed=1)
    name = next(name for name in after if after[name] != before[name])
    found = rf"must be those of the checkpoint.* got {name}={after[name]!r} \({before[name]!r} before\)"
    with pytest.raises(ValueError, match=found):
        fit(model, make(**after), ckpt_path=path, max_epochs=6)


def test_exchanges_of_the_past_are_not_made_up_for(tmp_path: Path) -> None:
    path = begun(RigL(0.5, frequency=2, end=12), tmp_path)
    again = RigL(0.5, frequency=2, end=10)
    masks = copy.deepcopy(torch.load(path, weights_only=True)["callbacks"][again.state_key]["masks"])
    with pytest.warns(UserWarning, match="resumes with end=10"):
        fit(MLP(), again, ckpt_path=path, max_epochs=5)
    assert torch.equal(again.state_dict()["masks"]["bits"], masks["bits"])


def test_the_same_arguments_are_no_change(tmp_path: Path) -> None:
    def make() -> Pruning:
        return Pruning(0.5, Own(), schedule=lambda progress: progress, start=2, end=20)

    path, callback = begun(make(), tmp_path), make()
    fit(MLP(), callback, ckpt_path=path, max_epochs=6)
    assert callback.reached


class Own(Criterion):
    """Has no text of its own, but an address."""

    def scores(self, units: Any) -> torch.Tensor:
        return units.mean(torch.square)


def test_arguments_outlive_a_test_between(tmp_path: Path) -> None:
    path, callback = begun(MagnitudePruning(0.5, **steps), tmp_path), MagnitudePruning(0.75, **steps)
    callback.load_state_dict(torch.load(path, weights_only=True)["callbacks"][callback.state_key])
    assert callback.state_dict()["arguments"]["sparsity"] == "0.5"


def test_a_checkpoint_without_arguments_goes_on(tmp_path: Path) -> None:
    path, callback = begun(MagnitudePruning(0.5, start=2, end=20), tmp_path), MagnitudePruning(0.5, start=2, end=20)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["callbacks"][callback.state_key]["arguments"]
    torch.save(checkpoint, path)
    fit(MLP(), callback, ckpt_path=path, max_epochs=6)
    assert callback.reached


OBSERVING: tuple[tuple[Criterion, Granularity], ...] = (
    (Sensitivity(window=6), Channel()),
    (Sensitivity(window=6), Weight()),
    (Sensitivity(window=4), Weight()),
    (Sensitivity(window=6), InputChannel()),
    (Sensitivity(window=6), Block(2, 2)),
    (Movement(window=6), Weight()),
    (Entropy(window=6), Channel()),
    (APoZ(window=6), Channel()),
    (Wanda(window=6), Weight()),
)


WHEN: dict[str, Any] = {"start": 14, "end": 14, "schedule": "one_shot"}


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A checkpoint of each in the middle of its window. Nothing is pruned so far: their weights are the same."""
    folders = [tmp_path_factory.mktemp("observed") for _ in OBSERVING]
    return [begun(Pruning(0.5, *axes, **WHEN), folder) for axes, folder in zip(OBSERVING, folders, strict=True)]


def resumed(path: str, axes: tuple[Criterion, Granularity]) -> dict[str, torch.Tensor]:
    model, callback = MLP(), Pruning(0.5, *axes, **WHEN)
    with pytest.warns(UserWarning, match="planned again, and the statistics of the checkpoint are dropped"):
        fit(model, callback, ckpt_path=path, max_epochs=5, limit_val_batches=0)
    assert callback.reached
    return dict(callback.masks)


@pytest.mark.parametrize("second", OBSERVING, ids=lambda axes: f"{axes[0]}, {type(axes[1]).__name__}")
def test_what_another_criterion_has_observed_is_dropped(
    second: tuple[Criterion, Granularity], observed: list[str]
) -> None:
    """The checkpoint is in the middle of a window; the update comes when a whole one has been observed."""
    turn = OBSERVING.index(second)
    others = [(OBSERVING[(turn + far) % len(OBSERVING)], observed[(turn + far) % len(OBSERVING)]) for far in (1, 2, 4)]
    expected = resumed(without_statistics(others[0][1]), second)
    for first, path in others:
        found = resumed(path, second)
        assert all(torch.equal(found[name], mask) for name, mask in expected.items()), first


def without_statistics(path: str) -> str:
    checkpoint = torch.load(path, weights_only=True)
    (state,) = checkpoint["callbacks"].values()
    assert state["observed"]["statistics"]
    state["observed"] = {"steps": 0, "seen": [], "statistics": {}}
    torch.save(checkpoint, other := f"{path}-without")
    return other
