"""SET and RigL: as many zeros at every moment, and at each update the exchange that their papers describe."""

import copy
import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from models import MLP, ConvNet, MaskRecorder, On, agrees, fit, weights
from modes import BATCHES, SGD, Probe, Regression, mlp
from torch import Tensor, nn

from lightning_prune import (
    NM,
    SET,
    Channel,
    ConstantSparsity,
    Granularity,
    RigL,
    SharedFanIn,
    Weight,
    prune,
    scopes,
    sparsity,
)
from lightning_prune.methods.exchange import exchange
from lightning_prune.methods.rigl import Gradient
from lightning_prune.models.parameters import find
from lightning_prune.tensors.selection import Scores
from lightning_prune.units.finding import make_units

METHODS: tuple[type[SET], ...] = (SET, RigL)
SIZES = {"net.0.weight": 48, "net.4.weight": 80, "net.6.weight": 30}
STEPS = 8  # two epochs of four batches


class Recorder(MaskRecorder):
    """Copies masks, weights, gradients and optimizer state right before each step, and the masks after each batch."""

    def __init__(self, callback: SET) -> None:
        super().__init__(callback)
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.states: list[dict[str, dict[str, Tensor]]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: nn.Module, optimizer: Any) -> None:
        named = {name: p for name, p in pl_module.named_parameters() if name in SIZES}
        self.gradients.append({name: p.grad.clone() for name, p in named.items()})

    def on_train_batch_end(self, trainer: Trainer, pl_module: nn.Module, *args: Any) -> None:
        [optimizer] = trainer.optimizers
        named = {name: p for name, p in pl_module.named_parameters() if name in SIZES}
        self.weights.append({name: p.detach().clone() for name, p in named.items()})
        self.states.append({name: copy.deepcopy(optimizer.state[p]) for name, p in named.items()})


def record(callback: SET, optimizer: str = "sgd", **trainer_kwargs: Any) -> Recorder:
    # in front of the callback, to see gradients before they are masked; and behind it, to see what an update left
    recorder = Recorder(callback)
    first = On(on_before_optimizer_step=recorder.on_before_optimizer_step)
    last = On(on_train_batch_end=recorder.on_train_batch_end)
    start = On(on_train_batch_start=lambda *args: recorder.record(), on_train_end=lambda *args: recorder.record())
    fit(MLP(optimizer=optimizer), start, first, callback, last, limit_val_batches=0, **trainer_kwargs)
    assert len(recorder.masks) == STEPS + 1
    return recorder


def changes(recorder: MaskRecorder) -> list[int]:
    """The steps after which the masks changed."""
    steps = enumerate(pairwise(recorder.masks), 1)
    return [step for step, (old, new) in steps if any(not torch.equal(old[name], new[name]) for name in old)]


@pytest.mark.parametrize("scope", ["erk", "local"])
@pytest.mark.parametrize("method", METHODS)
def test_every_layer_has_as_many_zeros_at_every_moment(method: type[SET], scope: str) -> None:
    callback = method(0.6, scope=scope, frequency=1)
    recorder = record(callback)
    shares = scopes.resolve(scope)(Scores.of(weights(MLP())), 0.6)
    for masks in recorder.masks:
        assert {name: int(mask.sum()) for name, mask in masks.items()} == shares
    for masks, found in zip(recorder.masks[1:], recorder.weights, strict=True):
        assert not any(found[name][~mask].any() for name, mask in masks.items())
    assert sum(SIZES.values()) - sum(shares.values()) == round(callback.sparsity_now * 158)
    assert callback.sparsity_now == pytest.approx(0.6, abs=1 / 158)


@pytest.mark.parametrize("method", METHODS)
def test_updates_fall_every_frequency_steps_and_stop_at_the_end(method: type[SET]) -> None:
    assert changes(record(method(0.6, frequency=2))) == [2, 4]  # the end is three quarters of eight steps
    assert changes(record(method(0.6, interval="epoch", end=1.0))) == [4]  # before the second of two epochs
    assert [at for at, _ in method(0.6, start=3, end=9, frequency=2).plan(3, 9)] == [3, 5, 7]


@pytest.mark.parametrize(
    ("interval", "window", "first", "updates"),
    [("step", 8, 1, 7), ("step", 300, 30, 9), ("step", 900, 50, 17), ("step", 20_000, 200, 99), ("epoch", 90, 1, 89)],
)
def test_without_a_frequency_new_weights_have_time_to_grow(
    interval: Any, window: int, first: int, updates: int
) -> None:
    plan = SET(0.6, interval=interval).plan(0, window)
    assert (plan[0][0], len(plan)) == (first, updates)


@pytest.mark.parametrize(
    ("decay", "left"),
    [
        ("constant", [1, 1, 1]),
        ("linear", [0.75, 0.5, 0.25]),
        ("cosine", [0.853553, 0.5, 0.146447]),
        (abs, [0.25, 0.5, 0.75]),
    ],
)
def test_the_fraction_exchanged_decays(decay: Any, left: list[float]) -> None:
    found = SET(0.5, drop_fraction=0.4, decay=decay, frequency=2).plan(0, 8)
    assert [position for position, _ in found] == [2, 4, 6]
    assert [fraction for _, fraction in found] == pytest.approx([0.4 * part for part in left], abs=1e-6)


@pytest.mark.parametrize("decay", ["constant", "cosine"])
@pytest.mark.parametrize("method", METHODS)
def test_the_smallest_go_and_as_many_grow_elsewhere(method: type[SET], decay: Any) -> None:
    callback = method(0.6, decay=decay, frequency=2, drop_fraction=0.4)
    recorder, amounts = record(callback), dict(callback.plan(0, 6))
    assert amounts.keys() == {2, 4}
    for step, amount in amounts.items():
        old, new = recorder.masks[step - 1], recorder.masks[step]
        for name in SIZES:
            dropped, grown = old[name] & ~new[name], new[name] & ~old[name]
            number = round(amount * int(old[name].sum()))
            assert int(dropped.sum()) == int(grown.sum()) == number > 0
            # magnitudes after the step, which the update follows: what was dropped is zero by now, so look at the rest
            assert not recorder.weights[step - 1][name][dropped].any()
            assert not recorder.weights[step - 1][name][grown].any()
            if method is RigL:
                gradient = recorder.gradients[step - 1][name].abs()
                assert gradient[grown].min() >= gradient[~old[name] & ~new[name]].max()


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": partial(torch.optim.AdamW, lr=0.01),
}


def by_hand(optimizer: str, masks: dict[str, Tensor], fractions: dict[int, float], accumulate: int) -> MLP:
    """Train with RigL as the paper has it, written with sort and index, and without anything of this package."""
    model = MLP(optimizer=optimizer)
    named = {name: p for name, p in model.named_parameters() if name in masks}
    stepping = OPTIMIZERS[optimizer](model.parameters())
    for name, p in named.items():
        p.data *= masks[name]
    model.train()
    batches = list(model.train_dataloader()) * 2 * accumulate
    for step in range(1, STEPS + 1):
        stepping.zero_grad()
        for batch in batches[(step - 1) * accumulate : step * accumulate]:
            (nn.functional.cross_entropy(model(batch[0]), batch[1]) / accumulate).backward()
        stepping.step()
        for name, p in named.items():
            p.data *= masks[name]
            if step in fractions:
                old = masks[name].flatten()
                number = round(fractions[step] * int(old.sum()))
                dropped = p.data.abs().flatten().masked_fill(~old, torch.inf).argsort()[:number]
                grown = p.grad.abs().flatten().masked_fill(old, -1.0).argsort(descending=True)[:number]
                masks[name] = old.clone().index_fill(0, dropped, False).index_fill(0, grown, True).view_as(p)
                p.data *= masks[name]
                for value in stepping.state[p].values():
                    if value.shape == p.shape:
                        value *= ~(masks[name] ^ old.view_as(p))
    return model


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rigl_is_the_loop_of_the_paper(optimizer: str, accumulate: int) -> None:
    callback, model, drawn = RigL(0.6, frequency=2), MLP(optimizer=optimizer), {}
    note = On(on_train_start=lambda *args: drawn.update(callback.masks))
    fit(model, callback, note, accumulate_grad_batches=accumulate, max_epochs=2 * accumulate, limit_val_batches=0)
    masks = dict(drawn)
    expected = by_hand(optimizer, masks, dict(callback.plan(0, 6)), accumulate)
    assert any(not torch.equal(masks[name], drawn[name]) for name in masks)
    for name, mask in masks.items():
        assert torch.equal(callback.masks[name], mask)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("trainer_kwargs", [{}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_exchanged_entries_have_fresh_optimizer_state(optimizer: str, trainer_kwargs: dict[str, Any]) -> None:
    recorder = record(RigL(0.6, frequency=2, drop_fraction=0.5), optimizer, **trainer_kwargs)
    keys = {"sgd": ["momentum_buffer"], "adam": ["exp_avg", "exp_avg_sq"]}[optimizer]
    for step in (2, 4):
        for name in SIZES:
            exchanged = recorder.masks[step - 1][name] ^ recorder.masks[step][name]
            stayed = recorder.masks[step - 1][name] & recorder.masks[step][name]
            for key in keys:
                value = recorder.states[step - 1][name][key]
                assert exchanged.any()
                assert not value[exchanged].any()
                assert value[stayed].count_nonzero() > 0.5 * stayed.sum()


@pytest.mark.parametrize("window", [1, 2])
def test_gradients_are_looked_at_right_before_an_update_only(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, observe = [], Gradient.observe
    callback = RigL(0.6, frequency=3, end=7, window=window)

    def spy(criterion: Gradient, units: Any, *args: Any) -> Tensor:
        seen.append((callback.state.steps + 1, units.name))
        return observe(criterion, units, *args)

    monkeypatch.setattr(Gradient, "observe", spy)
    record(callback)
    steps = [step for step, name in seen if name == "net.0.weight"]
    assert steps == [step for update in (3, 6) for step in range(update - window + 1, update + 1)]
    assert len(seen) == 3 * len(steps)


def test_the_gradients_of_a_window_are_summed_up() -> None:
    recorder = record(RigL(0.6, frequency=4, end=5, window=3))
    old, new = recorder.masks[3], recorder.masks[4]
    for name in SIZES:
        total = sum(recorder.gradients[step][name] for step in (1, 2, 3)).abs()
        grown = new[name] & ~old[name]
        assert grown.any()
        assert total[grown].min() >= total[~old[name] & ~new[name]].max()


class Overflow(Regression):
    """The loss of the second batch of an epoch is infinite, so that a gradient scaler skips its step."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch) * (torch.inf if batch_idx == 1 else 1.0)


@pytest.mark.parametrize("fused", [False, True])
def test_an_update_waits_for_a_gradient_that_is_finite(fused: bool) -> None:
    callback = RigL(0.6, frequency=2, end=BATCHES)
    recorder = MaskRecorder(callback)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    model = Overflow(mlp(), optimizer=partial(SGD, fused=fused))
    fit(
        model,
        callback,
        recorder,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        limit_val_batches=0,
        max_epochs=1,
    )
    changed = [
        step
        for step, (old, new) in enumerate(pairwise(recorder.masks), 1)
        if any(not torch.equal(old[name], new[name]) for name in old)
    ]
    assert changed == [3, 4]  # the one due after the second step is late, since that step was skipped
    assert all(weight.isfinite().all() for weight in weights(model).values())


def test_zeros_that_are_there_are_where_it_starts() -> None:
    model, callback = MLP(), SET(frequency=2)
    prune(model, {"net.0.*": 0.25, "net.4.*": 0.5})
    counts = {name: int((weight == 0).sum()) for name, weight in weights(model).items()}
    assert counts == {"net.0.weight": 12, "net.4.weight": 40, "net.6.weight": 0}
    recorder = MaskRecorder(callback)
    fit(model, callback, recorder, limit_val_batches=0)
    assert not torch.equal(recorder.masks[0]["net.4.weight"], recorder.masks[-1]["net.4.weight"])
    for masks in recorder.masks:
        assert {name: int((~mask).sum()) for name, mask in masks.items()} == counts
    assert agrees(model, callback.masks)


class Unfreeze(Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Regression) -> None:
        pl_module.net[2].requires_grad_(trainer.current_epoch > 0)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(("sparsity", "zeros"), [(0.5, (24, 16, 32)), (None, (0, 0, 7))])
@pytest.mark.parametrize("method", METHODS)
def test_lazy_layers_and_those_that_are_unfrozen_join(
    method: type[SET], sparsity: float | None, zeros: tuple[int, int, int]
) -> None:
    model = Regression(nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.LazyLinear(4)))
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), 0.1)
    model.net[2].requires_grad_(False)
    model.net[2].weight.data[1, :7] = 0.0
    callback, seen = method(sparsity, scope="local", frequency=2, end=1.0), []
    look = On(on_train_batch_end=lambda *args: seen.append({n: int((~m).sum()) for n, m in callback.masks.items()}))
    with Probe(model, callback) as probe:
        fit(model, Unfreeze(), callback, look)
    assert not probe.dense
    lazy = {"net.0.weight": zeros[0], "net.4.weight": zeros[1]}
    assert seen == [lazy] * 6 + [{**lazy, "net.2.weight": zeros[2]}] * 6
    assert agrees(model, callback.masks)
    assert callback.sparsity_now == pytest.approx(sum(zeros) / 144)


class DeadInputs(MLP):
    """Half of the inputs are zero, so that a weight behind them never gets a gradient."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step([batch[0] * torch.tensor([1.0, 0, 1, 0, 1, 0]), batch[1]], batch_idx)


@pytest.mark.parametrize("method", METHODS)
def test_new_weights_without_a_gradient_stay_zero_unless_they_start_at_random(method: type[SET]) -> None:
    for grow_init in ("zeros", "random"):
        model, callback = DeadInputs(), method(0.8, scope="local", frequency=1, end=4, grow_init=grow_init)
        fit(model, callback, limit_val_batches=0)
        still = sum(int((weights(model)[name] == 0)[mask].sum()) for name, mask in callback.masks.items())
        assert callback.sparsity_now == pytest.approx(126 / 158)
        assert sparsity(model) == pytest.approx((126 + still) / 158)
        assert (still > 0) == (grow_init == "zeros")


def grown(callback: SET) -> list[tuple[dict[str, Tensor], ...]]:
    """Return, for each update, what grew, its weights and the gradients before."""
    found, masks, gradients = [], {}, {}
    model = MLP()
    named = {name: model.get_parameter(name) for name in SIZES}

    def before(*args: Any) -> None:
        masks.update(callback.masks)
        gradients.update({name: p.grad.clone() for name, p in named.items()})

    def after(*args: Any) -> None:
        new = {name: callback.masks[name] & ~masks[name] for name in SIZES}
        if any(mask.any() for mask in new.values()):
            found.append((new, {name: p.detach().clone() for name, p in named.items()}, dict(gradients)))

    front, behind = On(on_before_optimizer_step=before), On(on_train_batch_end=after)
    fit(model, front, callback, behind, limit_val_batches=0)
    assert agrees(model, callback.masks)
    assert len(found) == 2
    return found


@pytest.mark.parametrize("method", METHODS)
def test_new_weights_start_at_random_within_the_mean_size_of_the_others(method: type[SET]) -> None:
    for new, values, _ in grown(method(0.6, frequency=2, grow_init="random", scope="local")):
        for name in SIZES:
            first, others = values[name][new[name]], values[name][values[name] != 0]
            assert first.unique().numel() == first.numel() > 0
            assert 0 < first.abs().max() < 1.5 * others.abs().mean()


def test_new_weights_of_rigl_start_with_a_step_against_their_gradient() -> None:
    for new, values, gradients in grown(RigL(0.6, frequency=2, grow_init="gradient")):
        for name in SIZES:
            torch.testing.assert_close(values[name][new[name]], -0.1 * gradients[name][new[name]])


def test_a_weight_that_was_dropped_may_grow_again_as_it_was() -> None:
    layer = nn.Linear(4, 1)
    layer.weight.data = torch.tensor([[0.1, 0.2, 0.0, 0.0]])
    layer.weight.grad = torch.tensor([[9.0, 9.0, 1.0, -2.0]])
    units = make_units(find(layer), layer, Weight())
    units[0].statistic = Gradient().observe(units[0])
    [mask] = exchange(units, {"weight": layer.weight != 0}, 0.5, Gradient(), regrow=True).values()
    assert mask.tolist() == [[True, True, False, False]]
    layer.weight.grad[0, 0], units[0].statistic = 0.5, None
    units[0].statistic = Gradient().observe(units[0])
    [mask] = exchange(units, {"weight": layer.weight != 0}, 0.5, Gradient(), regrow=True).values()
    assert mask.tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("method", METHODS)
def test_with_regrowth_layers_keep_their_zeros_and_may_exchange_all_weights(method: type[SET]) -> None:
    callback = method(0.25, scope="local", frequency=2, drop_fraction=1.0, decay="constant", regrow=True)
    recorder = record(callback)
    for old, new in pairwise(recorder.masks):
        assert all(int(new[name].sum()) == int(old[name].sum()) for name in SIZES)
    assert changes(recorder) == [2, 4]


def test_each_seed_and_each_update_grows_other_weights() -> None:
    one, again, other = (SET(0.6, frequency=2, seed=seed) for seed in (0, 0, 1))
    for callback in (one, again, other):
        torch.manual_seed(id(callback) % 1000)
        fit(MLP(), callback, limit_val_batches=0)
    assert all(torch.equal(one.masks[name], again.masks[name]) for name in SIZES)
    assert any(not torch.equal(one.masks[name], other.masks[name]) for name in SIZES)
    orders = {SET(0.6).growth(position) for position in range(100)}
    assert len(orders) == 100


def test_the_global_generator_is_left_alone() -> None:
    states = []
    for callbacks in ((), (SET(0.6, frequency=1),)):
        torch.manual_seed(3)
        fit(MLP(), *callbacks, limit_val_batches=0)
        states.append(torch.random.get_rng_state())
    assert torch.equal(*states)


def test_a_dense_or_empty_target_keeps_its_masks() -> None:
    callback = SET({"net.0.*": 0.0, "net.4.*": 0.5}, frequency=1)
    recorder = record(callback)
    assert all(masks["net.0.weight"].all() for masks in recorder.masks)
    assert all(int(masks["net.4.weight"].sum()) == 40 for masks in recorder.masks)


def test_the_whole_run_is_at_the_target() -> None:
    levels = []
    callback = RigL(0.6, frequency=2)
    look = On(on_train_batch_start=lambda *args: levels.append((callback.reached, round(158 * callback.sparsity_now))))
    fit(MLP(), callback, look, limit_val_batches=0, max_epochs=1)
    assert levels == [(True, round(0.6 * 158))] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 98}, "sparsity must be in [0, 1), got 98"),
        ({"drop_fraction": 0.0}, "drop_fraction must be in (0, 1], got 0.0"),
        ({"drop_fraction": 1.5}, "drop_fraction must be in (0, 1], got 1.5"),
        ({"decay": "cubic"}, "decay must be one of ['constant', 'cosine', 'linear'] or a callable, got 'cubic'"),
        ({"scope": "layer"}, "scope must be one of"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"frequency": 0}, "frequency must be at least 1 step, got 0"),
        ({"grow_init": "ones"}, 'grow_init must be "zeros", "random" or "gradient", got \'ones\''),
        ({"start": 0.8}, "start must not lie after end, got start=0.8 and end=0.75"),
    ],
)
def test_the_impossible_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RigL(**arguments)


def test_set_has_no_gradients_to_start_with() -> None:
    with pytest.raises(ValueError, match='grow_init must be "zeros" or "random", got \'gradient\''):
        SET(0.5, grow_init="gradient")


def test_a_decay_that_leaves_0_to_1_is_refused_before_the_first_step() -> None:
    callback, trainer_steps = SET(0.5, decay=lambda progress: 2.0, frequency=2), []
    with pytest.raises(ValueError, match=re.escape("decay must stay in [0, 1], got 2.0 at 2")):
        fit(MLP(), callback, On(on_train_batch_start=lambda *args: trainer_steps.append(1)))
    assert not trainer_steps


def test_overlapping_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="disjoint targets"):
        fit(MLP(), RigL(0.5), ConstantSparsity(targets=("net.4.*",)))


@pytest.mark.parametrize("method", [SET, RigL])
def test_groups_of_rows_exchange_inputs_and_keep_as_many(method: type[SET]) -> None:
    callback = method(0.5, frequency=2, scope="local", granularity=SharedFanIn(2))
    recorder = MaskRecorder(callback)
    fit(ConvNet(), callback, recorder, limit_val_batches=0)
    first, *_, last = recorder.masks
    for name, mask in last.items():
        groups = mask.flatten(1).split(2)
        assert all(torch.equal(rows[0], row) for rows in groups for row in rows), "the rows of a group differ"
        assert len({int(rows[0].sum()) for rows in groups}) == 1, "one group keeps more than another"
        assert int(mask.sum()) == int(first[name].sum())
    assert any(not torch.equal(mask, first[name]) for name, mask in last.items())


@pytest.mark.parametrize("granularity", [Channel(coupled=False), Channel(), NM(2, 4)], ids=str)
def test_units_that_cannot_be_exchanged_are_refused(granularity: Granularity) -> None:
    with pytest.raises(ValueError, match=r"granularity must be Weight\(\), SharedFanIn\(\) or Block\(\)"):
        RigL(0.5, granularity=granularity)
    with pytest.raises(ValueError, match=r'grow_init must be "zeros" for SharedFanIn\(rows=16\), got .gradient.'):
        RigL(0.5, granularity=SharedFanIn(), grow_init="gradient")
