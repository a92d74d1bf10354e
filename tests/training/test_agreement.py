"""Whatever else changes the model in mid-run, masks and weights agree, and the sparsity is that of all targets."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from models import MLP, On, agrees, fit, size, weights, zeros
from torch import nn

from lightning_prune import ACDC, SET, SRSTE, Channel, ConstantSparsity, MagnitudePruning, Pruning, RigL, prune

GRADUAL: dict[str, Any] = {"schedule": "linear", "start": 0, "end": 8, "frequency": 1}


def at(steps: dict[int, Callable[[MLP], Any]]) -> On:
    """Call a function with the model before the batch of that number."""

    def start(trainer: Trainer, model: MLP, batch: Any, index: int) -> None:
        if trainer.global_step in steps:
            steps[trainer.global_step](model)

    return On(on_train_batch_start=start)


def freeze(model: MLP) -> None:
    model.net[4].weight.requires_grad_(False)


def unfreeze(model: MLP) -> None:
    model.net[4].weight.requires_grad_()


def assert_honest(model: nn.Module, callback: Any) -> None:
    assert agrees(model, callback.masks)
    # not the zeros of the model: weights that have just come back are zero, too
    pruned = sum(int((~callback.masks[name]).sum()) for name in weights(model) if name in callback.masks)
    assert callback.sparsity_now == pytest.approx(pruned / size(model))


# ------------------------------------------------------------------------------------------------ frozen layers


@pytest.mark.filterwarnings("ignore:.* made its last update while")
@pytest.mark.parametrize(
    "make",
    [
        partial(MagnitudePruning, 0.5, **GRADUAL),
        partial(Pruning, 0.5, granularity=Channel(coupled=False), targets=("*",), **GRADUAL),
        partial(RigL, 0.5, frequency=1, end=1.0),
        partial(SET, 0.5, frequency=1, end=1.0),
        partial(ACDC, 0.5, start=0, end=8, frequency=1),
    ],
    ids=lambda make: make.func.__name__,
)
@pytest.mark.parametrize("thaws", [4, 9])
def test_a_layer_that_is_frozen_during_updates_keeps_its_zeros(make: Callable[..., Any], thaws: int) -> None:
    model, callback = MLP(), make()
    held: list[int] = []

    def look(model: MLP) -> None:
        held.append(int((model.net[4].weight == 0).sum()))

    fit(model, callback, at({2: freeze, 3: look}), at({thaws: look}), at({thaws: unfreeze}), max_epochs=3)
    assert "net.4.weight" in callback.masks
    assert held[0] == held[1] or isinstance(callback, ACDC)  # whose decompressed phases take all masks off
    assert_honest(model, callback)


def test_a_goal_that_frozen_layers_do_not_take_part_in_is_named() -> None:
    model = MLP()
    with pytest.warns(UserWarning, match=r"MagnitudePruning made its last update while \['net.4.weight'\] was frozen"):
        fit(model, callback := MagnitudePruning(0.5, **GRADUAL), at({2: freeze}), max_epochs=3)
    assert 0.2 < callback.sparsity_now < 0.45
    assert_honest(model, callback)


# ------------------------------------------------------------------------------------------------ replaced layers


@pytest.mark.parametrize(
    "callback",
    [MagnitudePruning(0.5, schedule="one_shot", start=1), RigL(0.5, frequency=2), SRSTE(1, 2)],
    ids=lambda callback: type(callback).__name__,
)
def test_a_layer_that_is_replaced_is_held_from_the_next_epoch_on(callback: Any) -> None:
    model = MLP()

    def replace(model: MLP) -> None:
        model.net[4] = nn.Linear(8, 10)
        model.optimizers().optimizer.add_param_group({"params": list(model.net[4].parameters())})

    fit(model, callback, at({6: replace}), max_epochs=3)
    assert callback.sparsity_now == 0.5
    assert_honest(model, callback)


def test_a_layer_of_another_shape_loses_its_mask_and_says_so() -> None:
    model = MLP()

    def replace(model: MLP) -> None:
        model.net[6] = nn.Linear(10, 5)
        model.optimizers().optimizer.add_param_group({"params": list(model.net[6].parameters())})

    callback = MagnitudePruning(0.5, schedule="one_shot", start=1)
    with pytest.warns(UserWarning, match=r"drops the masks of \['net.6.weight'\]: the model has no parameter of that"):
        fit(model, callback, at({6: replace}), max_epochs=3)
    assert set(callback.masks) == {"net.0.weight", "net.4.weight"}
    assert_honest(model, callback)


def test_a_head_that_is_replaced_between_two_fits_starts_without_a_mask() -> None:
    model, callback = MLP(), MagnitudePruning(0.5, schedule="one_shot", start=1)
    fit(model, callback)
    model.net[6] = nn.Linear(10, 7)
    with pytest.warns(UserWarning, match="drops the masks of"):
        fit(model, callback)
    assert_honest(model, callback)


def test_a_model_that_was_cut_after_training_is_saved_with_the_masks_that_are_left(tmp_path: Any) -> None:
    model, callback = MLP(), MagnitudePruning(0.5, schedule="one_shot", start=1)
    trainer = fit(model, callback)
    model.net = model.net[:6]
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    [state] = torch.load(tmp_path / "cut.ckpt", weights_only=True)["callbacks"].values()
    resumed = MagnitudePruning(0.5, schedule="one_shot", start=1)
    resumed.load_state_dict(state)
    fit(model, resumed, max_epochs=1)
    assert set(resumed.masks) == {"net.0.weight", "net.4.weight"}
    assert_honest(model, resumed)


# ------------------------------------------------------------------------------------------------ foreign writes


def dense(model: nn.Module) -> None:
    model.load_state_dict(MLP(seed=5).state_dict())


FOUND = (
    r"MagnitudePruning found pruned weights that are not zero {}, in \['net.0.weight', 'net.4.weight', 'net.6.weight'\]"
)
ONE_SHOT: dict[str, Any] = {"schedule": "one_shot", "start": 1}


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_weights_that_are_written_when_training_ends_are_masked_again(first: bool) -> None:
    model, callback = MLP(), MagnitudePruning(0.5, **ONE_SHOT)
    other = On(on_train_end=lambda trainer, model: dense(model))
    with pytest.warns(UserWarning, match=FOUND.format("when training ended" if first else "after training")):
        fit(model, *([other, callback] if first else [callback, other]))
    assert zeros(model) == size(model) // 2
    assert_honest(model, callback)


def test_a_checkpoint_has_the_zeros_of_its_masks(tmp_path: Any) -> None:
    model, callback = MLP(), MagnitudePruning(0.5, **ONE_SHOT)
    trainer = fit(model, callback)
    dense(model)
    with pytest.warns(UserWarning, match=FOUND.format("when a checkpoint was saved")):
        trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert all(not saved[name][~mask].any() for name, mask in callback.masks.items())


def test_a_checkpoint_whose_weights_are_not_those_of_its_masks_is_noticed(tmp_path: Any) -> None:
    trainer = fit(MLP(), MagnitudePruning(0.5, **ONE_SHOT))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    torch.save({**checkpoint, "state_dict": MLP(seed=5).state_dict()}, tmp_path / "a.ckpt")
    model, callback = MLP(), MagnitudePruning(0.5, **ONE_SHOT)
    with pytest.warns(UserWarning, match=FOUND.format("in the checkpoint")):
        fit(model, callback, ckpt_path=str(tmp_path / "a.ckpt"), max_epochs=3)
    assert_honest(model, callback)


def test_weights_that_are_loaded_in_mid_run_are_masked_by_the_next_step() -> None:
    model, callback = MLP(), MagnitudePruning(0.5, **ONE_SHOT)
    fit(model, callback, at({5: dense}))
    assert_honest(model, callback)


def test_constant_zeros_are_checked_too() -> None:
    model = MLP()
    prune(model, 0.5)
    with pytest.warns(UserWarning, match="ConstantSparsity found pruned weights"):
        fit(model, callback := ConstantSparsity(), On(on_train_end=lambda trainer, model: dense(model)))
    assert_honest(model, callback)
