"""When masks change, that they hold in between, and that nothing else changes."""

import copy
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, callbacks
from lightning.pytorch.callbacks import ModelCheckpoint
from models import MLP, ConvNet, MaskRecorder, On, Tiny, TwoOptimizers, agrees, fit, size, weights, zeros

from lightning_prune import (
    Channel,
    Criterion,
    Entropy,
    EntropyPruning,
    Granularity,
    Magnitude,
    MagnitudePruning,
    Pruning,
    RandomPruning,
    Sensitivity,
    SensitivityPruning,
    Weight,
)


def stairs(progress: float) -> float:
    """A quarter at the start, so that the first update shows."""
    return 0.25 + 0.75 * progress


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------------------------------------- the result


@pytest.mark.parametrize("window", [7, 30])
def test_a_window_that_is_never_full_is_named(window: int) -> None:
    pruning = Pruning(0.5, Sensitivity(window=window), Channel(), schedule="one_shot", start=4)
    if window == 7:  # the update waits until it is full
        fit(MLP(), pruning, max_epochs=3)
        assert pruning.reached
        return
    with pytest.warns(UserWarning, match=r"ended at a sparsity of 0.00%: the window of 30 steps was not full: choose"):
        fit(MLP(), pruning, max_epochs=3)


@pytest.mark.parametrize("model", [MLP, ConvNet])
@pytest.mark.parametrize("sparsity", [0.9, 0.5, 0.123])
def test_an_unmodified_module_ends_with_exactly_the_sparsity_in_its_weights_only(
    model: type[Tiny], sparsity: float
) -> None:
    pruned, dense = model(), model()
    fit(pruned, MagnitudePruning(sparsity))
    fit(dense)

    assert zeros(pruned) == round(sparsity * size(pruned))
    for (name, parameter), reference in zip(pruned.named_parameters(), dense.parameters(), strict=True):
        if parameter.ndim < 2:
            assert int((parameter == 0).sum()) == int((reference == 0).sum()), f"{name} was pruned"
    assert list(pruned.state_dict()) == list(dense.state_dict())
    model(seed=1).load_state_dict(pruned.state_dict(), strict=True)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "lbfgs"])
def test_sparsity_zero_is_bit_for_bit_the_run_without_the_callback(optimizer: str) -> None:
    pruned, dense = ConvNet(optimizer=optimizer), ConvNet(optimizer=optimizer)
    fit(pruned, MagnitudePruning(0.0, start=0, end=1.0, frequency=1))
    fit(dense)
    assert same(pruned.state_dict(), dense.state_dict())


@pytest.mark.parametrize("strategy", [MagnitudePruning, RandomPruning, EntropyPruning, SensitivityPruning])
@pytest.mark.parametrize(
    "when",
    [
        {"schedule": "one_shot", "start": 3},
        {"schedule": "cubic", "start": 2, "end": 7, "frequency": 1},
        {"schedule": "one_shot", "start": 0},
    ],
    ids=["one_shot", "gradual", "pretrained_from_step_0"],
)
def test_every_strategy_works_one_shot_gradually_and_on_a_pretrained_model(
    strategy: type[Pruning], when: dict[str, Any]
) -> None:
    model = MLP()
    if when["start"] == 0:
        fit(model)
    window = {"window": 1} if strategy in (EntropyPruning, SensitivityPruning) else {}
    callback = strategy(0.5, **window, **when)
    fit(model, callback)
    if strategy is MagnitudePruning:
        assert zeros(model) == round(0.5 * 158)
    else:
        dead = {name: int((~weight.any(1)).sum()) for name, weight in weights(model).items()}
        assert dead == {"net.0.weight": 4, "net.4.weight": 5, "net.6.weight": 0}  # none of the outputs
        assert not model.net[0].bias[~model.net[0].weight.any(1)].any()


def test_a_pretrained_model_is_pruned_before_its_first_batch() -> None:
    model = MLP()
    fit(model)
    pretrained = torch.cat([weight.flatten() for weight in weights(model).values()])
    callback = MagnitudePruning(0.9, schedule="one_shot", start=0)
    recorder = MaskRecorder(callback)
    fit(model, callback, recorder)

    first = torch.cat([mask.flatten() for mask in recorder.masks[0].values()])
    assert int((~first).sum()) == round(0.9 * 158)
    assert pretrained[first].abs().min() > pretrained[~first].abs().max()
    assert same(recorder.masks[0], recorder.masks[-1])


def test_frozen_and_ignored_weights_stay_dense() -> None:
    model = MLP()
    model.net[0].requires_grad_(False)
    frozen = model.net[0].weight.clone()
    callback = MagnitudePruning(0.5, ignore=("net.6.*",))
    fit(model, callback)
    assert callback.masks.keys() == {"net.4.weight"}
    assert zeros(model) == round(0.5 * 80)
    assert torch.equal(model.net[0].weight, frozen)


# ---------------------------------------------------------------------------------------------------- positions

EPOCH = {"interval": "epoch"}
SHORT_EPOCHS = {"max_epochs": 4, "limit_train_batches": 2}


@pytest.mark.parametrize(
    ("arguments", "trainer", "updates"),
    [
        # of two epochs of four batches; {batch before which the masks change: progress through the window}
        ({"start": 2, "end": 5, "frequency": 1}, {}, {2: 0, 3: 1 / 3, 4: 2 / 3, 5: 1}),
        ({"start": 2, "end": 5}, {}, {2: 0, 3: 1 / 3, 4: 2 / 3, 5: 1}),
        ({"start": 2, "end": 7, "frequency": 2}, {}, {2: 0, 4: 0.4, 6: 0.8, 7: 1}),
        ({"start": 1, "end": 7, "frequency": 10}, {}, {1: 0, 7: 1}),
        ({"start": 0, "end": 3, "frequency": 1}, {}, {0: 0, 1: 1 / 3, 2: 2 / 3, 3: 1}),
        ({"start": 3, "end": 8, "frequency": 4}, {}, {3: 0, 7: 0.8, 8: 1}),
        ({"start": 3, "end": 3}, {}, {3: 1}),
        ({"start": 0.25, "end": 0.75, "frequency": 2}, {}, {2: 0, 4: 0.5, 6: 1}),
        ({"start": 0.25, "end": 4, "frequency": 1}, {}, {2: 0, 3: 0.5, 4: 1}),
        ({"start": 2, "end": 0.5, "frequency": 1}, {}, {2: 0, 3: 0.5, 4: 1}),
        ({"start": 0.0, "end": 1.0, "frequency": 4}, {}, {0: 0, 4: 0.5, 8: 1}),
        ({"start": 3, "end": 6, "schedule": "one_shot"}, {}, {3: 1}),
        ({"start": 0.5, "schedule": "one_shot"}, {}, {4: 1}),
        ({"start": 0, "schedule": "one_shot"}, {}, {0: 1}),
        # an end means nothing to it, least of all one that nobody gave
        ({"start": 7, "schedule": "one_shot"}, {}, {7: 1}),
        ({"start": 0.875, "schedule": "one_shot"}, {}, {7: 1}),
        ({"start": 0.5, "end": 1.0, "frequency": 1}, {"max_steps": 6}, {3: 0, 4: 1 / 3, 5: 2 / 3, 6: 1}),
        ({"start": 1, "end": 3}, {"accumulate_grad_batches": 2}, {2: 0, 4: 0.5, 6: 1}),
        # the rest of an epoch is a step too: steps end with batches 2, 3, 6, 7
        ({"start": 1, "end": 3}, {"accumulate_grad_batches": 3}, {3: 0, 4: 0.5, 7: 1}),
        ({**EPOCH, "start": 1, "end": 3, "frequency": 1}, SHORT_EPOCHS, {2: 0, 4: 0.5, 6: 1}),
        ({**EPOCH, "start": 0, "end": 3, "frequency": 2}, SHORT_EPOCHS, {0: 0, 4: 2 / 3, 6: 1}),
        ({**EPOCH, "start": 1, "end": 3, "frequency": 5}, SHORT_EPOCHS, {2: 0, 6: 1}),
        ({**EPOCH, "start": 0.25, "end": 0.75}, SHORT_EPOCHS, {2: 0, 4: 0.5, 6: 1}),
        ({**EPOCH, "start": 2, "schedule": "one_shot"}, SHORT_EPOCHS, {4: 1}),
        ({**EPOCH, "start": 1, "end": 2}, {**SHORT_EPOCHS, "accumulate_grad_batches": 2}, {2: 0, 4: 1}),
    ],
)
def test_masks_change_at_exactly_these_batches_to_exactly_these_counts(
    arguments: dict[str, Any], trainer: dict[str, Any], updates: dict[int, float]
) -> None:
    callback = MagnitudePruning(0.8, **{"schedule": stairs, **arguments})
    recorder = MaskRecorder(callback)
    model = MLP()
    fit(model, callback, recorder, **trainer)

    assert recorder.changes == list(updates)
    for batch, progress in updates.items():
        due = 1.0 if callback.schedule == "one_shot" else stairs(progress)
        assert recorder.counts[batch] == round(0.8 * due * size(model))
    assert zeros(model) == round(0.8 * size(model))


def test_steps_of_manual_optimization_with_two_optimizers_are_batches() -> None:
    callback = MagnitudePruning(0.8, schedule=stairs, start=2, end=6, frequency=2)
    recorder = MaskRecorder(callback)
    model = TwoOptimizers()
    fit(model, callback, recorder)
    assert recorder.changes == [2, 4, 6]
    assert zeros(model) == round(0.8 * size(model))


@pytest.mark.parametrize(
    ("schedule", "levels"),
    [
        # at 0, 1/4, 1/2, 3/4 and 1 of the window
        ("one_shot", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.25, 0.5, 0.75, 1.0]),
        ("cubic", [0.0, 37 / 64, 7 / 8, 63 / 64, 1.0]),
        ("cosine", [0.0, 0.1464466, 0.5, 0.8535534, 1.0]),
        ("exponential", [0.0, 0.7183353, 0.9241418, 0.9831064, 1.0]),  # (1 - exp(-5 p)) / (1 - exp(-5))
        (lambda progress: progress**2, [0.0, 1 / 16, 1 / 4, 9 / 16, 1.0]),
    ],
)
def test_each_schedule_reaches_its_levels(schedule: str | Callable[[float], float], levels: list[float]) -> None:
    callback = MagnitudePruning(0.8, schedule=schedule, start=2, end=6, frequency=1)
    recorder = MaskRecorder(callback)
    fit(MLP(), callback, recorder)
    assert recorder.counts[:2] == [0, 0]
    assert recorder.counts[2:7] == [round(0.8 * level * 158) for level in levels]
    assert recorder.counts[7:] == [round(0.8 * 158)] * 2


@pytest.mark.parametrize("frequency", [1, 2, 3, 4, 5, 6, 7, 100])
def test_the_last_update_hits_the_target_whatever_the_frequency(frequency: int) -> None:
    model = MLP()
    callback = MagnitudePruning(0.77, start=1, end=7, frequency=frequency)
    fit(model, callback)
    assert zeros(model) == round(0.77 * size(model))
    assert callback.sparsity_now == zeros(model) / size(model)


# ---------------------------------------------------------------------------------------------------- threshold


def before_and_after(callback: Pruning) -> tuple[list[Any], On, On]:
    """Callbacks that copy weights before, and masks after, each occasion to update, for the two sides of it."""
    seen: list[Any] = []
    before = On(
        on_train_start=lambda t, model: seen.append(weights(model)),
        on_train_batch_end=lambda t, model, *a: seen.append(weights(model)),
    )

    def keep(*args: Any) -> None:
        seen.append((seen.pop(), {name: mask.clone() for name, mask in callback.masks.items()}))

    return seen, before, On(on_train_start=keep, on_train_batch_end=keep)


def test_a_threshold_zeroes_exactly_the_weights_below_it() -> None:
    model = MLP()
    with torch.no_grad():  # representable numbers, so that "equal to the threshold" is really equal
        model.net[4].weight.view(-1)[:4] = torch.tensor([0.125, -0.125, 0.1249, -0.1249])
    callback = MagnitudePruning(threshold=0.125, schedule="one_shot", start=0)
    seen, before, after = before_and_after(callback)
    fit(model, before, callback, after)

    dense, masks = seen[0]
    assert masks["net.4.weight"].view(-1)[:4].tolist() == [True, True, False, False]
    assert same(masks, {name: weight.abs() >= 0.125 for name, weight in dense.items()})
    assert same(masks, {name: weight != 0 for name, weight in weights(model).items()})


def test_a_threshold_is_taken_of_the_weights_at_the_moment_of_the_update() -> None:
    model = MLP()
    callback = MagnitudePruning(threshold=0.2, schedule="one_shot", start=5)
    seen, before, after = before_and_after(callback)
    fit(model, before, callback, after)

    trained, masks = seen[5]  # after five batches
    assert same(masks, {name: weight.abs() >= 0.2 for name, weight in trained.items()})
    assert not same(masks, {name: weight.abs() >= 0.2 for name, weight in seen[0][0].items()})
    assert all(mask.all() for mask in seen[4][1].values())


def test_a_gradual_threshold_prunes_the_share_that_is_due_of_what_scores_below_it() -> None:
    model = MLP()
    callback = MagnitudePruning(threshold=0.2, schedule=stairs, start=1, end=7, frequency=3)
    seen, before, after = before_and_after(callback)
    fit(model, before, callback, after)

    for step, due in ((1, stairs(0)), (4, stairs(0.5)), (7, 1.0)):
        trained, masks = seen[step]
        below = sum(int((weight.abs() < 0.2).sum()) for weight in trained.values())
        assert sum(int((~mask).sum()) for mask in masks.values()) == round(due * below)
    trained, masks = seen[7]
    assert same(masks, {name: weight.abs() >= 0.2 for name, weight in trained.items()})


# ---------------------------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize(
    ("build", "trainer"),
    [
        (lambda: ConvNet(optimizer="sgd"), {}),
        (lambda: ConvNet(optimizer="adam"), {}),
        (lambda: ConvNet(optimizer="adam"), {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}),
        (lambda: ConvNet(optimizer="lbfgs"), {}),
        (TwoOptimizers, {}),
    ],
    ids=["sgd", "adam", "accumulate_clip", "lbfgs", "two_optimizers"],
)
@pytest.mark.parametrize("granularity", [Weight(), Channel()], ids=["weight", "channel"])
def test_no_forward_validation_or_checkpoint_sees_a_pruned_weight(
    build: Callable[[], LightningModule], trainer: dict[str, Any], granularity: Granularity, tmp_path: Path
) -> None:
    model = build()
    callback = Pruning(0.6, granularity=granularity, start=0.2, end=0.8, frequency=1)
    looks: dict[str, list[bool]] = {"forward": [], "validation": [], "save": []}
    for module in model.modules():
        module.register_forward_pre_hook(lambda *a: looks["forward"].append(agrees(model, callback.masks)))

    def save(trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        looks["save"].append(all(not checkpoint["state_dict"][n][~m].any() for n, m in callback.masks.items()))

    watch = On(
        on_validation_start=lambda *a: looks["validation"].append(agrees(model, callback.masks)),
        on_save_checkpoint=save,
    )
    saving = On(on_train_batch_end=lambda trainer, *a: trainer.save_checkpoint(tmp_path / "last.ckpt"))
    fit(model, callback, watch, saving, val_check_interval=2, **trainer)

    assert all(len(found) > 3 and all(found) for found in looks.values()), looks
    assert callback.sparsity_now > 0.3


@pytest.mark.parametrize(
    ("saving", "trainer"),
    [
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, {}),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": False}, {}),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, {"val_check_interval": 2}),
        ({"save_on_train_epoch_end": False}, {"val_check_interval": 2}),
        ({"save_last": True, "monitor": "val_loss", "save_top_k": 2}, {}),
        ({"every_n_train_steps": 1}, {"val_check_interval": 1}),
    ],
)
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.filterwarnings("ignore:ModelCheckpoint may take the model for the best")
def test_masks_do_not_change_between_a_validation_and_the_save_after_it(
    saving: dict[str, Any], trainer: dict[str, Any], interval: str, tmp_path: Path
) -> None:
    callback = MagnitudePruning(
        0.8, schedule="linear", start=0, end=1.0 if interval == "step" else 3, interval=interval
    )
    pairs, validated = [], []

    def note(*args: Any) -> list[dict[str, torch.Tensor]]:
        return [{name: mask.clone() for name, mask in callback.masks.items()}]

    watch = On(
        on_validation_end=lambda *a: validated.extend(note()),
        # as soon as an optimizer has stepped, a save belongs to no validation any more
        on_train_batch_end=lambda *a: validated.clear(),
        on_save_checkpoint=lambda *a: pairs.extend((masks, note()[0]) for masks in validated[-1:]),
    )
    checkpoint = ModelCheckpoint(tmp_path, **{"save_top_k": -1, **saving})
    fit(MLP(), callback, watch, checkpoint, enable_checkpointing=True, max_epochs=4, **trainer)

    assert all(same(*pair) for pair in pairs)
    if "every_n_train_steps" not in saving:  # those are saved in front of the validation
        assert len(pairs) >= 4
        assert not same(pairs[0][0], pairs[-1][0])


def test_gradients_of_pruned_weights_do_not_count_in_a_norm() -> None:
    callback = MagnitudePruning(0.8, start=0, schedule="one_shot")
    seen = []
    watch = On(
        on_before_optimizer_step=lambda trainer, model, optimizer: seen.append(
            all(not p.grad[~callback.masks[n]].any() for n, p in model.named_parameters() if n in callback.masks)
        )
    )
    fit(MLP(), callback, watch, gradient_clip_val=1.0)
    assert len(seen) == 8
    assert all(seen)


def test_averaged_copies_are_pruned_too() -> None:
    from torch.optim.swa_utils import get_ema_avg_fn

    WeightAveraging = getattr(callbacks, "WeightAveraging", None)  # noqa: N806
    if WeightAveraging is None:
        pytest.skip("Lightning has it from 2.6 on")
    model = MLP()
    averaging = WeightAveraging(avg_fn=get_ema_avg_fn(0.9))
    validated = []
    callback = MagnitudePruning(0.8, start=2, end=6, frequency=1)
    watch = On(on_validation_start=lambda *a: validated.append(agrees(model, callback.masks)))
    fit(model, callback, averaging, watch)
    assert validated == [True, True]
    assert zeros(model) == round(0.8 * size(model))


# ---------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    "criterion", [Entropy(bins=8, window=3), Sensitivity(window=3)], ids=lambda criterion: type(criterion).__name__
)
@pytest.mark.parametrize(
    ("arguments", "batches"),
    [
        ({"start": 0, "schedule": "one_shot"}, [3]),
        ({"start": 1, "schedule": "one_shot"}, [3]),
        ({"start": 3, "schedule": "one_shot"}, [3]),
        ({"start": 5, "schedule": "one_shot"}, [5]),
        ({"start": 0, "end": 6, "frequency": 1}, [3, 6]),
        ({"start": 0, "end": 5, "frequency": 1}, [3, 6]),
        ({"start": 3, "end": 7, "frequency": 4}, [3, 7]),
        ({"start": 1, "schedule": "one_shot", "interval": "epoch"}, [4]),
        ({"start": 0, "schedule": "one_shot", "interval": "epoch"}, [3]),
    ],
)
def test_an_update_waits_until_the_window_is_full(
    criterion: Criterion, arguments: dict[str, Any], batches: list[int]
) -> None:
    axes = {"criterion": criterion, "granularity": Channel(), "scope": "global", "targets": ["net.*"]}
    callback = Pruning(0.5, **axes, **{"schedule": stairs, **arguments})
    recorder = MaskRecorder(callback)
    model = MLP()
    fit(model, callback, recorder)
    assert recorder.changes == batches
    assert sum(int((~weight.any(1)).sum()) for weight in weights(model).values()) == round(0.5 * 21)


def everything(*callbacks: Pruning) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """What a user can see of a run: weights and buffers, generators, metrics."""
    torch.manual_seed(5)
    random.seed(5)
    model, metrics = ConvNet(dropout=0.3, optimizer="adam"), []

    def note(trainer: Any, *args: Any) -> None:
        visible = {**trainer.callback_metrics, **trainer.logged_metrics}
        metrics.append({name: float(value) for name, value in visible.items() if not name.startswith("pruning")})

    fit(model, *callbacks, On(on_train_batch_end=note, on_validation_end=note, on_train_epoch_end=note))
    return model.state_dict(), [metrics, torch.get_rng_state().tolist(), random.getstate(), torch.is_grad_enabled()]


@pytest.mark.parametrize("granularity", [Weight(), Channel()], ids=["weight", "channel"])
@pytest.mark.parametrize(
    "criterion",
    [Magnitude(), Entropy(window=2), Entropy(window=100), Sensitivity(window=2), Sensitivity(window=100)],
    ids=str,
)
def test_collecting_statistics_changes_nothing(criterion: Criterion, granularity: Granularity) -> None:
    # the windows of 100 steps never fill
    reference, seen = everything()
    arguments = {"criterion": criterion, "granularity": granularity, "frequency": 1}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Pruning ")  # pruned nothing at all, or ended before the last update
        found, seen_too = everything(Pruning(1e-6, start=0, end=0.5, **arguments))
        assert same(found, reference)
        assert seen_too == seen
        found, seen_too = everything(Pruning(0.9, start=9, end=20, **arguments))
        assert same(found, reference)
        assert seen_too == seen


def test_nothing_is_left_on_the_model_or_its_optimizer() -> None:
    model = ConvNet()
    callback = Pruning(0.5, criterion=Entropy(window=2), granularity=Channel(), start=0, end=0.5)
    trainer = fit(model, callback)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    pruned = ~callback.masks["net.3.weight"]
    assert pruned.any()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    [optimizer] = trainer.optimizers
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    optimizer.step()
    assert model.net[3].weight[pruned].all(), "the optimizer still applies masks"


def test_an_exception_leaves_masked_weights_and_no_hooks() -> None:
    def interrupt(trainer: Any, *args: Any) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("lights out")

    model = ConvNet()
    callback = Pruning(0.5, criterion=Entropy(window=2), granularity=Channel(), start=2, end=8, frequency=2)
    with pytest.raises(RuntimeError, match="lights out"):
        fit(model, callback, On(on_train_batch_start=interrupt))
    assert callback.sparsity_now > 0
    assert agrees(model, callback.masks)
    assert not any(module._forward_hooks for module in model.modules())


# ---------------------------------------------------------------------------------------------------- a second run


def test_a_second_fit_keeps_the_zeros() -> None:
    model = MLP()
    callback = MagnitudePruning(0.9)
    fit(model, callback)
    masks = {name: mask.clone() for name, mask in callback.masks.items()}
    before = weights(model)
    seen: list[bool] = []
    model.net.register_forward_pre_hook(lambda *a: seen.append(agrees(model, masks)))
    fit(model, callback)
    assert len(seen) > 8
    assert all(seen)
    assert same(callback.masks, masks)
    assert zeros(model) == round(0.9 * size(model))
    assert not same(weights(model), before)


def test_the_same_trainer_goes_on_with_the_zeros() -> None:
    model = MLP()
    callback = MagnitudePruning(0.9, start=1, end=6)
    trainer = fit(model, callback)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model)
    assert trainer.global_step == 16
    assert zeros(model) == round(0.9 * size(model))


@pytest.mark.parametrize("other", [MLP, ConvNet])
def test_on_another_model_the_callback_starts_anew(other: type[Tiny]) -> None:
    callback = MagnitudePruning(0.9, start=2, end=6, frequency=1)
    first = MLP()
    fit(first, callback)
    masks = {name: mask.clone() for name, mask in callback.masks.items()}
    second = other(seed=1)
    recorder = MaskRecorder(callback)
    fit(second, callback, recorder)
    assert recorder.counts[:3] == [0, 0, 0]
    assert recorder.changes == [3, 4, 5, 6]
    assert zeros(second) == round(0.9 * size(second))
    assert not same(callback.masks, masks)
    assert zeros(first) == round(0.9 * size(first))


def test_a_copy_of_the_callback_prunes_on_its_own() -> None:
    callback = MagnitudePruning(0.9, start=1, end=6)
    model = MLP()
    fit(model, callback)
    fresh = copy.deepcopy(callback)
    assert same(fresh.masks, callback.masks)
    fresh.masks["net.0.weight"].fill_(True)
    assert not callback.masks["net.0.weight"].all()
    pickled = pickle.dumps(callback)
    assert same(pickle.loads(pickled).masks, callback.masks)
    assert b"MLP" not in pickled, "the model went with it"


# ---------------------------------------------------------------------------------------------------- warnings


@pytest.mark.parametrize(
    ("arguments", "trainer", "last"),
    [
        ({"start": 2, "end": 9}, {}, "step 9"),
        ({"start": 20, "schedule": "one_shot"}, {}, "step 20"),
        ({"start": 0, "end": 7}, {"max_steps": 6}, "step 7"),
        ({"start": 0, "end": 2, "interval": "epoch"}, {}, "epoch 2"),  # epochs are counted from 0: the last is 1
    ],
)
def test_a_run_that_is_too_short_is_a_warning_before_training(
    arguments: dict[str, Any], trainer: dict[str, Any], last: str
) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        told: list[str] = []
        note = On(on_train_batch_start=lambda *a: told.extend(str(w.message) for w in found) if not told else None)
        fit(MLP(), MagnitudePruning(0.9, **arguments), note, **trainer)
    assert any("will not reach its target" in message and last in message for message in told), told


@pytest.mark.parametrize("arguments", [{"end": 8}, {"end": 1, "interval": "epoch"}], ids=["steps", "epochs"])
def test_a_run_that_is_long_enough_does_not_warn(arguments: dict[str, Any]) -> None:
    model = MLP()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit(model, MagnitudePruning(0.9, start=0, **arguments))
    assert not [warning for warning in found if "target" in str(warning.message)]
    assert zeros(model) == round(0.9 * size(model))


def test_a_run_that_ended_early_warns() -> None:
    def stop(trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.global_step == 4

    with pytest.warns(UserWarning, match="stopped before the last update, due at step 6"):
        fit(MLP(), MagnitudePruning(0.9, start=2, end=6), On(on_train_batch_end=stop))
