"""Sensitivity analysis: the scores are those of pruning by hand, and the model comes back bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from models import MLP, QUIET, ConvNet, Tiny, fit, size, weights, zeros
from torch import Tensor, nn

from lightning_prune import (
    Channel,
    Entropy,
    MagnitudePruning,
    Random,
    Sensitivity,
    SensitivityAnalysis,
    prune,
    sensitivity,
)

LEVELS = (0.5, 0.9)


class Accurate(MLP):
    """Logs accuracy and loss."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())


def trained(kind: type[Tiny] = Accurate) -> Tiny:
    model = kind()
    fit(model, max_epochs=15, limit_val_batches=0)
    return model


def trainer() -> Trainer:
    return Trainer(**{**QUIET, "limit_val_batches": 1.0})


def accuracy(model: nn.Module, loader: Any) -> float:
    assert not model.training
    hits = [(model(inputs).argmax(1) == labels).float() for inputs, labels in loader]
    return float(torch.cat(hits).mean())


def bits(model: nn.Module) -> dict[str, Any]:
    """Return all that must come back: weights, buffers, gradients and modes."""
    found: dict[str, Any] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found |= {f"gradient of {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found | {f"mode of {name}": module.training for name, module in model.named_modules()}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value, name


# ------------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("kind", ["trainer", "loader"])
def test_scores_are_those_of_pruning_each_layer_by_hand(kind: str) -> None:
    model = trained()
    loader = model.val_dataloader()
    arguments = (trainer(), "val_acc") if kind == "trainer" else (loader, accuracy)
    found = sensitivity(model, *arguments, LEVELS, progress=False)
    dense = model.eval().state_dict()
    for name in weights(model):
        for level in LEVELS:
            other = Accurate().eval()
            other.load_state_dict(dense)
            prune(other, level, targets=[name])
            assert found.scores[name][level] == pytest.approx(accuracy(other, loader)), (name, level)
    assert found.dense == pytest.approx(accuracy(model, loader))
    assert found.scores.keys() == weights(model).keys()
    assert len({score for scores in found.scores.values() for score in scores.values()}) > 2, "nothing was pruned"


@pytest.mark.parametrize(
    ("criterion", "granularity"),
    [(Random(3), Channel()), (Entropy(window=2), Channel()), (Sensitivity(window=2), Channel())],
)
def test_any_criterion_and_granularity(criterion: Any, granularity: Any) -> None:
    model, loader = trained(ConvNet), ConvNet().val_dataloader()
    before = bits(model)
    axes = {"criterion": criterion, "granularity": Channel()}
    found = sensitivity(model, loader, accuracy, [0.5], **axes, ignore=["net.8.*"], progress=False)
    assert_same(bits(model), before)
    for name in ("net.0.weight", "net.3.weight"):
        other = ConvNet()
        other.load_state_dict(model.state_dict())
        prune(other, 0.5, targets=[name], data=loader, **axes)
        assert found.scores[name][0.5] == pytest.approx(accuracy(other.eval(), loader))


def test_a_criterion_that_observes_gets_samples_beside_a_trainer() -> None:
    model = trained()
    with pytest.raises(ValueError, match="data must be given: Entropy needs forwards"):
        sensitivity(model, trainer(), "val_acc", criterion=Entropy(window=2), granularity=Channel(), progress=False)
    axes = {"criterion": Entropy(window=2), "granularity": Channel(), "samples": model.train_dataloader()}
    assert (
        sensitivity(model, trainer(), "val_acc", [0.5], **axes, progress=False).scores.keys() == weights(model).keys()
    )


def test_loaders_of_the_user_beside_a_trainer() -> None:
    class Without(Accurate):
        val_dataloader = None

    model = Without()
    loader = Accurate().val_dataloader()
    found = sensitivity(model, trainer(), "val_acc", [0.5], dataloaders=loader, progress=False)
    assert found.dense == pytest.approx(accuracy(model.eval(), loader))


# ------------------------------------------------------------------------------------------------ restored


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_model_comes_back_bit_for_bit(error: type[BaseException] | None) -> None:
    model = trained()
    model.net[0].eval()
    model(next(iter(model.train_dataloader()))[0]).sum().backward()
    before = bits(model)
    calls = []

    def metric(model: nn.Module, loader: Any) -> float:
        calls.append(zeros(model))
        model.train()  # a careless one, which changes the statistics of the norms
        model(torch.randn(8, 6))
        if error is not None and len(calls) == 4:
            raise error("stop")
        return 1.0

    if error is None:
        sensitivity(model, [], metric, LEVELS, progress=False)
        assert calls == [0, 24, 43, 40, 72, 15, 27]
    else:
        with pytest.raises(error, match="stop"):
            sensitivity(model, [], metric, LEVELS, progress=False)
        assert calls[-1] > 0
    assert_same(bits(model), before)


def test_a_trainer_leaves_the_model_as_it_was_too() -> None:
    model = trained()
    before = bits(model)
    sensitivity(model, trainer(), "val_loss", LEVELS, mode="min", progress=False)
    assert_same(bits(model), before)


# ------------------------------------------------------------------------------------------------ recommendation


def analysis(mode: Any = "max") -> SensitivityAnalysis:
    scores = {
        "a.weight": {0.5: 0.9, 0.7: 0.895, 0.9: 0.6},
        "b.weight": {0.5: 0.8, 0.7: 0.9, 0.9: 0.9},
        "c.weight": {0.9: 0.91, 0.7: float("nan"), 0.5: 0.93},
    }
    if mode == "min":
        scores = {name: {level: 1 - score for level, score in found.items()} for name, found in scores.items()}
    return SensitivityAnalysis("score", mode, 0.9 if mode == "max" else 0.1, scores)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_recommendation_is_the_highest_level_before_the_first_that_costs_more(mode: str) -> None:
    found = analysis(mode)
    assert found.recommend(0.01) == {"a.weight": 0.7, "b.weight": 0.0, "c.weight": 0.5}
    assert found.recommend(0.2) == {"a.weight": 0.7, "b.weight": 0.9, "c.weight": 0.5}
    assert found.recommend(0) == {"a.weight": 0.5, "b.weight": 0.0, "c.weight": 0.5}
    assert found.drop("a.weight", 0.9) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="max_drop must be at least 0, got -1"):
        found.recommend(-1)


def test_the_recommendation_goes_straight_into_pruning() -> None:
    model = trained()
    levels = sensitivity(model, trainer(), "val_acc", (0.25, 0.5, 0.75, 0.9), progress=False).recommend(0.03)
    assert levels.keys() == weights(model).keys()
    assert len(set(levels.values())) > 1, "the layers are alike: no test of a recommendation"
    fit(model, MagnitudePruning(levels, start=0, end=2))
    for name, weight in weights(model).items():
        assert int((weight == 0).sum()) == round(levels[name] * weight.numel())


def test_as_text_it_is_a_table() -> None:
    assert str(analysis()).splitlines() == [
        "score     dense      50%     70%     90%",
        "-" * 40,
        "a.weight  0.9000  0.9000  0.8950  0.6000",
        "b.weight  0.9000  0.8000  0.9000  0.9000",
        "c.weight  0.9000  0.9300     nan  0.9100",
    ]


# ------------------------------------------------------------------------------------------------ resumed


class Counted:
    """A metric that stops after some calls."""

    def __init__(self, calls: int) -> None:
        self.left = calls
        self.calls = 0

    def __call__(self, model: nn.Module, loader: Any) -> float:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.calls += 1
        return sum(float(weight.abs().sum()) for weight in weights(model).values())


def test_an_interrupted_analysis_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model, path = MLP(), tmp_path / "scores.json"
    whole = sensitivity(model, [], Counted(99), LEVELS, progress=False)
    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, [], Counted(4), LEVELS, path=path, progress=False)
    rest = Counted(99)
    assert sensitivity(model, [], rest, LEVELS, path=path, progress=False) == whole
    assert rest.calls == 3
    again = Counted(0)
    assert sensitivity(model, [], again, LEVELS, path=str(path), progress=False) == whole
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"levels": (0.5,)}, "levels"),
        ({"mode": "min"}, "mode"),
        ({"criterion": Random(4)}, "criterion"),
        ({"granularity": Channel()}, "granularity"),
        ({"ignore": ["net.0.*"]}, "layers"),
        ({"metric": accuracy}, "metric"),
        ({"model": MLP(seed=1)}, "weights"),
    ],
)
def test_scores_of_something_else_are_refused(change: dict[str, Any], differs: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    arguments = {"model": MLP(), "data": [], "metric": Counted(99), "levels": LEVELS, "path": path, "progress": False}
    sensitivity(**arguments)
    with pytest.raises(ValueError, match=rf"path must hold the scores of this analysis.*differs in \['{differs}'\]"):
        sensitivity(**{**arguments, **change})
    assert len(json.loads(path.read_text())["scores"]) == 7


# ------------------------------------------------------------------------------------------------ errors and progress


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": [90]}, r"levels must be numbers in \(0, 1\), got 90"),
        ({"levels": []}, r"levels must be numbers in \(0, 1\), at least one, got \[\]"),
        ({"mode": "best"}, 'mode must be "max" or "min", got \'best\''),
        (
            {"metric": "val_acc"},
            "metric must be a function of model and loader if no Trainer",
        ),
        ({"targets": ["nope"]}, "targets must match a parameter, got 'nope'"),
        ({"data": trainer(), "metric": accuracy}, "metric must be the name of a metric that the Trainer's validation"),
        (
            {"data": trainer(), "metric": "acc"},
            r"metric must be one that validation logs, got 'acc'; validation logs",
        ),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_pruned(arguments: dict[str, Any], message: str) -> None:
    model = MLP()
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        sensitivity(**{"model": model, "data": [], "metric": accuracy, "progress": False, **arguments})
    assert_same(bits(model), before)


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    sensitivity(MLP(), [], Counted(99), [0.5])
    shown = capsys.readouterr().err
    assert "sensitivity: 100%" in shown
    assert "4/4" in shown
    assert size(MLP()) == 158
