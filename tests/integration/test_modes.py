"""All the ways Lightning trains: no forward pass sees a pruned weight, and every run ends at exactly its target."""

import copy
import pickle
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.plugins import MixedPrecision
from models import QUIET, fit
from modes import (
    ADAM,
    BATCH,
    BATCHES,
    GRADUAL,
    KINDS,
    SGD,
    Probe,
    Regression,
    assert_masked,
    assert_nothing_left,
    assert_pruned,
    leftovers,
    mlp,
    samples,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset
from variants import CRITERIA, label

from lightning_prune import (
    SNIP,
    Channel,
    ConstantSparsity,
    Criterion,
    Entropy,
    MagnitudePruning,
    Pruning,
    RigL,
    Sensitivity,
    prune,
)
from lightning_prune.models.preserving import eager

# ------------------------------------------------------------------------------------------- optimizers


class Twice(torch.optim.Adam):
    """Steps through its parent: torch then runs the post-step hooks two times."""

    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:
        return super().step(closure)


class Lookahead(torch.optim.Optimizer):
    """Steps another optimizer, and every second time goes back half of the way."""

    def __init__(self, params: Any) -> None:
        self.inner = ADAM(params)
        super().__init__(self.inner.param_groups, {})
        self.slow = [parameter.detach().clone() for group in self.param_groups for parameter in group["params"]]
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:
        loss = self.inner.step(closure)
        self.steps += 1
        if self.steps % 2 == 0:
            for slow, group in zip(self.slow, (p for g in self.param_groups for p in g["params"]), strict=True):
                group.copy_(slow.lerp_(group, 0.5))
        return loss


class SharpnessAware(torch.optim.SGD):
    """Takes its gradients where the first ones lead to: a second forward pass sees weights in the middle of a step."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Any:
        run = torch.enable_grad()(closure)
        run()
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        away = [0.05 * parameter.grad.sign() for parameter in trained]
        torch._foreach_add_(trained, away)
        loss = run()
        torch._foreach_sub_(trained, away)
        super().step()
        return loss


class Poison(torch.optim.SGD):
    """Writes NaN into every weight that is zero."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Any:
        loss = torch.enable_grad()(closure)()
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim >= 2:
                    parameter.masked_fill_(parameter == 0, torch.nan)
        return loss


class Borrowed:
    """Has all that Lightning asks of an optimizer, and never called torch's ``Optimizer.__init__``."""

    def __init__(self, params: Any) -> None:
        inner = SGD(params)
        self.param_groups, self.defaults, self.state = inner.param_groups, inner.defaults, inner.state
        self.step, self.zero_grad = inner.step, inner.zero_grad
        self.state_dict, self.load_state_dict = inner.state_dict, inner.load_state_dict


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "adam-fused": partial(torch.optim.Adam, lr=0.01, fused=True),
    "adam-foreach": partial(torch.optim.Adam, lr=0.01, foreach=True),
    "adam-single": partial(torch.optim.Adam, lr=0.01, foreach=False),
    "adamw-fused": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, fused=True),
    "sgd-nesterov": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "rmsprop-centered": partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
    "adagrad": partial(torch.optim.Adagrad, lr=0.05),
    "rprop": partial(torch.optim.Rprop, lr=0.01),
    "lbfgs": partial(torch.optim.LBFGS, lr=0.1, max_iter=3),
    "lbfgs-wolfe": partial(torch.optim.LBFGS, lr=0.5, max_iter=4, line_search_fn="strong_wolfe"),
    "super-step": partial(Twice, lr=0.01),
    "lookahead": Lookahead,
    "sharpness-aware": partial(SharpnessAware, lr=0.05, momentum=0.9),
    "poison": partial(Poison, lr=0.05),
}

# ------------------------------------------------------------------------------------------- models


class Overflow(Regression):
    """The loss of some batches is infinite, so that a gradient scaler skips their steps."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch) * (torch.inf if batch_idx in (1, 4) else 1.0)


class GAN(LightningModule):
    """Manual optimization of a generator and a discriminator.

    The discriminator's graph is built before the generator steps and differentiated after, so that masking all
    parameters at every step would break it.
    """

    def __init__(self, raw: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.raw = raw
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        generator, discriminator = self.optimizers(use_pl_optimizer=not self.raw)
        fake = self.generator(batch[0][:, :3])
        difference = self.discriminator(fake.detach()).square().mean() - self.discriminator(batch[0]).mean()
        generator.zero_grad()
        self.manual_backward(-self.discriminator(fake).mean())
        generator.step()
        discriminator.zero_grad()
        self.manual_backward(difference)
        discriminator.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [ADAM(self.generator.parameters()), SGD(self.discriminator.parameters(), lr=0.01)]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(samples((6,)), batch_size=4)


class Late(Regression):
    """Has no parameters before Lightning asks for them."""

    def __init__(self) -> None:
        super().__init__(None)

    def configure_model(self) -> None:
        if self.net is None:
            self.net = mlp()


class Own(Regression):
    """Half of the weights belong to the LightningModule itself."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 4))
        self.first = nn.Parameter(torch.randn(8, 6) / 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(torch.relu(inputs @ self.first.T))


class Tied(Regression):
    """Two layers have one weight."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 4)))
        self.net[2].weight = self.net[0].weight


class Embedded(Regression):
    """The decoder has the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 10, bias=False))
        self.table = nn.Embedding(10, 6)
        self.net.weight = self.table.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(self.table(inputs.argmax(1)) + inputs)


class Shared(nn.Module):
    """One layer is run three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.last = nn.Linear(6, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.layer(self.layer(self.layer(inputs).relu()).relu()))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell = kind(3, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.last = nn.Linear(10, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.cell(inputs)[0])


class Attention(nn.Module):
    """Attention whose inputs have other sizes too, so that its weights are four and not two."""

    def __init__(self, width: int | None = None) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=width, vdim=width, batch_first=True)
        self.first = nn.Linear(3, 8)
        self.other = nn.Linear(3, width or 8)

    def forward(self, inputs: Tensor) -> Tensor:
        other = self.other(inputs)
        return self.attention(self.first(inputs), other, other)[0]


class Checkpointed(nn.Module):
    """Runs its layers again in the backward pass instead of keeping their outputs."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 4)
        self.reentrant = reentrant

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        if self.reentrant is None or not self.training:
            return self.last(self.block(hidden))
        return self.last(checkpoint(self.block, hidden, use_reentrant=self.reentrant))


class LoRA(nn.Module):
    """A frozen layer with a trained correction of low rank."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base(inputs) + self.up(self.down(inputs))


def adapted() -> nn.Sequential:
    return nn.Sequential(LoRA(nn.Linear(6, 8)), nn.ReLU(), LoRA(nn.Linear(8, 4)))


class Backbone(Regression):
    """A backbone and a head, both to be trained in the end."""

    def __init__(self) -> None:
        super().__init__(mlp(), optimizer=SGD)
        self.backbone, self.net = self.net, nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(self.backbone(inputs))


class Unfreeze(BaseFinetuning):
    """Trains the backbone from the second epoch on, in a group that is added to the optimizer."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, train_bn=False)


class NewOptimizers(Callback):
    """Has the optimizers made again in mid-run."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            trainer.strategy.setup_optimizers(trainer)


class Endless(IterableDataset):
    """Data without a length."""

    def __iter__(self) -> Any:
        while True:
            yield from samples((6,))


class Unsized(Regression):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(Endless(), batch_size=4)


def compiled(where: str) -> Regression:
    model = Regression(mlp())
    if where == "inside":
        model.net[3] = torch.compile(model.net[3], backend="eager")
    elif where == "net":
        model.net = torch.compile(model.net, backend="eager")
    elif where == "in place":
        model.net.compile(backend="eager")
    return model


# ------------------------------------------------------------------------------------------- the modes


@dataclass(frozen=True)
class Mode:
    """One way to train.

    Args:
        model: Makes the model.
        trainer: Makes arguments of the Trainer.
        pruning: Further arguments of the pruning callback.
        kinds: The kinds of criteria that can be used.
    """

    model: Callable[[], LightningModule] = lambda: Regression(mlp())
    trainer: Callable[[], dict[str, Any]] = dict
    pruning: tuple[tuple[str, Any], ...] = ()
    kinds: tuple[str, ...] = tuple(KINDS)


NO_MODULE = ("weights", "gradients")  # the weight is used by no module of its own, so there is no output to look at


def scaled() -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def net(make: Callable[[], nn.Module], *size: int, **kwargs: Any) -> Callable[[], LightningModule]:
    return lambda: Regression(make(), size or (6,), **kwargs)


MODES: dict[str, Mode] = {
    "plain": Mode(),
    "accumulate": Mode(trainer=lambda: {"accumulate_grad_batches": 2, "max_epochs": 4}),
    "accumulate-rest": Mode(trainer=lambda: {"accumulate_grad_batches": 4, "max_epochs": 6}),
    "accumulate-scheduler": Mode(
        trainer=lambda: {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})], "max_epochs": 4}
    ),
    "clip-norm": Mode(trainer=lambda: {"gradient_clip_val": 0.01}),
    "clip-value": Mode(trainer=lambda: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "bf16-mixed": Mode(trainer=lambda: {"precision": "bf16-mixed"}),
    "bf16-true": Mode(trainer=lambda: {"precision": "bf16-true"}),
    "64-true": Mode(trainer=lambda: {"precision": "64-true"}),
    "16-mixed": Mode(lambda: Overflow(mlp(), optimizer=SGD), lambda: {**scaled(), "max_epochs": 4}),
    "16-mixed-fused": Mode(
        lambda: Overflow(mlp(), optimizer=partial(SGD, fused=True)), lambda: {**scaled(), "max_epochs": 4}
    ),
    # one kind of criterion for each, by turns: that reads gradients and forward passes whichever optimizer steps
    **{
        name: Mode(net(mlp, optimizer=optimizer), kinds=(kind,))
        for (name, optimizer), kind in zip(OPTIMIZERS.items(), cycle(KINDS))
    },
    "manual": Mode(GAN),
    "manual-raw": Mode(lambda: GAN(raw=True)),
    "manual-16-mixed": Mode(GAN, scaled),
    "new-optimizers": Mode(trainer=lambda: {"callbacks": [NewOptimizers()]}),
    "compile-inside": Mode(lambda: compiled("inside")),
    "compile-net": Mode(lambda: compiled("net")),
    "compile-in-place": Mode(lambda: compiled("in place")),
    "configure-model": Mode(Late),
    "lazy": Mode(net(lambda: nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(4)))),
    "lazy-conv": Mode(
        net(lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.LazyConv2d(3, 2)), 2, 5, 5)
    ),
    "tied": Mode(Tied),
    "tied-embedding": Mode(Embedded, pruning=(("targets", ("net.weight",)),), kinds=NO_MODULE),
    "shared": Mode(net(Shared)),
    "lstm": Mode(net(partial(Recurrent, nn.LSTM), 5, 3), kinds=NO_MODULE),
    "gru": Mode(net(partial(Recurrent, nn.GRU), 5, 3), kinds=("weights",)),  # no channels but those of the outputs
    "attention": Mode(net(Attention, 5, 3), kinds=NO_MODULE),
    "attention-sizes": Mode(net(partial(Attention, 4), 5, 3), kinds=NO_MODULE),
    "encoder": Mode(
        net(lambda: nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True)), 5, 3),
        kinds=NO_MODULE,
    ),
    "conv1d": Mode(net(lambda: nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3, groups=2)), 2, 7)),
    "conv2d": Mode(net(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 2)), 2, 5, 5)),
    "conv3d": Mode(net(lambda: nn.Sequential(nn.Conv3d(2, 4, 2), nn.ReLU(), nn.Conv3d(4, 4, 2)), 2, 4, 4, 4)),
    "conv-transpose": Mode(
        net(lambda: nn.Sequential(nn.ConvTranspose2d(2, 5, 2), nn.ReLU(), nn.ConvTranspose2d(5, 3, 2)), 2, 3, 3)
    ),
    "own-parameters": Mode(Own, pruning=(("targets", ("*",)),), kinds=NO_MODULE),
    "checkpointing": Mode(net(partial(Checkpointed, False))),
    "checkpointing-reentrant": Mode(net(partial(Checkpointed, True))),
    "finetuning": Mode(Backbone, lambda: {"callbacks": [Unfreeze()]}, pruning=(("targets", ("*",)),)),
    "lora": Mode(net(adapted)),
    "overfit-batches": Mode(trainer=lambda: {"overfit_batches": 2, "max_epochs": 6}),
    "max-steps": Mode(trainer=lambda: {"max_epochs": -1, "max_steps": 12}),
    "unsized": Mode(lambda: Unsized(mlp()), lambda: {"max_epochs": -1, "max_steps": 12}),
    "reload": Mode(trainer=lambda: {"reload_dataloaders_every_n_epochs": 1}),
    "validate-often": Mode(trainer=lambda: {"val_check_interval": 2, "num_sanity_val_steps": 2}),
    "no-inference-mode": Mode(trainer=lambda: {"inference_mode": False, "detect_anomaly": True}),
}
# what decides when gradients are complete, or which forward passes count, meets every kind of criterion; how a layer is
# built and how long a run is, one kind each, by turns
EVERY_KIND = re.compile("plain|accumulate|clip|manual|16-mixed|compile|checkpointing")
ALL = [
    pytest.param(mode, kind, id=f"{mode}-{kind}")
    for turn, mode in enumerate(MODES)
    for place, kind in enumerate(MODES[mode].kinds)
    if EVERY_KIND.search(mode) or place == turn % len(MODES[mode].kinds)
]


def train(model: LightningModule, *callbacks: Callback, **trainer_kwargs: Any) -> Trainer:
    others = trainer_kwargs.pop("callbacks", [])
    return fit(model, *callbacks, *others, **trainer_kwargs)


# compiled code and the probe's hooks: torch remarks on both
PROBED = [
    "ignore:Using .torch.compile.module.. when there are global hooks",
    "ignore:The .grad attribute of a Tensor that is not a leaf",
]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature", *PROBED)
@pytest.mark.parametrize(("mode", "kind"), ALL)
def test_no_forward_pass_sees_a_pruned_weight(mode: str, kind: str) -> None:
    way = MODES[mode]
    model, plain = way.model(), way.model()
    plain.configure_model()
    callback = Pruning(**GRADUAL, **KINDS[kind], **dict(way.pruning))
    with Probe(model, callback) as probe:
        trainer = train(model, callback, **way.trainer())
    probe.assert_sparse()
    assert_pruned(model, callback)
    assert_nothing_left(trainer, model, list(plain.state_dict()))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_stay_from_the_first_step_on(optimizer: str) -> None:
    model = Regression(mlp(), optimizer=OPTIMIZERS[optimizer])
    prune(model, 0.75)
    before = {name: model.get_parameter(name).clone() for name in ("net.0.weight", "net.3.weight", "net.5.weight")}
    callback = ConstantSparsity()
    with Probe(model, callback) as probe:
        trainer = train(model, callback)
    probe.assert_sparse(updates=0)
    assert_pruned(model, callback, 0.75)
    assert_nothing_left(trainer, model, list(model.state_dict()))
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    assert all(not torch.equal(before[name], weight) for name, weight in weights.items())


# ------------------------------------------------------------------------------------------- gradients


class OwnClipping(Regression):
    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")


class ClippingBeforeStep(Regression):
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class ClippingAfterBackward(Regression):
    def on_after_backward(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class ClippingInStep(Regression):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        def closure() -> Any:
            loss = optimizer_closure()
            nn.utils.clip_grad_norm_(self.parameters(), 0.1)
            return loss

        optimizer.step(closure=closure)


class ClippingByHand(Regression):
    """Manual optimization."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        optimizer.step()


class Clipping(Callback):
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        nn.utils.clip_grad_norm_(pl_module.parameters(), 0.1)


PLACES: dict[str, tuple[type[Regression], list[Callback], float | None]] = {
    "trainer": (Regression, [], 0.1),
    "configure_gradient_clipping": (OwnClipping, [], None),
    "on_before_optimizer_step": (ClippingBeforeStep, [], None),
    "on_after_backward": (ClippingAfterBackward, [], None),
    "optimizer_step": (ClippingInStep, [], None),
    "manual": (ClippingByHand, [], None),
    "callback": (Regression, [Clipping()], None),
}


@pytest.mark.parametrize("place", PLACES)
def test_clipping_leaves_out_the_gradients_of_pruned_weights(place: str) -> None:
    kind, others, clip = PLACES[place]
    model = kind(mlp(), optimizer=partial(torch.optim.SGD, lr=0.5))
    masks = prune(model, 0.75)
    by_hand = copy.deepcopy(model)
    train(model, ConstantSparsity(), *others, gradient_clip_val=clip, max_epochs=1)
    optimizer = by_hand.configure_optimizers()
    for batch in by_hand.train_dataloader():
        optimizer.zero_grad()
        by_hand.loss(batch).backward()
        for name, mask in masks.items():
            by_hand.get_parameter(name).grad.mul_(mask)
        norm = nn.utils.clip_grad_norm_(by_hand.parameters(), 0.1)
        assert norm > 0.1
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, by_hand.get_parameter(name))


def test_accumulated_gradients_score_like_those_of_a_large_batch() -> None:
    masks = []
    for accumulate, batch_size in ((3, 4), (1, 12)):
        torch.manual_seed(0)
        model = Regression(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), optimizer=SGD)
        model.batch_size = batch_size
        callback = Pruning(0.5, criterion=Sensitivity(window=4), schedule="one_shot", start=4)
        train(model, callback, accumulate_grad_batches=accumulate, max_epochs=4)
        masks.append(callback.masks)
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert masks[0].keys() == masks[1].keys() != set()


def test_skipped_steps_do_not_count_and_fused_gradients_are_unscaled() -> None:
    found = {}
    for fused in (False, True):
        torch.manual_seed(0)
        model = Overflow(mlp(), optimizer=partial(torch.optim.SGD, lr=0.1, fused=fused))
        # the scale is halved in mid-window: gradients that were not unscaled would count four times as much before
        callback = Pruning(0.5, criterion=Sensitivity(window=6), schedule="one_shot", start=9)
        with Probe(model, callback) as probe:
            trainer = train(model, callback, **scaled(), max_epochs=3)
        probe.assert_sparse(updates=1)
        assert trainer.precision_plugin.scaler.get_scale() == 256.0 / 2**6
        assert_pruned(model, callback)
        found[fused] = callback.masks
    assert all(torch.equal(found[True][name], found[False][name]) for name in found[False])


@pytest.mark.parametrize("fused", [False, True])
def test_the_target_is_reached_where_the_last_step_is_skipped(fused: bool) -> None:
    model = Overflow(mlp(), optimizer=partial(torch.optim.SGD, lr=0.1, fused=fused))
    callback = MagnitudePruning(**{**GRADUAL, "end": 12})
    trainer = train(model, callback, **scaled(), limit_train_batches=5, max_steps=12, max_epochs=3)
    assert trainer.global_step == 12
    assert_pruned(model, callback)


class Repairing(Regression):
    """The gradients of some batches are NaN, and the module zeroes them before the step."""

    bad = (1, 4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch) * (torch.nan if batch_idx in self.bad else 1.0)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter in self.parameters():
            parameter.grad.nan_to_num_(0.0)


@pytest.mark.parametrize("method", [lambda: Pruning(**GRADUAL, **KINDS["gradients"]), lambda: RigL(0.5, frequency=2)])
def test_gradients_that_the_module_repairs_are_not_observed(method: Callable[[], Any]) -> None:
    model, callback = Repairing(mlp()), method()
    train(model, callback, max_epochs=3)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert callback.reached
    assert_masked(model, callback) if isinstance(callback, RigL) else assert_pruned(model, callback)


def test_nan_in_the_weights_is_not_passed_over() -> None:
    model, callback = Repairing(mlp(), optimizer=SGD), Pruning(**GRADUAL, **KINDS["gradients"])
    model.on_before_optimizer_step = lambda optimizer: None
    with pytest.raises(ValueError, match="scores must be finite, got NaN or infinity"):
        train(model, callback)


def test_an_optimizer_that_is_none_is_refused_with_help() -> None:
    model = Regression(mlp(), optimizer=Borrowed)
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer\.__init__, got Borrowed"):
        train(model, MagnitudePruning(**GRADUAL))
    assert leftovers(model) == []


# ------------------------------------------------------------------------------------------- compiled modules


def entropy_masks(model: nn.Module) -> dict[str, Tensor]:
    """Return the masks after a window that opens when compiled code is there already."""
    callback = Pruning(0.5, **KINDS["forwards"], schedule="one_shot", start=8)
    trainer = Trainer(**QUIET, callbacks=[callback])
    trainer.fit(model)
    return dict(callback.masks)


@pytest.mark.filterwarnings(*PROBED)
@pytest.mark.parametrize("where", ["whole", "net", "inside", "in place"])
def test_statistics_of_compiled_modules_are_those_of_plain_ones(where: str) -> None:
    torch._dynamo.reset()
    model = compiled(where)
    plain = Regression(mlp())
    plain.load_state_dict({key.replace("_orig_mod.", ""): value for key, value in model.state_dict().items()})
    found = entropy_masks(torch.compile(model, backend="eager") if where == "whole" else model)
    expected = entropy_masks(plain)
    assert found.keys() == expected.keys() != set()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.filterwarnings(*PROBED)
@pytest.mark.parametrize("first", [2, 4])
def test_a_window_that_closes_leaves_another_over_compiled_code_open(first: int) -> None:
    torch._dynamo.reset()
    model = compiled("net")
    windows: dict[str, Any] = {"criterion": Entropy(window=2), "granularity": Channel(), "schedule": "one_shot"}
    callbacks = [
        Pruning(0.5, **windows, start=start, targets=(f"net.{layer}.weight",))
        for layer, start in ((0, first), (3, 3), (5, 8))
    ]
    train(model, *callbacks)
    assert [callback.sparsity_now for callback in callbacks] == [0.5, 0.5, 0.5]


def test_eager_code_that_runs_within_a_window_leaves_it_open() -> None:
    def eager_now() -> bool:
        return torch._dynamo.eval_frame._stance.stance == "force_eager"

    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    with torch.compiler.set_stance("eager_on_recompile"):
        with eager():
            with eager():
                pass
            assert eager_now()
        assert torch._dynamo.eval_frame._stance.stance == "eager_on_recompile"  # the user's own


@pytest.mark.parametrize("kind", KINDS)
def test_validation_is_not_counted(kind: str) -> None:
    masks = []
    for kwargs in ({"limit_val_batches": 0}, {"val_check_interval": 1, "num_sanity_val_steps": 2}):
        torch.manual_seed(0)
        callback = Pruning(**GRADUAL, **KINDS[kind])
        train(Regression(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))), callback, **kwargs)
        masks.append(callback.masks)
    assert masks[0].keys() == masks[1].keys() != set()
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


@pytest.mark.filterwarnings(*PROBED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_lightning_module_is_pruned(kind: str) -> None:
    torch._dynamo.reset()
    model = Regression(mlp())
    keys = list(model.state_dict())
    callback = Pruning(**GRADUAL, **KINDS[kind])
    trainer = Trainer(**QUIET, callbacks=[callback])
    with Probe(model, callback) as probe:
        trainer.fit(torch.compile(model, backend="eager"))
    probe.assert_sparse()
    assert_pruned(model, callback)
    assert_nothing_left(trainer, model, keys)


@pytest.mark.parametrize("error", [None, ValueError])
def test_code_is_compiled_again_after_the_statistics(error: type[Exception] | None) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    model = Regression(mlp()) if error is None else Failing("training_step", error)
    trainer = Trainer(**QUIET, callbacks=[Pruning(**GRADUAL, **KINDS["forwards"])])
    if error is None:
        trainer.fit(model)
    else:
        with pytest.raises(error):
            trainer.fit(model)
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert graphs


# ------------------------------------------------------------------------------------------- models


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("kind", KINDS)
def test_lazy_layers_are_pruned_as_soon_as_they_exist(kind: str) -> None:
    model = Regression(nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(4)))
    callback = Pruning(0.5, schedule="one_shot", start=0, **KINDS[kind])
    with Probe(model, callback) as probe:
        train(model, callback)
    probe.assert_sparse(updates=1)
    assert_pruned(model, callback)


class Table(Regression):
    """An embedding with sparse gradients, and what optimizers for both kinds take."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Embedding(8, 4, sparse=True), nn.Flatten(), nn.Linear(24, 4)))
        self.make_optimizer = partial(torch.optim.SGD, lr=0.1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net((inputs * 2).long().clamp(-4, 3) + 4)


@pytest.mark.parametrize(
    "method",
    [
        partial(Pruning, criterion=Sensitivity(window=2), granularity=Channel(), **GRADUAL),
        partial(Pruning, criterion=SNIP(), **GRADUAL),
        partial(RigL, 0.5, frequency=2),
    ],
)
def test_embeddings_with_sparse_gradients(method: Callable[..., Any]) -> None:
    model, callback = Table(), method(targets=("net.0.weight",))
    train(model, callback)
    assert_masked(model, callback)


@pytest.mark.parametrize("criterion", CRITERIA, ids=label)
def test_criteria_work_with_float64_as_the_default_type(criterion: Criterion) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model = Regression(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)))
        callback = Pruning(0.5, criterion=criterion, granularity=Channel(), start=4, end=5)
        train(model, callback, precision="64-true", max_epochs=1)
        assert model.net[0].weight.dtype == torch.float64
        assert_pruned(model, callback)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("model", [Tied, Embedded])
def test_tied_weights_count_once(model: Callable[[], LightningModule]) -> None:
    tied = model()
    callback = MagnitudePruning(
        **GRADUAL, targets=("net.0.weight", "net.2.weight") if model is Tied else ("net.weight",)
    )
    train(tied, callback)
    assert len(callback.masks) == 1
    assert_pruned(tied, callback)
    first, second = (tied.net[0], tied.net[2]) if model is Tied else (tied.net, tied.table)
    assert first.weight is second.weight


class Counting(Criterion):
    """Counts how often it is shown a forward pass."""

    needs = "forwards"
    window = 2

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def observe(self, units: Any, inputs: Any = (), output: Any = None) -> Tensor:
        self.seen[units.name] += 1
        return torch.zeros(())

    def scores(self, units: Any) -> Tensor:
        return units.mean(torch.abs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_backward_pass_computes_again_is_not_counted_again(reentrant: bool) -> None:
    criterion = Counting()
    train(Regression(Checkpointed(reentrant)), Pruning(0.5, criterion=criterion, schedule="one_shot", start=4))
    assert criterion.seen == {"net.first.weight": 2, "net.block.0.weight": 2, "net.last.weight": 2}


def test_frozen_weights_under_a_low_rank_correction_are_left_alone() -> None:
    model = Regression(adapted())
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if "base" in name}
    callback = MagnitudePruning(**GRADUAL)
    train(model, callback)
    assert {name.split(".")[2] for name in callback.masks} == {"down", "up"}
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())


def test_frozen_weights_are_told_and_left_alone() -> None:
    model = Regression(adapted())
    finds, pruned = "finds all its targets frozen", "pruned nothing: its targets were frozen in the whole run"
    with pytest.warns(UserWarning, match=finds), pytest.warns(UserWarning, match=pruned):
        train(model, MagnitudePruning(**GRADUAL, targets=("*.base.weight",)))
    assert leftovers(model) == []


def test_weights_that_are_unfrozen_in_mid_run_are_pruned_too() -> None:
    model = Backbone()
    callback = MagnitudePruning(**GRADUAL)
    train(model, Unfreeze(), callback)
    assert {name.split(".")[0] for name in callback.masks} == {"backbone", "net"}
    assert_pruned(model, callback)


# ------------------------------------------------------------------------------------------- several runs


@pytest.mark.parametrize(
    ("kind", "again"), [("weights", "same trainer"), ("gradients", "new trainer"), ("forwards", "same trainer")]
)
def test_a_second_fit_keeps_the_zeros(kind: str, again: str) -> None:
    model = Regression(mlp())
    callback = Pruning(**GRADUAL, **KINDS[kind])
    with Probe(model, callback) as probe:
        trainer = train(model, callback)
        first = {name: mask.clone() for name, mask in callback.masks.items()}
        weights = model.net[0].weight.clone()
        if again == "same trainer":
            trainer.fit_loop.max_epochs = 4
            trainer.fit(model)
        else:
            trainer = train(model, callback, num_sanity_val_steps=2)
    probe.assert_sparse()
    assert not torch.equal(model.net[0].weight, weights)
    assert all(torch.equal(first[name], mask) for name, mask in callback.masks.items())
    assert_pruned(model, callback)
    assert_nothing_left(trainer, model, list(model.state_dict()))


@pytest.mark.parametrize(
    ("kind", "again"), [("weights", "new trainer"), ("gradients", "same trainer"), ("forwards", "new trainer")]
)
def test_a_second_fit_goes_on_where_the_first_stopped(kind: str, again: str) -> None:
    model = Regression(mlp())
    callback = Pruning(**GRADUAL, **KINDS[kind])
    with Probe(model, callback) as probe:
        trainer = Trainer(**{**QUIET, "max_epochs": 1}, callbacks=[callback])
        with pytest.warns(UserWarning, match="before the last update"), pytest.warns(UserWarning, match="not reach"):
            trainer.fit(model)
        assert 0 < callback.sparsity_now < 0.4
        if again == "same trainer":
            trainer.fit_loop.max_epochs = 2
            trainer.fit(model)
        else:
            train(model, callback)
    probe.assert_sparse(updates=4)
    assert_pruned(model, callback)


def test_another_model_starts_dense() -> None:
    callback = MagnitudePruning(**GRADUAL)
    train(Regression(mlp()), callback)
    model = Regression(nn.Linear(6, 4))
    with Probe(model, MagnitudePruning(**GRADUAL)):
        train(model, callback)
    assert list(callback.masks) == ["net.weight"]
    assert_pruned(model, callback)


def test_another_callback_prunes_on() -> None:
    model = Regression(mlp())
    first, second = MagnitudePruning(**GRADUAL), MagnitudePruning(**{**GRADUAL, "sparsity": 0.75, "start": 10})
    train(model, first)
    with pytest.warns(UserWarning, match="ConstantSparsity"):
        train(model, second)
    assert_pruned(model, second, 0.75)
    assert all(not (mask & ~first.masks[name]).any() for name, mask in second.masks.items())


def test_fast_dev_run_reaches_the_target() -> None:
    model = Regression(mlp())
    callback = MagnitudePruning(0.5)
    trainer = Trainer(
        accelerator="cpu",
        fast_dev_run=True,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    with Probe(model, callback) as probe:
        trainer.fit(model)
    probe.assert_sparse(updates=1)
    assert_pruned(model, callback)
    assert_nothing_left(trainer, model, list(model.state_dict()))


@pytest.mark.parametrize("run", ["validate", "test"])
def test_a_checkpoint_is_evaluated_with_its_zeros(run: str, tmp_path: Any) -> None:
    model = Regression(mlp())
    callback = MagnitudePruning(**GRADUAL)
    train(model, callback).save_checkpoint(tmp_path / "sparse.ckpt")
    other, loaded = Regression(mlp()), MagnitudePruning(**GRADUAL)
    trainer = Trainer(**QUIET, callbacks=[loaded])
    with Probe(other, loaded) as probe:
        getattr(trainer, run)(other, ckpt_path=tmp_path / "sparse.ckpt", verbose=False)
    assert probe.levels == [0.5]
    probe.assert_sparse(updates=0)
    assert_pruned(other, loaded)
    assert_nothing_left(trainer, other, list(model.state_dict()))


def test_training_goes_on_from_an_evaluated_checkpoint(tmp_path: Any) -> None:
    model = Regression(mlp())
    callback, saver = MagnitudePruning(**GRADUAL), ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1)
    with Probe(model, callback) as probe:
        trainer = train(model, callback, saver, enable_checkpointing=True)
        trainer.test(model, ckpt_path=tmp_path / "epoch=0-step=6.ckpt", verbose=False)
        assert callback.sparsity_now == pytest.approx(0.3, abs=0.01)
        trainer = train(model, callback)
    assert not probe.dense  # the sparsity falls here: the checkpoint is older than the weights
    assert_pruned(model, callback)


class Tuned(Regression):
    """Has a learning rate and a batch size to be found."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.lr = 0.01
        self.batch_size = 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return ADAM(self.parameters(), lr=self.lr)


class Levels(Callback):
    """Notes the sparsity after every training batch."""

    def __init__(self, pruning: Pruning) -> None:
        self.pruning = pruning
        self.found: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.found.append(self.pruning.sparsity_now)


FINDERS: dict[str, Callable[[], Callback]] = {
    "learning rate": partial(LearningRateFinder, num_training_steps=15, early_stop_threshold=None),
    "batch size": partial(BatchSizeFinder, steps_per_trial=3, init_val=2, max_trials=1),
}


# every trial of a batch size collects all garbage, which takes seconds: with what is observed of forward passes alone
@pytest.mark.parametrize(("finder", "kind"), [*(("learning rate", kind) for kind in KINDS), ("batch size", "forwards")])
def test_a_finder_before_fit_leaves_the_schedule_alone(finder: str, kind: str, tmp_path: Any) -> None:
    model = Tuned()
    callback = Pruning(0.5, **KINDS[kind], schedule="linear", start=0.0, end=0.5)
    levels = Levels(callback)
    with Probe(model, callback) as probe:
        trainer = train(model, FINDERS[finder](), callback, levels, default_root_dir=tmp_path)
    assert not probe.dense
    steps = trainer.global_step
    run = levels.found[-steps:]
    assert steps == 2 * BATCHES * BATCH // model.batch_size
    assert run == sorted(run)
    assert run[0] < 0.1
    assert next(step for step, level in enumerate(run, 1) if level == run[-1]) == steps // 2
    assert_pruned(model, callback)
    assert_nothing_left(trainer, model, list(model.state_dict()))


# ------------------------------------------------------------------------------------------- several callbacks


@pytest.mark.parametrize("kind", KINDS)
def test_two_callbacks_prune_disjoint_targets(kind: str, tmp_path: Any) -> None:
    def callbacks() -> list[Pruning]:
        return [
            MagnitudePruning(**GRADUAL, targets=("net.0.*",)),
            MagnitudePruning(**{**GRADUAL, "sparsity": 0.75}, targets=("net.3.*",)),
            Pruning(**{**GRADUAL, "sparsity": 0.25}, **KINDS[kind], targets=("net.5.*",)),
        ]

    model, pruning = Regression(mlp()), callbacks()
    with Probe(model, *pruning) as probe:
        trainer = train(model, *pruning)
    probe.assert_sparse()
    for callback, sparsity in zip(pruning, (0.5, 0.75, 0.25), strict=True):
        assert_pruned(model, callback, sparsity)
    assert len([name for name in trainer.logged_metrics if name.startswith("pruning/sparsity")]) == 3
    assert_nothing_left(trainer, model, list(model.state_dict()))
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    restored = callbacks()
    train(Regression(mlp()), *restored, ckpt_path=tmp_path / "three.ckpt", max_epochs=3)
    for old, new in zip(pruning, restored, strict=True):
        assert list(old.masks) == list(new.masks) != []
        assert all(torch.equal(old.masks[name], new.masks[name]) for name in old.masks)


@pytest.mark.parametrize("second", [partial(Pruning, criterion=Sensitivity(2), **GRADUAL), ConstantSparsity])
def test_overlapping_targets_are_refused(second: Callable[..., Callback]) -> None:
    model = Regression(mlp())
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(**QUIET, callbacks=[MagnitudePruning(0.5), second(targets=("net.3.*",))])
    with pytest.raises(ValueError, match=r"disjoint targets, got \['net\.3\.weight'\]"):
        trainer.fit(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert_nothing_left(trainer, model, list(before))


# ------------------------------------------------------------------------------------------- interruptions


class Failing(Regression):
    """Raises in the middle of the second epoch."""

    def __init__(self, where: str, error: type[BaseException]) -> None:
        super().__init__(mlp())
        self.where, self.error = where, error

    def fail(self, where: str) -> None:
        if where == self.where and self.trainer.global_step >= BATCHES + 2 and not self.trainer.sanity_checking:
            self.where = "nowhere"
            raise self.error("stop")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.fail("training_step")
        return loss

    def on_after_backward(self) -> None:
        self.fail("backward")

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.fail("validation_step")

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        def broken() -> Tensor:
            loss = optimizer_closure()
            if self.trainer.global_step >= BATCHES + 2:
                with torch.no_grad():  # half of a step: the weights have moved, torch's post-step hooks do not run
                    self.net[0].weight.add_(1.0)
            self.fail("optimizer")
            return loss

        super().optimizer_step(epoch, batch_idx, optimizer, broken if self.where == "optimizer" else optimizer_closure)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("where", "error"),
    [
        *(("training_step", ValueError), ("backward", KeyboardInterrupt)),
        *(("optimizer", ValueError), ("optimizer", KeyboardInterrupt), ("validation_step", KeyboardInterrupt)),
    ],
)
def test_an_interrupted_run_leaves_true_masks_and_no_hook(where: str, error: type[BaseException], kind: str) -> None:
    model = Failing(where, error)
    callback = Pruning(**GRADUAL, **KINDS[kind])
    trainer = Trainer(**QUIET, callbacks=[callback])
    keys = list(model.state_dict())
    with Probe(model, callback) as probe, pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        trainer.fit(model)
    probe.assert_sparse()
    assert_pruned(model, callback, 0.5 if where == "validation_step" else 0.4)
    assert_nothing_left(trainer, model, keys)
    model.train()  # an interrupted validation leaves it in eval mode
    with Probe(model, callback) as probe:
        trainer = train(model, callback, num_sanity_val_steps=2)
    assert probe.levels[0] > 0
    probe.assert_sparse(updates=0)
    assert_pruned(model, callback)
    assert_nothing_left(trainer, model, keys)


class Copies(Callback):
    """Copies the model and a callback in mid-run, and uses the copy of the model immediately."""

    def __init__(self, pruning: Pruning, how: Callable[[Any], Any], at: int) -> None:
        self.pruning, self.how, self.at = pruning, how, at

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == self.at:
            self.model, self.copy = self.how(pl_module), self.how(self.pruning)
            self.masks = {name: mask.clone() for name, mask in self.pruning.masks.items()}
            self.model(100 * torch.randn(50, 6, generator=torch.Generator().manual_seed(1)))


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize(("how", "at"), [(copy.deepcopy, 5), (pickled, 6)])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_in_mid_run_live_on_their_own(kind: str, how: Callable[[Any], Any], at: int) -> None:
    model = Regression(mlp())
    undisturbed = copy.deepcopy(model)
    expected = Pruning(**GRADUAL, **KINDS[kind])
    train(undisturbed, expected)
    callback = Pruning(**GRADUAL, **KINDS[kind])
    copies = Copies(callback, how, at)
    train(model, callback, copies)
    assert all(torch.equal(expected.masks[name], mask) for name, mask in callback.masks.items())
    assert list(copies.copy.masks) == list(copies.masks) != []
    assert all(torch.equal(copies.copy.masks[name], mask) for name, mask in copies.masks.items())
    assert list(copies.model.state_dict()) == list(model.state_dict())
    assert copies.copy.sparsity_now < 0.5
    with Probe(copies.model, copies.copy) as probe:
        train(copies.model, copies.copy)
    probe.assert_sparse()
    assert_pruned(copies.model, copies.copy)
