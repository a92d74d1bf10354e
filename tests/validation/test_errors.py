"""Every way to ask for the impossible is refused with a sentence that names the argument and the way out."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from models import MLP, On, fit, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune import (
    SRSTE,
    APoZ,
    Channel,
    ConstantSparsity,
    Criterion,
    Entropy,
    EntropyPruning,
    Granularity,
    MagnitudePruning,
    Pruning,
    PruningAtInit,
    RandomPruning,
    RigL,
    Sensitivity,
    SensitivityPruning,
    Wanda,
    Weight,
    prune,
    sparsity,
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
    refused(r"sparsity must map .* got 'net.0.\*', which matches none", MLP(), Pruning({"*": 0.5, "net.0.*": 0.9}))


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


def frozen() -> MLP:
    model = MLP()
    for layer in (model.net[0], model.net[4], model.net[6]):
        layer.requires_grad_(False)
    return model


def test_a_model_without_a_prunable_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must have a prunable parameter .* got none \(frozen: \['net.0.weight'"):
        prune(frozen(), 0.5)
    refused(r"must have a prunable parameter .* got none \(frozen: ", frozen(), PruningAtInit(0.5))


@pytest.mark.parametrize(
    "callback", [MagnitudePruning(0.5), RigL(0.5), SensitivityPruning(0.5, window=1, targets=["*"])]
)
def test_targets_that_are_all_frozen_may_be_trained_later(callback: Any) -> None:
    told = f"{type(callback).__name__} finds all its targets frozen: it prunes them once they are trained"
    thaw = On(on_train_epoch_start=lambda trainer, model: model.requires_grad_() if trainer.current_epoch else None)
    model = frozen()
    with pytest.warns(UserWarning, match=told):
        fit(model, thaw, callback, max_epochs=4)
    assert sparsity(model) == pytest.approx(callback.sparsity_now) == pytest.approx(0.5, abs=0.05)
    with pytest.warns(UserWarning, match=told), pytest.warns(UserWarning, match="pruned nothing: its targets were fro"):
        fit(frozen(), callback)


def test_zeros_of_frozen_layers_stay_when_they_are_trained_later() -> None:
    model = MLP()
    prune(model, 0.5)
    model.net[4].requires_grad_(False)
    fit(model, On(on_train_epoch_start=lambda *_: model.requires_grad_()), ConstantSparsity())
    assert sparsity(model) == pytest.approx(0.5, abs=0.01)


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
    ("criterion", "what"),
    [(Sensitivity(window=2), "gradient"), (Entropy(window=2), "forward pass"), (Wanda(window=2), "forward pass")],
)
def test_a_parameter_of_which_the_criterion_sees_nothing_is_left_out(criterion: Criterion, what: str) -> None:
    model, name = Idle(), type(criterion).__name__
    callback = Pruning(0.5, criterion=criterion, start=2, schedule="one_shot")
    with pytest.warns(UserWarning, match=rf"leaves out \['spare.weight'\], of which {name} has seen no {what} in 2"):
        fit(model, callback)
    assert model.spare.weight.all()
    assert "spare.weight" not in callback.masks
    assert f"left out: spare.weight: {name} has seen no {what} of it" in callback.explain()
    assert callback.sparsity_now == pytest.approx(0.5, abs=0.05)
    fit(Idle(), Pruning(0.5, criterion=criterion, ignore=("spare.*",), start=2, schedule="one_shot"))


def test_what_was_left_out_stays_so_when_a_run_is_resumed(tmp_path: Path) -> None:
    callback = Pruning(0.5, criterion=Wanda(window=2), start=2, schedule="one_shot")
    with pytest.warns(UserWarning, match=r"leaves out \['spare.weight'\]"):
        fit(Idle(), callback).save_checkpoint(tmp_path / "end.ckpt")
    again = Pruning(0.5, criterion=Wanda(window=2), start=2, schedule="one_shot")
    fit(Idle(), again, ckpt_path=str(tmp_path / "end.ckpt"), max_epochs=3)
    assert again.sparsity_now == callback.sparsity_now


class Mixed(MLP):
    """Attention and a recurrent layer between linear ones."""

    def build(self, dropout: float) -> nn.Sequential:
        attention = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
        return nn.Sequential(nn.Linear(6, 8), Sequence(attention), Sequence(nn.LSTM(8, 8)), nn.Linear(8, 3))


class WithOthers(MLP):
    """Beside the layers, a weight that must not be pruned, and a parameter of an unknown kind."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))
        self.table = nn.Parameter(torch.ones(3, 3))


class Sequence(nn.Module):
    """Takes every sample for a sequence of one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.layer(inputs[:, None])
        return (output[0] if isinstance(output, tuple) else output)[:, 0]


NEVER_CALLED = "net.1.layer.self_attn.out_proj.weight: its layer is never called"
ONLY_LINEAR = "must be a linear one, a convolution or the input projection of an attention, got LSTM"
ATTENTION = "in_proj_weight: its layer (MultiheadAttention) "
NO_CHANNELS = "does not output a channel for each of its rows"
GATES = "its rows are gates, several to a neuron"


@pytest.mark.parametrize(
    ("criterion", "granularity", "told"),
    [
        (Wanda(window=1), Weight(), [NEVER_CALLED, f"weight_ih_l0: its layer {ONLY_LINEAR}"]),
        (
            Entropy(window=1),
            Weight(),
            [NEVER_CALLED, ATTENTION + NO_CHANNELS],
        ),
        (APoZ(window=1), Weight(), [NEVER_CALLED, f"weight_hh_l0: its layer (LSTM) {NO_CHANNELS}"]),
        (Sensitivity(window=1), Channel(), [f"net.2.layer.weight_ih_l0: {GATES}", f"weight_hh_l0: {GATES}"]),
    ],
    ids=str,
)
def test_what_a_criterion_cannot_score_is_left_out_before_the_first_step(
    criterion: Criterion, granularity: Granularity, told: list[str]
) -> None:
    callback = Pruning(0.5, criterion=criterion, granularity=granularity)
    plans: list[str] = []
    fit(Mixed(), On(on_train_epoch_start=lambda *_: plans.append(callback.explain())), callback)
    assert all(re.search(f"left out: .*{re.escape(line)}", plans[0]) for line in told), plans[0]
    assert callback.sparsity_now == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("callback", "pruned"),
    [
        (PruningAtInit(0.5, criterion=Wanda()), "net.0.weight"),
        (SRSTE(2, 4, targets=("net.0.*", "own.*")), "net.0.weight"),
        (ConstantSparsity(), "net.0.weight"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_method_names_what_it_leaves_out(callback: Any, pruned: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(WithOthers(), callback)
    [plan] = [record.message for record in caplog.records if record.message.startswith(type(callback).__name__)]
    assert plan == callback.explain()
    assert re.search(rf"^  {pruned} ", plan, re.MULTILINE)
    assert "left out: own.parametrizations.weight.original1: weight_norm divides its rows" in plan
    unknown = "left out: table: it is not the weight of a known kind of layer"
    assert (unknown in plan) == (not callback.targets)


def test_pruning_at_init_says_what_its_criterion_cannot_score() -> None:
    callback = PruningAtInit(0.5, criterion=Wanda())
    plans: list[str] = []
    with pytest.warns(UserWarning, match="prune leaves out what Wanda cannot score"):
        fit(Mixed(), On(on_train_epoch_start=lambda *_: plans.append(callback.explain())), callback)
    assert f"{NEVER_CALLED}" in plans[0]
    assert plans[0].startswith("PruningAtInit to sparsity 0.5: ")


def test_a_criterion_that_can_score_no_target_is_refused() -> None:
    targets = ("*self_attn.out_proj.weight",)
    refused(
        f"criterion must be able to score a target, .*{NEVER_CALLED}", Mixed(), Pruning(0.5, Wanda(), targets=targets)
    )
    refused(
        "got none: the rows of .* are gates, several to a neuron",
        Mixed(),
        RandomPruning(0.5, targets=("*.weight_hh_l0",)),
    )


class Endless(IterableDataset):
    """Has no length."""

    def __iter__(self) -> Any:
        return iter(MLP().train_dataloader().dataset)


def test_a_loader_without_a_length_is_counted_in_epochs() -> None:
    class Streamed(MLP):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(Endless(), batch_size=8)

    refused(r"of an unlimited number of steps: count epochs with interval=\"epoch\"", Streamed(), MagnitudePruning(0.5))
    callback = MagnitudePruning(0.5, interval="epoch")
    fit(Streamed(), callback, max_epochs=4)
    assert callback.sparsity_now == pytest.approx(0.5, abs=0.01)


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
