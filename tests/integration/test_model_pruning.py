"""What Lightning's ModelPruning does, and this package in the same run: each row of the README's table, measured.

Where a test says what ModelPruning does, it fails when a new Lightning mends it: then the row goes.
"""

from pathlib import Path
from typing import Any

import distributed
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning, WeightAveraging
from models import MLP, On, fit, size, zeros
from ranks import run
from torch import Tensor

from lightning_prune import NM, MagnitudePruning, RandomPruning, Weight

LAYERS = (0, 4, 6)
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def theirs(amount: Any = 0.5, name: str = "l1_unstructured", only: MLP | None = None, **options: Any) -> ModelPruning:
    """Return their callback without the rewinding to initial values, which is on by default."""
    chosen = None if only is None else [(only.net[layer], "weight") for layer in LAYERS]
    return ModelPruning(name, amount=amount, parameters_to_prune=chosen, use_lottery_ticket_hypothesis=False, **options)


def at_start() -> MagnitudePruning:
    return MagnitudePruning(0.5, schedule="one_shot", start=0, interval="epoch")


def in_first_epoch(epoch: int) -> float:
    return 0.5 if epoch == 0 else 0.0


def share(model: MLP) -> float:
    return zeros(model) / size(model)


@pytest.mark.parametrize(("own", "expected"), [(False, 0.0), (True, 0.5)], ids=["ModelPruning", "lightning_prune"])
def test_a_resumed_run_keeps_its_masks(own: bool, expected: float, tmp_path: Path) -> None:
    model = MLP()
    callback: Callback = at_start() if own else theirs(in_first_epoch, only=model)
    fit(model, callback, ModelCheckpoint(tmp_path), max_epochs=1, enable_checkpointing=True)
    assert share(model) == pytest.approx(0.5, abs=0.001)
    (path,) = tmp_path.glob("*.ckpt")
    again = MLP()
    callback = at_start() if own else theirs(in_first_epoch, only=again)
    fit(again, callback, ckpt_path=str(path), max_epochs=2)
    assert share(again) == expected


def test_a_second_fit_keeps_the_zeros() -> None:
    model, pruned = MLP(), MLP()
    fit(model, theirs(in_first_epoch, only=model))
    fit(model, theirs(lambda epoch: 0.0, only=model))  # to fine-tune
    pruning = at_start()
    fit(pruned, pruning)
    fit(pruned, pruning)
    assert share(model) < 0.1  # what is left are weights of neurons that are never active
    assert share(pruned) == 0.5


def random_masks(own: bool) -> list[Tensor]:
    drawing = On(on_train_start=lambda *_: torch.rand(distributed.rank()))  # as one rank does for its own images
    model = distributed.build("ddp")
    pruning: Any
    if own:
        pruning = RandomPruning(0.5, granularity=Weight(), schedule="one_shot", start=0)
        distributed.fit(model, drawing, pruning)
        return list(pruning.masks.values())
    pairs = [(module, "weight") for module in model.net if isinstance(module, torch.nn.Linear)]
    pruning = ModelPruning(
        "random_unstructured", pairs, amount=0.5, use_lottery_ticket_hypothesis=False, make_pruning_permanent=False
    )
    distributed.fit(model, drawing, pruning)
    return [module.weight_mask.clone() for module, _ in pairs]


@pytest.mark.distributed
@pytest.mark.parametrize("own", [False, True], ids=["ModelPruning", "lightning_prune"])
def test_ranks_have_the_same_random_masks(own: bool) -> None:
    first, second = run(random_masks, 2, own)
    assert all(map(torch.equal, first, second)) == own


def test_averaged_weights_are_sparse() -> None:
    model, pruned = MLP(), MLP()
    with pytest.raises(RuntimeError, match="size of tensor"):  # it changes the order of the parameters
        fit(model, WeightAveraging(use_buffers=False), theirs(in_first_epoch, only=model), max_epochs=3)
    fit(pruned, WeightAveraging(use_buffers=False), at_start(), max_epochs=3)
    assert share(pruned) == 0.5


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_half_of_the_weights_stays_half(epochs: int) -> None:
    model, pruned = MLP(), MLP()
    fit(model, theirs(0.5, only=model), max_epochs=epochs)
    fit(pruned, MagnitudePruning(0.5, start=0, end=epochs - 1, interval="epoch"), max_epochs=epochs)
    assert share(model) == pytest.approx(1 - 0.5**epochs, abs=0.01)  # 50, 75 and 87.5 percent
    assert zeros(pruned) == 79  # of 158


@pytest.mark.parametrize(("own", "kept"), [(False, False), (True, True)], ids=["ModelPruning", "lightning_prune"])
def test_biases_and_norms_are_left_alone(own: bool, kept: bool) -> None:
    model = MLP()
    fit(model, MagnitudePruning(0.9) if own else theirs(0.9), max_epochs=1 + own)
    assert all(bool(p.all()) for p in model.parameters() if p.ndim == 1) == kept


def test_two_of_four() -> None:
    with pytest.raises(Exception, match="2:4"):
        theirs(name="2:4")
    model = MLP()
    fit(model, MagnitudePruning(0.5, granularity=NM(2, 4), targets=["net.4.*"]))
    assert ((model.net[4].weight != 0).unflatten(1, (-1, 4)).sum(2) == 2).all()
