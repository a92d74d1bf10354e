"""Every way to ask for the impossible is refused with a sentence that names the argument and the way out."""

import copy
import re
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from models import MLP, On, fit, weights
from torch import Tensor, nn

from lightning_prune import (
    Channel,
    ConstantSparsity,
    Criterion,
    Entropy,
    EntropyPruning,
    MagnitudePruning,
    Pruning,
    RandomPruning,
    Sensitivity,
    SensitivityPruning,
    prune,
)

# ------------------------------------------------------------------------------------------ when it is constructed


@pytest.mark.parametrize("strategy", [Pruning, MagnitudePruning, RandomPruning, EntropyPruning, SensitivityPruning])
@pytest.mark.parametrize("sparsity", [1.0, 1, 90, -0.1, float("nan"), float("inf"), True])
def test_a_sparsity_outside_0_to_1_is_refused(strategy: type[Pruning], sparsity: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"sparsity must be in [0, 1), got {sparsity}")):
        strategy(sparsity)


@pytest.mark.parametrize(
    ("sparsity", "told"), [(90, "90: did you mean 0.9?"), ("0.9", "the string '0.9': did you mean 0.9?")]
)
def test_a_percentage_and_a_number_in_quotes_are_recognised(sparsity: Any, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"sparsity must be in [0, 1), got {told}")):
        Pruning(sparsity)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": {"net.0.*": 1.5}}, "sparsity['net.0.*'] must be in [0, 1), got 1.5"),
        ({"sparsity": {}}, "sparsity must map at least one pattern to a fraction, got {}"),
        ({"sparsity": 0.5, "threshold": 0.1}, "either sparsity or threshold, got sparsity=0.5 and threshold=0.1"),
        ({}, "either sparsity or threshold, got sparsity=None and threshold=None"),
        ({"threshold": float("nan")}, "threshold must be"),
        ({"sparsity": 0.5, "start": 7, "end": 3}, "start must not lie after end, got start=7 and end=3"),
        ({"sparsity": 0.5, "start": 0.7, "end": 0.3}, "start must not lie after end, got start=0.7 and end=0.3"),
        ({"sparsity": 0.5, "start": 0.8}, "start must not lie after end, got start=0.8 and end=0.7"),
        ({"sparsity": 0.5, "start": -1}, "start must be an int of at least 0 or a float in [0, 1], got -1"),
        ({"sparsity": 0.5, "end": 1.5}, "end must be an int of at least 0 or a float in [0, 1], got 1.5"),
        ({"sparsity": 0.5, "end": float("nan")}, "end must be an int of at least 0 or a float in [0, 1], got nan"),
        ({"sparsity": 0.5, "frequency": 0}, "frequency must be at least 1 step, got 0"),
        ({"sparsity": 0.5, "interval": "batch"}, 'interval must be "step" or "epoch", got \'batch\''),
        (
            {"sparsity": 0.5, "schedule": "quadratic"},
            "schedule must be one of ['cosine', 'cubic', 'exponential', 'linear', 'one_shot'] or a callable, "
            "got 'quadratic'",
        ),
        (
            {"sparsity": 0.5, "schedule": lambda progress: progress / 2},
            "schedule must map [0, 1] into [0, 1] and 1 to 1, got 0.0 at 0 and 0.5 at 1",
        ),
        (
            {"sparsity": 0.5, "scope": "layer"},
            "scope must be one of ['erk', 'global', 'lamp', 'local'] or a callable, got 'layer'",
        ),
        ({"sparsity": 0.5, "targets": "net.*"}, "targets must be a sequence of patterns, got the string 'net.*'"),
        ({"sparsity": 0.5, "ignore": "net.*"}, "ignore must be a sequence of patterns, got the string 'net.*'"),
    ],
)
def test_arguments_are_checked_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        MagnitudePruning(**arguments)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EntropyPruning(0.5, prune="middle"), 'prune must be "high" or "low", got \'middle\''),
        (lambda: EntropyPruning(0.5, bins=1), "bins must be at least 2, got 1"),
        (lambda: EntropyPruning(0.5, window=0), "window must be at least 1, got 0"),
        (lambda: SensitivityPruning(0.5, window=0), "window must be at least 1, got 0"),
    ],
)
def test_arguments_of_criteria_are_checked_at_once(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


# ------------------------------------------------------------------------------------------ when training starts


def refused(match: str, model: LightningModule, *callbacks: Any, **trainer: Any) -> None:
    """Fit, expect the error before the first batch, and see that nothing was pruned."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=match):
        fit(model, *callbacks, **trainer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (MagnitudePruning(0.5, targets=("net.0.wieght",)), r"targets must match .* got 'net.0.wieght'.*'net.0.weight'"),
        (MagnitudePruning(0.5, targets=("net.*", "nett.4.weight")), r"targets must match .*'nett.4.weight'.*'net.4.we"),
        (MagnitudePruning(0.5, ignore=("net.6.wei",)), r"ignore must match .* got 'net.6.wei'.*'net.6.weight'"),
        (MagnitudePruning(0.5, targets=("re:conv",)), r"targets must match .* got 're:conv'; close names: .*net\."),
        (MagnitudePruning({"net.5.*": 0.5}), r"must match .* got 'net.5.\*'; close names: .*net\."),
        (ConstantSparsity(targets=("head.*",)), r"targets must match .* got 'head.\*'; close names: .*net\."),
    ],
)
def test_a_pattern_that_matches_nothing_lists_close_names(callback: Any, message: str) -> None:
    refused(message, MLP(), callback)


def test_a_pattern_that_an_earlier_one_leaves_nothing_is_refused() -> None:
    refused(r"sparsity must map .* got 'net.0.\*', which matches nothing", MLP(), Pruning({"*": 0.5, "net.0.*": 0.9}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 7}, r"start must not lie after end, got start=7 and end=0.7, which are the steps 7 and 6 of 8"),
        ({"start": 0.5, "end": 3}, r"got start=0.5 and end=3, which are the steps 4 and 3 of 8"),
    ],
)
def test_a_start_after_the_end_in_mixed_units_is_refused_once_the_length_is_known(
    arguments: dict[str, Any], message: str
) -> None:
    refused(message, MLP(), MagnitudePruning(0.5, **arguments))


def test_fractions_of_an_endless_run_are_refused() -> None:
    stop = On(on_train_batch_start=lambda trainer, *a: pytest.fail("training began"))
    message = r"start must be an int where the length .* unknown, got the fraction 0.1"
    refused(message, MLP(), MagnitudePruning(0.5), stop, max_epochs=-1)


@pytest.mark.parametrize("callback", [MagnitudePruning(0.5), ConstantSparsity()], ids=["pruning", "constant"])
def test_a_model_without_a_prunable_parameter_is_refused(callback: Any) -> None:
    frozen = MLP()
    for layer in (frozen.net[0], frozen.net[4], frozen.net[6]):
        layer.requires_grad_(False)
    refused(r"must have a prunable parameter .* got none \(frozen: \['net.0.weight'", frozen, callback)


def test_ignoring_everything_is_refused() -> None:
    refused(r"must have a prunable parameter .* not by ignore\), got none", MLP(), Pruning(0.5, ignore=("*",)))


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_a_strategy_that_flattens_parameters_is_refused_with_the_way_out(name: str) -> None:
    strategy = type(name, (SingleDeviceStrategy,), {})("cpu")  # the real ones want a GPU, or a package
    message = f"got {name}, which flattens them: use ModelParallelStrategy with fully_shard"
    refused(message, MLP(), MagnitudePruning(0.5), strategy=strategy)


def test_the_real_fsdp_strategy_is_recognised() -> None:
    class Stub:
        strategy = FSDPStrategy()

    with pytest.raises(ValueError, match="got FSDPStrategy, which flattens them"):
        ConstantSparsity().setup(Stub(), MLP(), "fit")
    MagnitudePruning(0.5).setup(Stub(), MLP(), "test")  # a model that is only tested is not pruned


def test_two_callbacks_for_one_parameter_are_refused() -> None:
    first, second = MagnitudePruning(0.5), RandomPruning(0.5, targets=("net.4.*",))
    refused(r"disjoint targets, got \['net.4.weight'\]", MLP(), first, second)


# ------------------------------------------------------------------------------------------ when an update falls due


class Broken(Criterion):
    """Scores with one entry that is no number."""

    def __init__(self, value: float) -> None:
        self.value = value

    def scores(self, units: Any) -> Tensor:
        scores = units.mean(torch.abs)
        if units.name == "net.4.weight":
            scores = scores.clone()
            scores.view(-1)[3] = self.value
        return scores


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("arguments", [{}, {"granularity": Channel()}, {"scope": "local"}], ids=str)
def test_scores_that_are_not_finite_are_refused_with_the_name_of_the_parameter(
    value: float, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"scores must be finite, .*'net.4.weight'"):
        fit(MLP(), Pruning(0.5, criterion=Broken(value), **arguments))


@pytest.mark.parametrize("threshold", [None, 0.1])
def test_a_weight_that_is_nan_is_named(threshold: float | None) -> None:
    model = MLP()
    with torch.no_grad():
        model.net[6].weight[0, 0] = float("nan")
    callback = MagnitudePruning(None if threshold else 0.5, threshold=threshold, start=0, schedule="one_shot")
    with pytest.raises(ValueError, match=r"scores must be finite, .*'net.6.weight'"):
        fit(model, callback)


class Idle(MLP):
    """Has a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (Sensitivity(window=2), r"Sensitivity needs a gradient of 'spare.weight', got none in 2 steps: ignore"),
        (Entropy(window=2), r"Entropy needs a forward pass of 'spare.weight', got none in 2 steps: ignore"),
    ],
    ids=["gradient", "forward"],
)
def test_a_parameter_of_which_the_criterion_sees_nothing_is_named(criterion: Criterion, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(Idle(), Pruning(0.5, criterion=criterion, granularity=Channel(), start=2, schedule="one_shot"))
    fit(Idle(), Pruning(0.5, criterion=criterion, ignore=("spare.*",), start=2, schedule="one_shot"))


def test_a_module_that_puts_out_no_channels_is_named() -> None:
    class Odd(MLP):
        def build(self, dropout: float) -> nn.Sequential:
            return nn.Sequential(nn.LSTM(6, 8), Last(), nn.Linear(8, 3))

    class Last(nn.Module):
        def forward(self, output: tuple[Tensor, Any]) -> Tensor:
            return output[0]

    with pytest.raises(ValueError, match=r"module of 'net.0.weight_ih_l0' must put out .* each of its 32 rows"):
        fit(Odd(), EntropyPruning(0.5, window=1))


@pytest.mark.parametrize(
    "scope",
    [lambda scores, s: {}, lambda scores, s: dict.fromkeys(scores, -1), lambda scores, s: dict.fromkeys(scores, 10**6)],
    ids=["nothing", "negative", "too_many"],
)
def test_a_scope_that_allocates_what_is_not_there_is_refused(scope: Any) -> None:
    with pytest.raises(ValueError, match=r"scope must .* units.* of .*'net.0.weight'"):
        fit(MLP(), MagnitudePruning(0.5, scope=scope))


def test_a_schedule_that_leaves_its_range_is_refused_before_training() -> None:
    callback = Pruning(0.5, schedule=lambda progress: 1.0 if progress in (0, 1) else 1.5)
    refused("schedule must stay in .0, 1., got 1.5 at ", MLP(), callback)


def test_prune_refuses_what_the_callback_refuses() -> None:
    with pytest.raises(ValueError, match="scope must be one of"):
        prune(MLP(), 0.5, scope="layer")
    with pytest.raises(ValueError, match=r"data must be given: Sensitivity needs gradients"):
        prune(MLP(), 0.5, criterion=Sensitivity())
    assert all(weight.all() for weight in weights(MLP()).values())
