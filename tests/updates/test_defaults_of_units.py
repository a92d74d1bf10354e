"""What channels and heads get where nothing is given: a scope of their own, a floor, and no outputs of the model."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CASES, build
from lightning.pytorch import LightningModule
from models import MLP, Residual, fit
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune import (
    ACDC,
    Block,
    Channel,
    EntropyPruning,
    Granularity,
    GuardedPruning,
    Head,
    InputChannel,
    LotteryTicket,
    MagnitudePruning,
    Pruning,
    PruningAtInit,
    RandomPruning,
    SensitivityPruning,
    SNIPPruning,
    Weight,
    prune,
    shrink,
)
from lightning_prune.models.flops import dense_flops
from lightning_prune.models.outputs import output_weights
from lightning_prune.scopes import global_, local
from lightning_prune.updates.target_sparsity import SparsityTarget


def uneven() -> nn.Sequential:
    """Return a network of which the weights of one layer are far smaller than the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))
    with torch.no_grad():
        model[2].weight.mul_(1e-4)
    return model


def alive(model: nn.Sequential) -> list[int]:
    return [int(layer.weight.any(1).sum()) for layer in model if isinstance(layer, nn.Linear)]


# ------------------------------------------------------------------------------------------------ scope and floor


@pytest.mark.parametrize(
    ("granularity", "scope", "floor"),
    [
        (Weight(), "global", 0.0),
        (Block(2, 2), "global", 0.0),
        (Channel(), "local", 0.1),
        (InputChannel(), "local", 0.1),
        (Head(), "local", 0.1),
    ],
    ids=str,
)
def test_every_callback_takes_the_defaults_of_its_units(granularity: Granularity, scope: str, floor: float) -> None:
    for make in (Pruning, MagnitudePruning, RandomPruning, SensitivityPruning, SNIPPruning, PruningAtInit):
        callback = make(0.5, granularity=granularity)
        assert (callback.scope, callback.min_density) == (scope, floor)
    for make in (ACDC, LotteryTicket, partial(GuardedPruning, "val_loss", 0.1)):
        assert make(granularity=granularity, sparsity=0.5).scope == scope
    assert EntropyPruning(0.5).scope == "local"
    given = Pruning(0.5, granularity=granularity, scope="erk", min_density=0.2)
    assert (given.scope, given.min_density) == ("erk", 0.2)


def test_the_floor_leaves_half_of_what_the_sparsity_leaves_to_the_scope() -> None:
    floors = [SparsityTarget(s).for_granularity(Channel()).floor for s in (0.5, 0.8, 0.9, 0.98)]
    assert floors == pytest.approx([0.1, 0.1, 0.05, 0.01])
    assert SparsityTarget({"*": 0.5}).for_granularity(Channel()).floor == 0.0
    assert SparsityTarget(None, 0.5).for_granularity(Channel()).floor == 0.0


def test_prune_keeps_every_layer_and_a_raw_ranking_is_there_if_asked_for() -> None:
    model = uneven()
    prune(model, 0.5, granularity=Channel())
    assert alive(model) == [20, 20, 3]
    model = uneven()
    prune(model, 0.5, granularity=Channel(), scope="global")
    assert alive(model) == [36, 4, 3]
    model = uneven()
    with pytest.warns(UserWarning, match=r"prune leaves no unit of \['2.weight'\]"):
        prune(model, 0.5, granularity=Channel(), scope="global", min_density=0.0)
    assert alive(model) == [40, 0, 3]


def test_single_weights_are_ranked_together_as_before() -> None:
    model, other = uneven(), uneven()
    masks, wanted = prune(model, 0.5), prune(other, 0.5, scope="global", min_density=0.0)
    assert all(torch.equal(masks[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("of", ["parameters", "flops"])
@pytest.mark.parametrize("floor", [None, 0.15], ids=["default", "given"])
def test_the_floor_holds_for_parameters_and_flops(of: Any, floor: float | None) -> None:
    model, inputs = uneven(), torch.zeros(1, 6)
    prune(model, 0.8, granularity=Channel(True), scope="global", of=of, example_inputs=inputs, min_density=floor)
    assert alive(model)[1] == 40 * (0.1 if floor is None else floor)
    before, after = (sum(dense_flops(each, inputs).values()) for each in (uneven(), shrink(model, inputs)))
    assert of == "parameters" or after <= 0.2 * before


def test_a_floor_that_is_given_is_refused_where_the_goal_is_out_of_reach_and_the_default_gives_way() -> None:
    inputs = torch.zeros(1, 6)
    given: dict[str, Any] = {"granularity": Channel(True), "of": "flops", "example_inputs": inputs, "targets": ["2.*"]}
    with pytest.raises(ValueError, match=r"sparsity must be at most 0\.\d+ of the flops, .* with min_density=0.1"):
        prune(uneven(), 0.85, min_density=0.1, **given)
    model = uneven()
    with pytest.warns(UserWarning, match=r"prune leaves one unit of \['2.weight'\]"):
        prune(model, 0.85, **given)
    before, after = (sum(dense_flops(each, inputs).values()) for each in (uneven(), shrink(model, inputs)))
    assert after <= 0.15 * before
    deep = nn.Sequential(*[nn.Linear(2, 2) for _ in range(5)])
    prune(deep, 0.9, granularity=InputChannel())  # no room for one unit in each
    assert sum(int(layer.weight.any(0).sum()) for layer in deep) <= 5


def test_a_scope_that_prunes_layers_together_takes_no_more_than_is_due() -> None:
    model, inputs = build(CASES["vit"])
    dense = sum(parameter.numel() for parameter in model.parameters())
    masks = prune(model, 0.05, granularity=Head(), of="parameters", example_inputs=inputs)
    left = sum(parameter.numel() for parameter in shrink(model, inputs).parameters()) / dense
    assert masks
    assert 0.85 < left <= 0.95


# ------------------------------------------------------------------------------------------------ what is shown


def test_plan_and_representation_say_what_is_shared_out(caplog: pytest.LogCaptureFixture) -> None:
    callback = SensitivityPruning(0.5, window=1, start=1, end=4)
    assert repr(callback).startswith("SensitivityPruning(0.5, window=1, scope='local', ")
    with caplog.at_level("INFO", logger="lightning.pytorch.lightning_prune"):
        fit(MLP(), callback)
    assert "scope: local, at least 10% of the units of each parameter stay" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", logger="lightning.pytorch.lightning_prune"):
        fit(MLP(), MagnitudePruning(0.5, schedule="one_shot", start=1))
    assert "scope: global\n" in caplog.text


# ------------------------------------------------------------------------------------------------ a resumed run


@pytest.mark.parametrize("arguments", [None, {"scope": "'global'", "min_density": "0.0"}], ids=["none", "recorded"])
def test_a_run_of_an_earlier_version_goes_on_as_it_began(arguments: dict[str, str] | None, tmp_path: Path) -> None:
    def make(**given: Any) -> Pruning:
        return Pruning(0.6, granularity=Channel(), schedule="linear", start=0, end=4, frequency=2, **given)

    before = make(scope="global", min_density=0.0, targets=("net.*",))
    model = MLP()
    trainer = fit(model, before, max_epochs=1)
    state = before.state_dict()
    state["arguments"] = arguments and {**state["arguments"], **arguments}
    after = make(targets=("net.*",))
    after.load_state_dict(state)
    trainer.callbacks = [after]
    after.on_train_start(trainer, model)
    assert (after.scope, after.share_out, after.min_density, after.sparsity_target.floor) == (
        "global",
        global_,
        0.0,
        0.0,
    )
    chosen = make(targets=("net.*",), scope="local")
    chosen.load_state_dict(state)
    trainer.callbacks = [chosen]
    if arguments:
        with pytest.warns(UserWarning, match=r"resumes with scope='local' \('global' before\)"):
            chosen.on_train_start(trainer, model)
    else:
        chosen.on_train_start(trainer, model)
    assert chosen.share_out is local


# ------------------------------------------------------------------------------------------------ outputs


class TwoHeads(nn.Module):
    """Returns two outputs, one of them reshaped to the shape of an earlier tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)
        self.norm = nn.LayerNorm(3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x).relu()
        return {"one": self.norm(self.one(hidden)).view(hidden.size(0), -1), "two": self.two(hidden).softmax(-1)}


class Functional(nn.Module):
    """Has weights of its own, and adds two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.weight, self.skip = nn.Linear(6, 6), nn.Parameter(torch.ones(3, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.inner(x), self.weight) + self.skip(x)


class Branching(nn.Module):
    """Cannot be traced, since it looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) if x.sum() > 0 else self.first(-x))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Sigmoid()), {"1.weight"}),
        (TwoHeads(), {"one.weight", "two.weight"}),
        (Functional(), {"weight", "skip.weight"}),
        (MLP(), {"net.4.weight"}),
    ],
    ids=["sequential", "two", "functional", "module"],
)
def test_the_weights_of_the_last_layers_are_found(model: nn.Module, names: set[str]) -> None:
    named = dict(model.named_parameters())
    last = list(named)[-2:]
    wanted = names if not isinstance(model, MLP) else {name for name in last if "weight" in name}
    assert output_weights(model) == {named[name] for name in wanted}


def test_outputs_stay_unless_they_are_named() -> None:
    model = uneven()
    assert "4.weight" not in prune(model, 0.5, granularity=Channel())
    assert "4.weight" in prune(uneven(), 0.5, granularity=Channel(), targets=("*",))
    assert "4.weight" in prune(uneven(), {"*": 0.5}, granularity=Channel())
    assert "4.weight" in prune(uneven(), 0.5, granularity=InputChannel())
    assert "weight" in prune(nn.Linear(6, 4), 0.5, granularity=Channel())  # there is nothing else


class Gated(LightningModule):
    """A GRU, whose rows are gates, and a layer that makes the outputs: nothing has channels to prune."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.gru(inputs)[0][:, -1])

    def training_step(self, batch: Tensor) -> Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.randn(8, 3, 6), 4)


@pytest.mark.filterwarnings("ignore:channels are pruned without what depends on them")  # or would be
def test_outputs_are_not_pruned_for_want_of_other_units() -> None:
    told = r"targets must name \['head.weight'\] to prune the outputs of the model, since Channel\(.*\) finds no other"
    for inputs in (None, torch.zeros(2, 3, 6)):
        model = Gated()
        with pytest.raises(ValueError, match=told):
            prune(model, 0.5, granularity=Channel(), example_inputs=inputs)
        assert model.head.weight.all()
    model = Gated()
    with pytest.raises(ValueError, match=told):
        fit(model, RandomPruning(0.5), limit_val_batches=0)
    assert model.head.weight.all()


def test_what_prune_leaves_out_is_said_where_it_is_most(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.lightning_prune"):
        prune(uneven(), 0.5, granularity=Channel())
        assert not caplog.text
        net = nn.Sequential(Residual(8, 2), nn.Flatten(), nn.Linear(24, 4))
        prune(net, 0.5, granularity=Channel(coupled=True), example_inputs=torch.randn(2, 3, 8))
    assert "prune leaves out " in caplog.text
    assert "attention" in caplog.text


def test_a_run_leaves_outputs_out_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    callback = RandomPruning(0.5, schedule="one_shot", start=1)
    model = MLP()
    last = [name for name, parameter in model.named_parameters() if parameter.ndim == 2][-1]
    with caplog.at_level("INFO", logger="lightning.pytorch.lightning_prune"):
        fit(model, callback)
    assert last not in callback.masks
    assert f"left out: {last}: its neurons are outputs of the model" in caplog.text


def test_outputs_that_cannot_be_found_are_a_warning() -> None:
    with pytest.warns(UserWarning, match="prune: which layers make the outputs of the model is unknown"):
        prune(Branching(), 0.5, granularity=Channel())
