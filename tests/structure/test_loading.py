"""A shrunk model is loaded by its own class, in another process, from what it has kept."""

import copy
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CASES, Case, build
from damage import damaged, places, refusal
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.core import saving
from models import MLP, QUIET, Attention, ConvNet, fit
from torch import Tensor, nn

from lightning_prune import Channel, Head, Pruning, load_shrunk, prune, save_shrunk, shrink
from lightning_prune.structure.cut_record import cut_record_of

COUPLED = Channel(coupled=True)


class Named(LightningModule):
    """Saves all hyperparameters under the name of one argument, and more of its own in its checkpoints."""

    def __init__(self, conf: dict[str, int]) -> None:
        super().__init__()
        self.save_hyperparameters(conf)
        self.note = "none"
        self.net = nn.Sequential(nn.Linear(4, conf["width"]), nn.Tanh(), nn.Linear(conf["width"], 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Given(LightningModule):
    """Saves its hyperparameters when it is made."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Own(ConvNet):
    """Has hooks of its own."""

    note = "new"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["note"] = self.note

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.note = checkpoint["note"]


def saved(model: LightningModule, path: Path) -> Path:
    trainer = Trainer(**QUIET)
    trainer.strategy.connect(model)
    model.trainer = trainer
    trainer.save_checkpoint(path)
    return path


def shrunk(model: Any, inputs: Any, sparsity: float = 0.5) -> Any:
    prune(model, sparsity, granularity=COUPLED, scope="local", example_inputs=inputs)
    return shrink(model, inputs).eval()


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_kind_of_model_is_loaded_by_its_class(case: Case, tmp_path: Path) -> None:
    model, inputs = build(case)
    small = shrunk(model, inputs)
    save_shrunk(small, tmp_path / "small.pt")
    loaded = load_shrunk(case.model, tmp_path / "small.pt").eval()
    assert same(small, loaded)
    assert torch.equal(loaded(inputs), small(inputs))
    assert str(loaded) == str(small)
    assert load_shrunk(case.model, torch.load(tmp_path / "small.pt", weights_only=True)) is not None


def test_heads_are_loaded(tmp_path: Path) -> None:
    model, inputs = build(CASES["gpt"])
    prune(model, 0.5, granularity=Head(), example_inputs=inputs)
    small = shrink(model, inputs).eval()
    save_shrunk(small, tmp_path / "small.pt")
    loaded = load_shrunk(CASES["gpt"].model, tmp_path / "small.pt").eval()
    assert torch.equal(loaded(inputs), small(inputs))
    assert [layer.attention.n_head for layer in loaded.layers] == [layer.attention.n_head for layer in small.layers]


def test_without_this_package_the_checkpoint_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(shrunk(ConvNet(), torch.ones(2, 2, 6, 6)), tmp_path / "small.ckpt")
    if not hasattr(saving, "_ALLOWED_INSTANTIATORS"):
        pytest.skip("this Lightning allows any instantiator")
    monkeypatch.setattr(saving, "_ALLOWED_INSTANTIATORS", {"lightning.pytorch.cli.instantiate_module"})
    with pytest.raises(
        ValueError, match=r"instantiator 'lightning_prune.structure.checkpoints.instantiate' from the checkpoint"
    ):
        ConvNet.load_from_checkpoint(path)


def test_training_goes_on_from_the_checkpoint_of_a_shrunk_model(tmp_path: Path) -> None:
    callback = Pruning(0.5, granularity=Channel(), schedule="one_shot", start=1, shrink_at_end=True)
    model = ConvNet(optimizer="adam")
    trainer = fit(model, callback)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    loaded = ConvNet.load_from_checkpoint(tmp_path / "end.ckpt", optimizer="adam")
    assert same(loaded, model)
    callback = Pruning(0.5, granularity=Channel(), schedule="one_shot", start=1, shrink_at_end=True)
    again = fit(loaded, callback, max_epochs=3, ckpt_path=str(tmp_path / "end.ckpt"))
    assert again.global_step == 12
    assert [p.shape for p in loaded.parameters()] == [p.shape for p in model.parameters()]
    assert not same(loaded, model)
    second = saved(loaded, tmp_path / "second.ckpt")
    assert same(ConvNet.load_from_checkpoint(second), loaded)


def test_what_was_kept_of_a_model_that_was_shrunk_twice(tmp_path: Path) -> None:
    inputs = torch.ones(2, 2, 6, 6)
    once = shrunk(ConvNet(), inputs, 0.3)
    twice = shrunk(once, inputs, 0.3)
    assert twice.net[0].out_channels + twice.net[3].out_channels < once.net[0].out_channels + once.net[3].out_channels
    assert same(ConvNet.load_from_checkpoint(saved(twice, tmp_path / "twice.ckpt")), twice)
    kept = cut_record_of(twice)
    assert kept is not None
    assert kept.places["net.0.weight", 0].shape == (6,)
    original = ConvNet().net[0].weight[kept.places["net.0.weight", 0]]
    assert torch.equal(original, twice.net[0].weight)


def test_copies_and_pickles_save_what_they_are(tmp_path: Path) -> None:
    small = shrunk(ConvNet(), torch.ones(2, 2, 6, 6))
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        with torch.no_grad():
            other.net[0].weight.add_(1.0)
        loaded = ConvNet.load_from_checkpoint(saved(other, tmp_path / "other.ckpt"))
        assert same(loaded, other)
        assert not same(loaded, small)


def test_a_model_that_an_earlier_version_pickled_is_loaded() -> None:
    small = shrunk(ConvNet(), torch.ones(2, 2, 6, 6))
    pickled = pickle.dumps(small, protocol=0)
    moved = (("structure.cut_record\nCutRecord", "kept\nKept"), ("structure.checkpoints\n_save", "loading\n_save"))
    for now, then in moved:
        assert now.encode() in pickled
        pickled = pickled.replace(f"lightning_prune.{now}".encode(), f"lightning_prune.{then}".encode())
    record = cut_record_of(pickle.loads(pickled))
    assert record is not None
    assert list(record.places) == list(small._kept_channels.places)


@pytest.mark.parametrize("save", [saved, save_shrunk], ids=["Trainer", "save_shrunk"])
def test_a_lightning_module_is_loaded_by_its_class_from_both_kinds_of_files(save: Any, tmp_path: Path) -> None:
    small = shrunk(ConvNet(), torch.ones(2, 2, 6, 6))
    save(small, tmp_path / "small.ckpt")
    assert same(load_shrunk(ConvNet, tmp_path / "small.ckpt"), small)


def test_the_users_hooks_are_called(tmp_path: Path) -> None:
    small = shrunk(Own(), torch.ones(2, 2, 6, 6))
    small.note = "old"
    path = saved(small, tmp_path / "small.ckpt")
    loaded = Own.load_from_checkpoint(path)
    assert loaded.note == "old"
    assert same(loaded, small)
    assert "on_load_checkpoint" not in vars(loaded)


def test_a_model_of_the_command_line_is_loaded(tmp_path: Path) -> None:
    args = ["--model.width=10"]
    cli = LightningCLI(Given, args=args, run=False, save_config_callback=None, trainer_defaults=QUIET)
    assert cli.model.hparams["_instantiator"] == "lightning.pytorch.cli.instantiate_module"
    small = shrunk(cli.model, torch.ones(3, 4))
    path = saved(small, tmp_path / "small.ckpt")
    assert (
        torch.load(path)["hyper_parameters"]["_instantiator"]
        == "lightning_prune.structure.checkpoints.instantiate_from_cli"
    )
    loaded = Given.load_from_checkpoint(path)
    assert same(loaded, small)
    assert loaded.hparams["width"] == 10


def test_hyperparameters_in_one_argument_need_load_shrunk(tmp_path: Path) -> None:
    small = shrunk(Named({"width": 8}), torch.ones(3, 4))
    with pytest.warns(
        UserWarning, match=r"load this checkpoint of a shrunk model with load_shrunk\(Named\(...\), path\)"
    ):
        path = saved(small, tmp_path / "small.ckpt")
    assert same(load_shrunk(Named({"width": 8}), path), small)
    with pytest.raises(RuntimeError, match="size mismatch"):
        Named.load_from_checkpoint(path)


# ------------------------------------------------------------------------------------------------ what is refused


def test_a_model_that_is_another_one_stays_as_it_was(tmp_path: Path) -> None:
    small = shrunk(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(3, 4))
    save_shrunk(small, tmp_path / "small.pt")
    other = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2))
    before = copy.deepcopy(other)
    with pytest.raises(ValueError, match=r"must have 8 places in dimension 0 of '0.weight', .* got \(9, 4\)"):
        load_shrunk(other, tmp_path / "small.pt")
    with pytest.raises(ValueError, match=r"of '0.weight', .* got no tensor of that name"):
        load_shrunk(Attention(8, 2), tmp_path / "small.pt")
    assert same(other, before)
    with pytest.raises(ValueError, match=r"arguments must be given for a class only, got \['width'\]"):
        load_shrunk(other, tmp_path / "small.pt", width=3)


def test_a_damaged_checkpoint_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    small = shrunk(copy.deepcopy(model), torch.ones(3, 4))
    kept = cut_record_of(small)
    assert kept is not None
    whole = {"state_dict": dict(small.state_dict()), "lightning_prune": kept.state_dict()}
    before, chance, refused = copy.deepcopy(model), random.Random(0), 0
    for _ in range(150):
        path = chance.choice(list(places(whole)))
        error = refusal(load_shrunk, model, damaged(whole, path, chance))
        if error is None:  # what was changed is not needed
            model = copy.deepcopy(before)
            continue
        refused += 1
        assert same(model, before), (path, error)
        assert str(model) == str(before), (path, error)
        assert cut_record_of(model) is None
    assert refused > 100


def test_weights_that_do_not_fit_leave_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    small = shrunk(copy.deepcopy(model), torch.ones(3, 4))
    kept = cut_record_of(small)
    assert kept is not None
    state = {"state_dict": dict(small.state_dict(), **{"2.bias": torch.ones(5)}), "lightning_prune": kept.state_dict()}
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"(?s)checkpoint must fit a Sequential, got one that does not: .*2\.bias"):
        load_shrunk(model, state)
    assert same(model, before)
    assert str(model) == str(before)


def test_a_run_of_the_whole_model_from_a_checkpoint_of_a_shrunk_one_says_so(tmp_path: Path) -> None:
    first = Pruning(0.5, granularity=Channel(), scope="local", schedule="one_shot", start=1, shrink_at_end=True)
    path = tmp_path / "small.ckpt"
    fit(ConvNet(), first, max_epochs=1).save_checkpoint(path)
    with pytest.raises(RuntimeError, match=r"got one of a shrunk model: fit load_shrunk\(ConvNet, ckpt_path\)"):
        fit(ConvNet(), Pruning(0.5), ckpt_path=str(path), max_epochs=2)


def test_only_shrunk_models_are_saved_and_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model must have been shrunk, got a Linear"):
        save_shrunk(nn.Linear(2, 2), tmp_path / "no.pt")
    with pytest.raises(ValueError, match=r"must be one of a shrunk model, with \['lightning_prune'\]"):
        load_shrunk(nn.Linear(2, 2), {"state_dict": nn.Linear(2, 2).state_dict()})
    # files that are something else: a Trainer's of a whole model, text, a pickled model
    whole, text, pickled = (tmp_path / name for name in ("whole.ckpt", "text.ckpt", "pickled.ckpt"))
    trainer = fit(MLP(), max_epochs=1)
    trainer.save_checkpoint(whole)
    with pytest.raises(ValueError, match="it is of a whole model, which load_from_checkpoint or load_state_dict loads"):
        load_shrunk(MLP, whole)
    text.write_text("hello")
    with pytest.raises(ValueError, match=r"must be the file of a shrunk model, got '.*text.ckpt'"):
        load_shrunk(MLP, text)
    torch.save({"state_dict": {}, "model": nn.Linear(2, 2)}, pickled)
    with pytest.raises(ValueError, match="holds other objects, such as a pickled model: if you trust it"):
        load_shrunk(MLP, pickled)
    with pytest.raises(ValueError, match="the kept channels, must be of version 1"):
        load_shrunk(nn.Linear(2, 2), {"state_dict": {}, "lightning_prune": {"version": 2}})
