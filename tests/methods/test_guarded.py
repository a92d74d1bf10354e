"""Guarded pruning: the search by hand, through real runs, resumed after any step, and on two ranks."""

from pathlib import Path
from typing import Any

import distributed
import pytest
import torch
from distributed import Net
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from models import BATCHES, MLP, fit, size, zeros
from modes import Probe, Regression, StatefulLoader, leftovers, mlp
from ranks import run
from test_resume import Saver, bits, checkpoints, differences, savers
from torch import Tensor, nn

from lightning_prune import (
    Channel,
    Entropy,
    GuardedPruning,
    Magnitude,
    Sensitivity,
    SparseModelCheckpoint,
    prune,
    sparsity,
)
from lightning_prune.methods.sparsity_search import Search

LIMIT = 0.55


def score(model: nn.Module) -> float:
    """A metric that bears a sparsity up to the limit, and loses what is beyond it."""
    return 0.9 - max(0.0, sparsity(model) - LIMIT)


class Limited(MLP):
    """Logs that metric."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("score", score(self))


def levels(callback: GuardedPruning) -> list[tuple[float, bool]]:
    return [(level, held) for _, level, _, held in callback.trials]


# 158 weights: 0.55 is 87 of them, and 0.6 with a drop of 0.04 is the first that is too much
PATH = [(0.0, True), (0.2, True), (0.4, True), (0.6, False), (0.5, True), (0.55, True)]


# ------------------------------------------------------------------------------------------------ the search


def test_the_search_ends_at_the_sparsity_that_the_metric_bears() -> None:
    model, callback = Limited(), GuardedPruning("score", max_drop=0.01, patience=1, precision=0.05)
    trainer = fit(model, callback, max_epochs=50)
    assert levels(callback) == [*PATH]
    assert trainer.current_epoch == len(PATH)
    assert zeros(model) == round(0.55 * size(model))
    assert callback.sparsity_now == zeros(model) / size(model)
    assert callback.reached
    assert score(model) >= 0.9 - 0.01
    assert not leftovers(model, *trainer.optimizers)
    assert list(model.state_dict()) == list(MLP().state_dict())


def test_a_sparsity_that_is_not_borne_gets_time_and_the_best_is_validated_once_more() -> None:
    model, callback = Limited(), GuardedPruning("score", max_drop=0.0, patience=2, precision=0.1)
    fit(model, callback, max_epochs=50)
    assert levels(callback) == [
        *[(0.0, True), (0.2, True), (0.4, True), (0.6, False), (0.6, False), (0.5, True)],
        # 0.6 is known to be too much, and half the step is less than the precision: the last one was the best
    ]
    model, callback = Limited(), GuardedPruning("score", max_drop=0.0, patience=1, step=0.4, precision=0.3)
    fit(model, callback, max_epochs=50)
    assert levels(callback) == [(0.0, True), (0.4, True), (0.8, False), (0.4, True)]
    assert zeros(model) == round(0.4 * size(model))
    assert callback.reached


def test_every_verdict_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    callback = GuardedPruning("score", max_drop=0.0, patience=2, precision=0.1)
    with caplog.at_level("INFO"):
        fit(Limited(), callback, max_epochs=50)
    prefix, bound = "GuardedPruning: sparsity", "(bound: at least 0.9)"
    assert [record.message for record in caplog.records if record.message.startswith(prefix)] == [
        f"{prefix} 0.0%, score 0.9 is the reference {bound}: kept, 20.0% is next",
        f"{prefix} 20.0%, score 0.9 {bound}: kept, 40.0% is next",
        f"{prefix} 40.0%, score 0.9 {bound}: kept, 60.0% is next",
        f"{prefix} 60.0%, score 0.848734 {bound}: outside, it is trained further, 1 of 2 validations",
        f"{prefix} 60.0%, score 0.848734 {bound}: outside, back to 40.0%, 50.0% is next",
        f"{prefix} 50.0%, score 0.9 {bound}: kept, the search is over",
    ]


def test_names_that_end_with_loss_are_to_fall() -> None:
    assert GuardedPruning("valloss").mode == "min"
    assert GuardedPruning("val_nllloss").mode == "min"
    assert GuardedPruning("val_acc").mode == GuardedPruning("neg_loss").mode == "max"


def test_the_ceiling_is_tried_and_not_passed() -> None:
    model, callback = Limited(), GuardedPruning("score", max_drop=1.0, sparsity=0.7, step=0.4)
    fit(model, callback, max_epochs=50)
    assert levels(callback) == [(0.0, True), (0.4, True), (0.7, True)]
    assert zeros(model) == round(0.7 * size(model))


def test_less_can_be_better() -> None:
    class Loss(Limited):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("score", -score(self))

    callback = GuardedPruning("score", max_drop=0.01, mode="min", patience=1, precision=0.05)
    fit(Loss(), callback, max_epochs=50)
    assert levels(callback) == PATH


def test_a_reference_of_the_user_and_a_warmup() -> None:
    model = Limited()
    # what is given is more than the dense model reaches, so that nothing is pruned
    callback = GuardedPruning("score", reference=0.95, patience=1)
    with pytest.warns(
        UserWarning, match=r"ended without pruning anything: no sparsity held 'score' within 0.01 of 0.95"
    ):
        fit(model, callback, max_epochs=4)
    assert levels(callback) == [(0.0, False)] * 4
    assert zeros(model) == 0
    assert not callback.reached
    callback = GuardedPruning("score", reference=0.9, warmup=2, max_drop=0.2)
    fit(Limited(), callback, max_epochs=4)
    assert [(step, level) for step, level, _, _ in callback.trials] == [(12, 0.0), (16, 0.2)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_is_no_reference_and_never_within_the_bound(value: float) -> None:
    search = Search("max", 0.1, 0.9, 0.2, 0.1, 1)
    with pytest.raises(ValueError, match="the metric that is to be held must be finite, got"):
        search.judge(value)
    search.judge(0.5)
    assert search.judge(float("nan")) == "back"
    assert search.level == pytest.approx(0.1)


def test_a_bound_is_met_by_a_metric_at_the_bound() -> None:
    search = Search("max", 0.01, 0.9, 0.2, 0.1, 1, reference=0.9)
    assert search.holds(0.89)
    assert not search.holds(0.8899)


@pytest.mark.parametrize(("mode", "value"), [("max", float("inf")), ("min", -float("inf")), ("min", float("nan"))])
def test_a_metric_without_bounds_is_not_within_them(mode: Any, value: float) -> None:
    assert not Search(mode, 0.1, 0.9, 0.2, 0.1, 1, reference=0.5).holds(value)


def test_the_mode_follows_the_name() -> None:
    assert GuardedPruning("val_loss").mode == "min"
    assert GuardedPruning("valid/WordErrorRate").mode == "min"
    assert GuardedPruning("val_perplexity", mode="min").mode == "min"
    assert GuardedPruning("neg_loss").mode == GuardedPruning("val_acc").mode == GuardedPruning("score").mode == "max"
    with pytest.raises(ValueError, match="mode must be \"min\" for 'val_loss', by its name, got 'max'"):
        GuardedPruning("val_loss", mode="max")
    with pytest.raises(ValueError, match="mode must be \"max\" for 'val_acc', by its name, got 'min'"):
        GuardedPruning("val_acc", mode="min")


def test_a_loss_is_held_from_above() -> None:
    class Losing(MLP):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("val_loss", 1 - score(self))

    callback = GuardedPruning("val_loss", max_drop=0.01, patience=1, precision=0.05)
    fit(Losing(), callback, max_epochs=50)
    assert levels(callback) == PATH


@pytest.mark.filterwarnings("ignore:GuardedPruning ended without pruning")
def test_the_plan_says_what_the_search_does(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lightning.pytorch.lightning_prune"):
        fit(Limited(), GuardedPruning("score", patience=1, step=0.4, precision=0.3), max_epochs=1)
    [text] = [record.getMessage() for record in caplog.records if "GuardedPruning to" in record.getMessage()]
    assert "no updates planned" not in text
    assert text.splitlines()[-1] == (
        "search up to 99.0%, in steps of 40.0% down to 30.0%, each fine-tuned for up to 1 validation; "
        "reference of score (max): that of validation 1"
    )


class Learning(MLP):
    """Logs a metric that rises for four validations, whatever is pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = [0.2, 0.5, 0.7, 0.75, *[0.752] * 20]

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if batch_idx == 0:
            self.score = self.scores.pop(0)
        self.log("score", self.score - max(0.0, sparsity(self) - LIMIT))


@pytest.mark.filterwarnings("ignore:GuardedPruning ended without pruning")
def test_a_reference_of_a_model_in_training_is_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"holds 'score' against 0.2, that of a model in training: it has come to 0.5"):
        fit(Learning(), GuardedPruning("score"), max_epochs=3)
    fit(Learning(), GuardedPruning("score", warmup=3), max_epochs=6)


def test_the_search_waits_until_the_metric_has_settled(tmp_path: Path) -> None:
    def callback() -> GuardedPruning:
        return GuardedPruning("score", max_drop=0.01, patience=2, warmup="settled", step=0.4, precision=0.3)

    model, first = Learning(), callback()
    trainer = fit(model, Saver(tmp_path), first, max_epochs=20)
    assert first.trials[0] == (6 * BATCHES, 0.0, pytest.approx(0.752), True), "two after the last that was better"
    assert levels(first) == [(0.0, True), (0.4, True), (0.8, False), (0.8, False), (0.4, True)]
    other, again = Learning(), callback()
    other.scores = other.scores[4:]
    resumed = fit(other, again, max_epochs=20, ckpt_path=str(tmp_path / f"batch={4 * BATCHES + 1}.ckpt"))
    assert (again.trials, resumed.global_step) == (first.trials, trainer.global_step)


# ------------------------------------------------------------------------------------------------ going back


class Remembering(Limited):
    """Keeps what it had at each validation."""

    def __init__(self) -> None:
        super().__init__()
        self.had: list[dict[str, Tensor]] = []

    def on_validation_end(self) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        states = [entry["momentum_buffer"].clone() for entry in optimizer.state_dict()["state"].values()]
        tensors = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        self.had.append({**tensors, **{f"momentum {i}": state for i, state in enumerate(states)}})


@pytest.mark.parametrize("epochs", [4, 5])
def test_a_run_that_ends_in_a_trial_leaves_the_best_bit_for_bit(epochs: int) -> None:
    model, callback = Remembering(), GuardedPruning("score", patience=3, precision=0.05)
    trainer = fit(model, callback, max_epochs=epochs)
    assert levels(callback) == [*PATH[:3], *[(0.6, False)] * (epochs - 3)]
    assert zeros(model) == round(0.4 * size(model))
    states = trainer.optimizers[0].state_dict()["state"].values()
    left = dict(model.state_dict()) | {f"momentum {i}": entry["momentum_buffer"] for i, entry in enumerate(states)}
    assert not differences(left, model.had[2])
    assert differences(left, model.had[3])
    assert callback.reached
    assert callback.sparsity_now == zeros(model) / size(model)


def test_going_back_prunes_what_was_remembered() -> None:
    model, callback = Remembering(), GuardedPruning("score", patience=1, precision=0.05)
    fit(model, callback, max_epochs=5)
    assert levels(callback) == PATH[:5]
    best, straight = MLP(), MLP()
    for other, had in ((best, model.had[2]), (straight, model.had[3])):
        other.load_state_dict({name: had[name] for name in other.state_dict()})
    expected = prune(best, 0.5)
    assert not differences(callback.masks, expected)
    assert differences(callback.masks, prune(straight, 0.5)), "both ways lead to the same masks: no test"


def test_what_is_validated_is_what_is_saved(tmp_path: Path) -> None:
    model, callback = Limited(), GuardedPruning("score", max_drop=0.01, patience=1, precision=0.05)
    plain = ModelCheckpoint(tmp_path, "{epoch}-{score:.6f}", monitor="score", save_top_k=-1)
    best = SparseModelCheckpoint(tmp_path / "best", "{epoch}-{score:.6f}", monitor="score", save_top_k=-1)
    fit(model, callback, plain, best, max_epochs=50, enable_checkpointing=True)
    assert len(checkpoints(tmp_path)) == len(PATH)
    for path in checkpoints(tmp_path):
        saved = MLP()
        saved.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        assert f"score={score(saved):.6f}" in path.name
    [path] = checkpoints(tmp_path / "best")
    saved.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    assert not differences(dict(saved.state_dict()), dict(model.state_dict()))


def test_no_forward_pass_sees_a_pruned_weight() -> None:
    model, callback = Limited(), GuardedPruning("score", max_drop=0.01, patience=1, precision=0.05)
    with Probe(model, callback) as probe:
        fit(model, callback, max_epochs=50)
    assert not probe.dense
    assert len(probe.levels) > 4


def test_accuracy_is_held_on_a_task() -> None:
    class Classifier(MLP):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    model, callback = Classifier(), GuardedPruning("val_acc", max_drop=0.05, warmup=19, step=0.25, precision=0.1)
    trainer = fit(model, callback, max_epochs=60)
    [found] = trainer.validate(model, verbose=False)
    reference = callback.trials[0][2]
    assert reference > 0.9
    assert found["val_acc"] >= reference - 0.05
    assert sparsity(model) == callback.sparsity_now >= 0.25


# ------------------------------------------------------------------------------------------------ resumed


class Resumable(Regression):
    """Takes up its data where a checkpoint left them; validates twice an epoch where asked to."""

    def __init__(self) -> None:
        super().__init__(mlp())

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("score", score(self))

    def train_dataloader(self) -> StatefulLoader:
        return StatefulLoader(batches=4)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


AXES: dict[str, dict[str, Any]] = {
    "weights": {"criterion": Magnitude()},
    "gradients": {"criterion": Sensitivity(window=2), "granularity": Channel()},
    "forwards": {"criterion": Entropy(window=2), "granularity": Channel()},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
@pytest.mark.parametrize("often", [1.0, 0.5], ids=["epoch", "twice"])
@pytest.mark.parametrize("kind", AXES)
def test_a_run_resumes_exactly_after_any_step(kind: str, often: float, tmp_path: Path) -> None:
    def callback() -> GuardedPruning:
        return GuardedPruning("score", patience=1, precision=0.11, step=0.4, ignore=("net.5.*",), **AXES[kind])

    arguments: dict[str, Any] = {"max_epochs": 9, "val_check_interval": often}
    model, first = Resumable(), callback()
    trainer = fit(model, first, *savers(tmp_path), enable_checkpointing=True, **arguments)
    assert first.reached
    assert False in [held for _, _, _, held in first.trials], "never went back"
    expected = bits(trainer, model, first)
    # Lightning skips a validation that was due when a checkpoint was saved: those are saved after it
    due = {f"step={step}" for step in range(0, 99, round(4 * often))}
    paths = [path for path in checkpoints(tmp_path) if path.stem not in due]
    assert len(paths) > 8
    # by turns a third of them: validated once an epoch or twice, a run is resumed from each of its checkpoints
    for path in paths[(list(AXES).index(kind) + (often < 1)) % 3 :: 3]:
        other, again = Resumable(), callback()
        resumed = fit(other, again, ckpt_path=str(path), **arguments)
        assert not differences(bits(resumed, other, again), expected), path.name
        assert again.trials == first.trials, path.name
        assert (again.reached, again.sparsity_now) == (True, first.sparsity_now)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
def test_a_checkpoint_of_another_callback_resumes_exactly(tmp_path: Path) -> None:
    def callback() -> GuardedPruning:
        return GuardedPruning("score", patience=1, precision=0.11, step=0.4)

    model, first = Resumable(), callback()
    trainer = fit(model, Saver(tmp_path), first, max_epochs=9)
    expected = bits(trainer, model, first)
    for path in checkpoints(tmp_path):
        if int(path.stem.partition("=")[2]) % 4:  # not at the end of an epoch, before it is validated
            other, again = Resumable(), callback()
            assert not differences(bits(fit(other, again, ckpt_path=str(path), max_epochs=9), other, again), expected)


def test_a_damaged_state_changes_nothing() -> None:
    callback = GuardedPruning("score", patience=1, precision=0.05)
    fit(Limited(), callback, max_epochs=3)
    state, other = callback.state_dict(), GuardedPruning("score")
    for key in ("search", "best", "trials"):
        with pytest.raises(ValueError, match=f"the state of GuardedPruning must have .*{key}"):
            other.load_state_dict({name: value for name, value in state.items() if name != key})
    with pytest.raises(ValueError, match=r"the state of GuardedPruning must have .*waited"):
        other.load_state_dict({**state, "search": {}})
    assert other.trials == []
    other.load_state_dict(state)
    assert other.trials == callback.trials


# ------------------------------------------------------------------------------------------------ two ranks


class Disagreeing(Net):
    """Logs another value on each rank, of which one alone would decide otherwise."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("score", score(self) + (0.2 if distributed.rank() else -0.2) * (sparsity(self) > 0))


def searched() -> dict[str, Any]:
    model, callback = Disagreeing("ddp"), GuardedPruning("score", patience=1, precision=0.1)
    trainer = distributed.fit(model, callback, max_epochs=30, limit_val_batches=1)
    found = distributed.result(model, callback.masks)
    return {**found, "trials": callback.trials, "epochs": trainer.current_epoch, "sparsity": callback.sparsity_now}


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:It is recommended to use .self.log")
def test_two_ranks_decide_alike() -> None:
    one, other = run(searched, 2)
    assert [(level, held) for _, level, _, held in one["trials"]] == [*PATH[:4], (0.5, True)]
    assert one["trials"] == other["trials"]
    assert one["epochs"] == other["epochs"] == 5
    for kind in ("weights", "masks"):
        assert not differences(one[kind], other[kind])
    assert one["sparsity"] == round(0.5 * 75) / 75


def sharded() -> str:
    try:
        distributed.fit(Net("fsdp"), GuardedPruning("loss"), limit_val_batches=1)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_sharded_parameters_are_refused() -> None:
    for message in run(sharded, 2):
        assert message.startswith("parameters must be whole on every rank to be rewound, got shards of 'net.0.weight'")


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_drop": -0.1}, "max_drop must be at least 0, got -0.1"),
        ({"mode": "best"}, 'mode must be "max" or "min", got \'best\''),
        ({"sparsity": 90}, r"sparsity must be in \[0, 1\), got 90"),
        ({"step": 0}, r"step must be in \(0, 1\), got 0"),
        ({"precision": 1.0}, r"precision must be in \(0, 1\), got 1.0"),
        ({"patience": 0}, "patience must be at least 1 validation, got 0"),
        ({"warmup": -1}, "warmup must be at least 0 validations, got -1"),
        ({"scope": "nope"}, "scope must be one of"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuardedPruning("score", **arguments)


def test_a_run_without_validation_is_refused_before_it_begins() -> None:
    model = Limited()
    with pytest.raises(ValueError, match="validation must log 'score', got a run without validation"):
        fit(model, GuardedPruning("score"), limit_val_batches=0)
    assert model.trainer.global_step == 0


def test_a_metric_that_is_not_logged_is_refused_by_the_sanity_check() -> None:
    model = Limited()
    with pytest.raises(ValueError, match=r"monitor must be a metric that validation logs, got 'acc': \['score'\]"):
        fit(model, GuardedPruning("acc"), num_sanity_val_steps=1)
    assert model.trainer.global_step == 0


def test_validation_outside_of_a_fit_is_not_judged() -> None:
    model, callback = Limited(), GuardedPruning("other")
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=[callback]
    )
    trainer.validate(model, verbose=False)
    assert callback.trials == []
