"""ConstantSparsity: the zeros of a loaded model stay, everything else moves."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BATCHES, MLP, ConvNet, On, Tiny, agrees, fit, size, weights, zeros

from lightning_prune import Channel, ConstantSparsity, MagnitudePruning, Pruning, prune, sparsity


def pruned(model: type[Tiny] = MLP, **arguments: Any) -> Tiny:
    """A model that was pruned elsewhere and loaded: its zeros are all that is left of that."""
    source = model()
    prune(source, 0.6, scope="local")
    loaded = model(seed=1, **arguments)
    loaded.load_state_dict(source.state_dict())
    return loaded


@pytest.mark.parametrize("model", [MLP, ConvNet])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "lbfgs"])
def test_the_zeros_stay_and_the_others_move(model: type[Tiny], optimizer: str) -> None:
    loaded = pruned(model, optimizer=optimizer)
    before = weights(loaded)
    already = zeros(loaded)
    assert already == sum(round(0.6 * weight.numel()) for weight in before.values())
    callback = ConstantSparsity()
    zero_all_along: list[bool] = []
    loaded.net.register_forward_pre_hook(lambda *a: zero_all_along.append(agrees(loaded, callback.masks)))
    fit(loaded, callback)

    assert len(zero_all_along) > 8
    assert all(zero_all_along)
    moved = 0
    for name, weight in weights(loaded).items():
        assert torch.equal(weight != 0, before[name] != 0)
        moved += int((weight != before[name]).sum())
    assert moved > 0.8 * (size(loaded) - already)
    assert callback.sparsity_now == pytest.approx(already / size(loaded), abs=1e-12)


def test_without_it_the_zeros_are_lost_and_pruning_says_so() -> None:
    model = pruned()
    already = zeros(model)
    fit(model)
    assert zeros(model) < already / 2
    with pytest.warns(UserWarning, match=r"MagnitudePruning holds no masks, but 60\.\d% of its targets .* ConstantSpa"):
        fit(pruned(), MagnitudePruning(0.9))


def test_pruned_channels_keep_their_rows_but_biases_are_free() -> None:
    source = MLP()
    prune(source, 0.5, granularity=Channel())
    model = MLP(seed=1)
    model.load_state_dict(source.state_dict())
    callback = ConstantSparsity()
    fit(model, callback)
    assert callback.masks.keys() == weights(model).keys()
    assert all(torch.equal(weight != 0, weights(source)[name] != 0) for name, weight in weights(model).items())


def test_only_the_targets_are_held() -> None:
    model = pruned()
    callback = ConstantSparsity(targets=("net.*.weight",), ignore=("net.4.*",))
    fit(model, callback)
    assert callback.masks.keys() == {"net.0.weight", "net.6.weight"}
    assert callback.sparsity_now == sparsity(model, ignore=("net.4.*",)) == round(0.6 * 78) / 78
    assert sparsity(model, targets=("net.4.weight",)) < 0.4


def test_a_dense_model_trains_as_if_it_were_not_there() -> None:
    held, free = MLP(), MLP()
    callback = ConstantSparsity()
    fit(held, callback)
    fit(free)
    assert callback.sparsity_now == 0.0
    assert all(torch.equal(a, b) for a, b in zip(held.state_dict().values(), free.state_dict().values(), strict=True))


@pytest.mark.parametrize("batches", [4, 6], ids=["after_an_epoch", "inside_an_epoch"])
def test_a_resumed_run_keeps_the_zeros_and_goes_on_as_if_uninterrupted(batches: int, tmp_path: Path) -> None:
    straight, stopped = pruned(optimizer="adam"), pruned(optimizer="adam")
    fit(straight, ConstantSparsity(), max_epochs=3)
    path = tmp_path / "stopped.ckpt"
    saving = On(on_train_batch_end=lambda trainer, *a: trainer.save_checkpoint(path))
    fit(stopped, ConstantSparsity(), saving, max_steps=batches)

    # the fresh model has no zeros of its own: they come with the checkpoint
    resumed = MLP(seed=3, optimizer="adam")
    callback = ConstantSparsity()
    seen: list[bool] = []
    watch = On(on_train_batch_start=lambda *a: seen.append(agrees(resumed, callback.masks)))
    fit(resumed, callback, watch, max_epochs=3, ckpt_path=str(path))
    assert seen == [True] * (12 - batches)
    assert zeros(resumed) == zeros(pruned())
    if batches % BATCHES == 0:  # inside an epoch Lightning begins again with the first batch
        for (name, found), wanted in zip(weights(resumed).items(), weights(straight).values(), strict=True):
            assert torch.equal(found, wanted), name


def test_a_model_that_lost_entries_to_training_keeps_the_masks_of_the_checkpoint(tmp_path: Path) -> None:
    # weights that happen to be zero when training is resumed are not taken for pruned ones
    saved = pruned()
    path = tmp_path / "last.ckpt"
    saving = On(on_train_batch_end=lambda trainer, *a: trainer.save_checkpoint(path))
    fit(saved, ConstantSparsity(), saving, max_epochs=1)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["net.0.weight"].zero_()
    torch.save(checkpoint, path)

    model, callback = MLP(), ConstantSparsity()
    fit(model, callback, max_epochs=2, ckpt_path=str(path))
    assert zeros(model) == zeros(pruned())


def test_it_shares_a_model_with_a_pruning_callback_on_other_layers() -> None:
    model = pruned()
    model.net[4].reset_parameters()
    constant = ConstantSparsity(ignore=("net.4.*",))
    gradual = Pruning(0.5, targets=("net.4.*",), start=1, end=6, frequency=1)
    before = weights(model)
    fit(model, constant, gradual)
    assert sparsity(model, targets=("net.4.weight",)) == 0.5
    for name in ("net.0.weight", "net.6.weight"):
        assert torch.equal(weights(model)[name] != 0, before[name] != 0)


def test_a_second_fit_goes_on_with_the_same_masks() -> None:
    model, callback = pruned(), ConstantSparsity()
    fit(model, callback)
    first = weights(model)
    fit(model, callback)
    for old, new in pairwise([first, weights(model)]):
        assert all(torch.equal(old[name] != 0, new[name] != 0) for name in old)
        assert not all(torch.equal(old[name], new[name]) for name in old)
