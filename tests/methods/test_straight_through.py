"""SR-STE: N:M weights between any two steps, and the training of the paper under them."""

import re
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from foreign import SAM
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from models import MLP, ConvNet, MaskRecorder, On, agrees, fit, weights
from modes import SGD, Probe, Regression, leftovers, mlp
from torch import Tensor, nn

from lightning_prune import SRSTE

STEPS = 8


def keeps(mask: Tensor, n: int, m: int) -> bool:
    """Whether every whole group of m along the inputs keeps n."""
    rows = mask.movedim(1, -1)
    whole = rows[..., : rows.shape[-1] // m * m].unflatten(-1, (-1, m))
    return bool((whole.sum(-1) == n).all())


@pytest.mark.parametrize("model", [MLP, ConvNet])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (1, 4)])
def test_every_group_keeps_n_of_m_at_every_moment(n: int, m: int, model: type[MLP]) -> None:
    net, callback = model(), SRSTE(n, m)
    recorder = MaskRecorder(callback)
    with Probe(net, callback) as probe:
        fit(net, callback, recorder)
    assert not probe.dense
    assert probe.forwards > STEPS
    for masks in recorder.masks:
        assert all(keeps(mask, n, m) for mask in masks.values())
    assert any(not torch.equal(old[name], new[name]) for old, new in pairwise(recorder.masks) for name in old)
    assert agrees(net, callback.masks)
    assert net.state_dict().keys() == model().state_dict().keys()
    assert callback.sparsity_now == pytest.approx(callback.masks.sparsity)
    assert callback.reached


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": partial(torch.optim.AdamW, lr=0.01),
}


def largest(named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Two of every four, and half of a last group that is shorter: ones where a weight is kept."""
    kept = {}
    for name, parameter in named.items():
        groups = parameter.detach().abs().split(4, 1)
        best = [torch.zeros_like(g).scatter_(1, g.topk(g.shape[1] // 2, 1).indices, 1.0) for g in groups]
        kept[name] = torch.cat(best, 1)
    return kept


def add_gradients(model: MLP, sparse: dict[str, Tensor], batch: list[Tensor], share: float) -> None:
    """Run the model with sparse weights, and give their gradients to the dense ones."""
    sparse = {name: weight.detach().requires_grad_() for name, weight in sparse.items()}
    (share * nn.functional.cross_entropy(torch.func.functional_call(model, sparse, (batch[0],)), batch[1])).backward()
    for name, weight in sparse.items():
        parameter = model.get_parameter(name)
        parameter.grad = weight.grad if parameter.grad is None else parameter.grad + weight.grad


def by_hand(optimizer: str, decay: float, accumulate: int, clip: float | None) -> MLP:
    """Train as the paper has it, with dense weights in the model and masked ones in the forward pass only."""
    model = MLP(optimizer=optimizer)
    named = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    stepping = OPTIMIZERS[optimizer](model.parameters())
    model.train()
    batches = list(model.train_dataloader()) * 2 * accumulate
    for step in range(STEPS):
        kept = largest(named)
        stepping.zero_grad()
        for batch in batches[step * accumulate : (step + 1) * accumulate]:
            add_gradients(model, {name: p * kept[name] for name, p in named.items()}, batch, 1 / accumulate)
        for name, p in named.items():
            p.grad += decay * (1 - kept[name]) * p.detach()
        nn.utils.clip_grad_norm_(model.parameters(), clip or torch.inf)
        stepping.step()
    kept = largest(named)
    for name, p in named.items():
        p.data *= kept[name]
    return model


@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, None), (1, 0.1)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_is_the_training_of_the_paper(optimizer: str, decay: float, accumulate: int, clip: float | None) -> None:
    model = MLP(optimizer=optimizer)
    kwargs = {"accumulate_grad_batches": accumulate, "max_epochs": 2 * accumulate, "gradient_clip_val": clip}
    fit(model, SRSTE(2, 4, decay), **kwargs, limit_val_batches=0)
    for name, value in by_hand(optimizer, decay, accumulate, clip).state_dict().items():
        # the gradient of the bias in front of the batch norm is rounding noise, which Adam scales up to its steps
        noise = name in ("net.0.bias", "net.1.running_mean") and optimizer == "adam"
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-2 if noise else 1e-5)


class Overflow(Regression):
    """The loss of the second batch is infinite, so that a gradient scaler skips its step."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch) * (torch.inf if batch_idx == 1 else 1.0)


def test_skipped_steps_change_nothing_and_fused_gradients_are_scaled_alike() -> None:
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        model, callback = Overflow(mlp(), optimizer=partial(SGD, fused=fused)), SRSTE(decay=0.1)
        recorder, kept = MaskRecorder(callback), []
        look = On(on_train_batch_end=lambda *args, kept=kept, model=model: kept.append(weights(model)))
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
        with Probe(model, callback) as probe:
            fit(model, callback, recorder, look, plugins=[plugin], max_epochs=1)
        assert not probe.dense
        assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
        assert not all(torch.equal(kept[1][name], kept[2][name]) for name in kept[0])
        found.append(weights(model))
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-3, atol=1e-4)


def test_pruned_weights_come_back_as_they_were_trained() -> None:
    model, callback = MLP(lr=0.5), SRSTE(2, 4)
    recorder = MaskRecorder(callback)
    fit(model, callback, recorder, limit_val_batches=0)
    first, last = recorder.masks[0], recorder.masks[-1]
    back = {name: last[name] & ~first[name] for name in first}
    assert any(mask.any() for mask in back.values())
    dense = callback.state_dict()["dense"]
    for name, weight in weights(model).items():
        assert torch.equal(weight, dense[name] * last[name])
        assert dense[name].count_nonzero() == dense[name].numel()


def test_a_second_fit_goes_on_with_the_weights_that_are_hidden() -> None:
    model, callback = MLP(), SRSTE(2, 4)
    fit(model, callback, limit_val_batches=0)
    hidden = {name: dense.clone() for name, dense in callback.state_dict()["dense"].items()}
    seen: list[dict[str, Tensor]] = []
    start = On(on_train_batch_start=lambda *args: seen.append(callback.state_dict()["dense"]))
    fit(model, callback, start, limit_val_batches=0, max_epochs=1, limit_train_batches=1)
    assert all(torch.equal(seen[0][name], dense) for name, dense in hidden.items())
    with torch.no_grad():  # other weights: what was hidden under the old ones is nothing to them
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    seen.clear()
    fit(model, callback, start, limit_val_batches=0, max_epochs=1, limit_train_batches=1)
    assert not any(torch.equal(seen[0][name], dense) for name, dense in hidden.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 4, "m": 4}, "n must be at least 1 and less than m, got n=4 and m=4"),
        ({"decay": -1.0}, "decay must be at least 0, got -1.0"),
    ],
)
def test_the_impossible_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SRSTE(**arguments)


def test_an_optimizer_that_runs_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer must not run the model inside its step for SRSTE, got LBFGS"):
        fit(MLP(optimizer="lbfgs"), SRSTE())


def test_an_optimizer_that_runs_the_model_again_inside_its_step_is_refused() -> None:
    model, callback = MLP(), SRSTE()
    model.configure_optimizers = lambda: SAM(model.parameters(), 0.1, momentum=0.9)
    with (
        Probe(model, callback) as probe,
        pytest.raises(ValueError, match="optimizer must not run the model inside its step for SRSTE, got SAM"),
    ):
        fit(model, callback)
    assert probe.forwards <= 10  # those of the first batch, and the one that was refused
    assert agrees(model, callback.masks)
    assert not leftovers(model)


class ByHand(MLP):
    """Manual optimization with a closure, which torch runs inside the step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        def closure() -> None:
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))

        self.optimizers().step(closure=closure)


def test_a_closure_inside_a_manual_step_is_refused() -> None:
    model, callback = ByHand(), SRSTE()
    with pytest.raises(ValueError, match="optimizer must not run the model inside its step for SRSTE, got SGD"):
        fit(model, callback)
    assert agrees(model, callback.masks)


class Watcher(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Regression, outputs: Any, batch: Any, batch_idx: int) -> None:
        pl_module(batch[0])


def test_a_forward_pass_after_a_skipped_step_sees_masked_weights() -> None:
    model, callback = Overflow(mlp()), SRSTE()
    plugin, seen = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0)), []
    model.net[0].register_forward_pre_hook(lambda *args: seen.append(agrees(model, callback.masks)))
    fit(model, Watcher(), callback, plugins=[plugin], max_epochs=1, limit_val_batches=0)
    assert seen == [True] * 12


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_layers_and_those_that_are_unfrozen_join() -> None:
    class Unfreeze(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Regression) -> None:
            pl_module.net[2].requires_grad_(trainer.current_epoch > 0)

    model = Regression(nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.LazyLinear(4)))
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), 0.1)
    model.net[2].requires_grad_(False)
    callback, seen = SRSTE(2, 4), []
    look = On(on_train_batch_end=lambda *args: seen.append(sorted(callback.masks)))
    with Probe(model, callback) as probe:
        fit(model, Unfreeze(), callback, look)
    assert not probe.dense
    lazy = ["net.0.weight", "net.4.weight"]
    assert seen == [lazy] * 6 + [sorted([*lazy, "net.2.weight"])] * 6
    assert agrees(model, callback.masks)
    assert callback.sparsity_now == 0.5
    assert callback.state_dict()["dense"].keys() == set(seen[-1])


def test_sparse_gradients_are_refused() -> None:
    table = nn.Sequential(nn.Embedding(4, 4, sparse=True), nn.Flatten(), nn.Linear(24, 4))
    model = Regression(table)
    model.forward = lambda inputs: model.net((inputs > 0).long())
    model.make_optimizer = partial(torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=r"'net.0.weight' must have a dense gradient for SRSTE, got a sparse one"):
        fit(model, SRSTE(targets=("net.0.weight",)))


class Broken(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        closure()
        raise ConnectionError("lost")


def test_an_exception_within_a_step_leaves_masked_weights_and_those_that_they_hide() -> None:
    model, callback = MLP(), SRSTE(2, 4)
    fit(model, callback, limit_val_batches=0)
    model.configure_optimizers = lambda: Broken(model.parameters(), 0.1)
    with pytest.raises(ConnectionError):
        fit(model, callback)
    assert agrees(model, callback.masks)
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), 0.1)
    fit(model, callback, limit_val_batches=0)
    for dense in callback.state_dict()["dense"].values():
        assert dense.count_nonzero() == dense.numel()
