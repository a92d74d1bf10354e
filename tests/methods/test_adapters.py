"""MaskedAdapters: against low-rank layers written by hand, and what is trained, kept, merged and refused."""

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import SAM
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from models import BATCHES, MLP, ConvNet, On, Tiny, TwoOptimizers, agrees, fit, weights, zeros
from torch import Tensor, nn

from lightning_prune import MaskedAdapters, prune, sparsity
from lightning_prune.methods.adapter import Adapter, new_factors, sides
from lightning_prune.models.parameters import find

EPOCHS = 3


def pruned(model: type[Tiny] = MLP, amount: float = 0.6, **arguments: Any) -> Any:
    made = model(**arguments)
    prune(made, amount)
    return made


def start(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def merged(callback: MaskedAdapters, before: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """What each adapted weight has to be, from the factors and the weight that training started from."""
    state = callback.state
    return {
        name: (before[name] + scale * (state.up[name] @ state.down[name]).view_as(before[name])).detach()
        * callback.masks[name]
        for name in state.down
    }


# ------------------------------------------------------------------------------------------------ by hand


def by_hand(model: MLP, rank: int, scale: float, make: Callable[..., torch.optim.Optimizer], clip: float) -> MLP:
    """LoRA whose product is masked in the forward pass, as MaskLoRA and SparsePEFT write it."""
    masks = {name: weight != 0 for name, weight in weights(model).items()}
    generator = torch.Generator().manual_seed(0)
    factors = {target.name: new_factors(target, rank, generator) for target in find(model)}
    learned = [nn.Parameter(factor) for pair in factors.values() for factor in pair]
    others = [parameter for name, parameter in model.named_parameters() if name not in masks]
    optimizer = make([*learned, *others])
    base = {name: model.get_parameter(name).detach().clone() for name in masks}

    def effective() -> dict[str, Tensor]:
        downs, ups = learned[::2], learned[1::2]
        return {
            name: base[name] + scale * masks[name] * (up @ down)
            for name, down, up in zip(masks, downs, ups, strict=True)
        }

    for step in range(EPOCHS * BATCHES):
        inputs, labels = list(model.train_dataloader())[step % BATCHES]
        optimizer.zero_grad()
        outputs = torch.func.functional_call(model, effective(), (inputs.double(),))
        nn.functional.cross_entropy(outputs, labels).backward()
        if clip:
            nn.utils.clip_grad_norm_([*learned, *others], clip)
        optimizer.step()
    with torch.no_grad():
        for name, weight in effective().items():
            model.get_parameter(name).copy_(weight)
    return model


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.AdamW, lr=0.01),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    ],
    ids=["adamw", "sgd"],
)
def test_a_run_equals_low_rank_layers_whose_product_is_masked(
    make: Callable[..., torch.optim.Optimizer], clip: float
) -> None:
    model, expected = pruned(), pruned().double()  # AdamW makes much of rounding in single precision
    before = weights(expected)
    model.configure_optimizers = lambda: make(model.parameters())
    arguments = {"max_epochs": EPOCHS, "limit_val_batches": 0, "precision": "64-true"}
    fit(model, MaskedAdapters(2, alpha=3.0), gradient_clip_val=clip or None, **arguments)
    by_hand(expected, 2, 1.5, make, clip)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(name), rtol=0, atol=1e-9)
    assert all((weight - before[name]).abs().max() > 1e-3 for name, weight in weights(model).items())


# ------------------------------------------------------------------------------------------------ in every step


@pytest.mark.parametrize("model", [MLP, ConvNet])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_model_is_merged_and_sparse_in_every_forward(model: type[Tiny], optimizer: str) -> None:
    made = pruned(model, optimizer=optimizer)
    already, before, keys, callback = zeros(made), start(made), list(made.state_dict()), MaskedAdapters(3)
    seen: list[bool] = []

    def look(*anything: Any) -> None:
        expected = merged(callback, before, 2.0)
        same = all(torch.equal(made.get_parameter(name), weight) for name, weight in expected.items())
        seen.append(agrees(made, callback.masks) and same and list(made.state_dict()) == keys)

    made.net.register_forward_pre_hook(look)
    fit(made, callback, max_epochs=EPOCHS)
    look()
    assert len(seen) > EPOCHS * BATCHES
    assert all(seen)
    assert zeros(made) == already
    assert callback.sparsity_now == pytest.approx(sparsity(made))


def test_it_learns() -> None:
    model, biases = pruned(), pruned()
    losses = []
    for made, rank in ((model, 4), (biases, 0)):
        fit(made, MaskedAdapters(rank), max_epochs=20)
        losses.append(sum(nn.functional.cross_entropy(made(x), y).item() for x, y in made.train_dataloader()))
    assert losses[0] < 0.5 * losses[1]


def test_changes_of_dense_weights_have_the_rank_of_their_adapter() -> None:
    model = MLP()
    before = weights(model)
    fit(model, callback := MaskedAdapters(2), max_epochs=EPOCHS)
    assert callback.sparsity_now == 0
    for name, weight in weights(model).items():
        change = torch.linalg.svdvals((weight - before[name]).double())
        assert change[1] > 1e-3  # a rank of 2,
        assert change[2] < 1e-6  # and nothing beyond the rounding of the weights


# ------------------------------------------------------------------------------------------------ what is trained


def changed(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    return [name for name, _ in model.named_parameters() if not torch.equal(model.state_dict()[name], before[name])]


WEIGHTS, BIASES = ["net.0.weight", "net.4.weight", "net.6.weight"], ["net.0.bias", "net.4.bias", "net.6.bias"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"train": ()}, WEIGHTS),
        ({"rank": 0}, [*BIASES, "net.1.weight", "net.1.bias"]),
        ({"rank": 0, "train": ("norm",)}, ["net.1.weight", "net.1.bias"]),
        ({"rank": 0, "train": ("bias",)}, [*BIASES, "net.1.bias"]),
        ({"train": ("net.1.*",), "targets": ("net.4.*",)}, ["net.4.weight", "net.1.weight", "net.1.bias"]),
        ({"train": ("re:net.*6.weight",), "ignore": ("net.0.*",)}, ["net.4.weight", "net.6.weight"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_nothing_else_moves(arguments: dict[str, Any], expected: list[str], optimizer: str) -> None:
    model = pruned(optimizer=optimizer)  # with weight decay
    already, before = zeros(model), start(model)
    fit(model, MaskedAdapters(**{"rank": 2, **arguments}))
    assert sorted(changed(model, before)) == sorted(expected)
    assert zeros(model) == already


def test_a_weight_that_is_trained_as_a_whole_keeps_its_zeros_and_has_no_adapter() -> None:
    model = pruned()
    before = start(model)
    fit(model, callback := MaskedAdapters(1, train=("net.4.weight",)))
    assert list(callback.state.down) == ["net.0.weight", "net.6.weight"]
    assert torch.equal(model.net[4].weight != 0, before["net.4.weight"] != 0)
    assert torch.linalg.matrix_rank(model.net[4].weight - before["net.4.weight"]) > 2


def test_frozen_parameters_stay_frozen_and_have_no_adapter() -> None:
    model = pruned()
    model.net[0].requires_grad_(False)
    before = start(model)
    fit(model, callback := MaskedAdapters(2))
    assert not set(changed(model, before)) & {"net.0.weight", "net.0.bias"}
    assert list(callback.state.down) == ["net.4.weight", "net.6.weight"]
    assert not callback.state.adapters, "the model is held after training"
    model.net.requires_grad_(False)
    model.net[1].requires_grad_(True)
    with pytest.raises(ValueError, match="must have a prunable parameter"):
        fit(model, MaskedAdapters(2))


def test_the_plan_says_how_much_is_trained() -> None:
    model, callback = pruned(), MaskedAdapters(2)
    plans: list[str] = []
    fit(model, callback, On(on_train_epoch_start=lambda *anything: plans.append(callback.explain())))
    assert (
        plans[0].splitlines()[0].startswith("MaskedAdapters to keep all zeros, with adapters of rank 2: 3 parameters")
    )
    assert plans[0].endswith("trained: 90 weights of adapters, and 37 by train=('bias', 'norm')")


def test_matrices_of_experts_have_an_adapter_each() -> None:
    class TinyExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5, 4))

    experts = TinyExperts()
    target = find(experts, ["weight"])[0]
    down, up = (nn.Parameter(factor) for factor in new_factors(target, 2, torch.Generator().manual_seed(0)))
    assert (sides(target), down.shape, up.shape) == ((3, 5, 4), (3, 2, 4), (3, 5, 2))
    adapter = Adapter(experts.weight, down, up, experts.weight.detach().clone())
    up.data.normal_(generator=torch.Generator().manual_seed(1))
    gradient, mask = torch.randn(3, 5, 4), torch.rand(3, 5, 4) < 0.5
    (0.5 * (up @ down) * mask * gradient).sum().backward()
    expected = down.grad.clone(), up.grad.clone()
    experts.weight.grad = gradient
    adapter.take_gradient(mask, 0.5)
    torch.testing.assert_close((down.grad, up.grad), expected)
    assert experts.weight.grad is None


# ------------------------------------------------------------------------------------------------ ways to train


def test_accumulated_gradients_are_those_of_one_large_batch() -> None:
    class Halves(MLP):
        def build(self, dropout: float) -> nn.Sequential:
            net = super().build(dropout)
            net[1] = nn.LayerNorm(8)
            return net

        def train_dataloader(self) -> Any:
            loader = super().train_dataloader()
            return torch.utils.data.DataLoader(loader.dataset, self.batch)

    ends = []
    for batch, times in ((8, 1), (4, 2)):
        model = pruned(Halves)
        model.batch = batch
        fit(model, MaskedAdapters(2), accumulate_grad_batches=times, max_epochs=EPOCHS, limit_val_batches=0)
        ends.append(weights(model))
    for name, weight in ends[0].items():
        torch.testing.assert_close(weight, ends[1][name], rtol=0, atol=1e-5)


def test_weights_in_bfloat16_have_factors_in_single_precision() -> None:
    model = pruned(optimizer="adam")
    fit(model, callback := MaskedAdapters(2), precision="bf16-true", max_epochs=EPOCHS)
    assert model.net[0].weight.dtype == torch.bfloat16
    assert callback.state.down["net.0.weight"].dtype == torch.float32
    assert agrees(model, callback.masks)
    state = callback.state
    for name in state.down:
        exact = state.base[name].float() + 2.0 * (state.up[name] @ state.down[name])
        assert torch.equal(model.get_parameter(name), (exact * callback.masks[name]).bfloat16())


def test_manual_optimization_with_two_optimizers() -> None:
    model = pruned(TwoOptimizers)
    before = start(model)
    fit(model, callback := MaskedAdapters(2, train=()), max_epochs=EPOCHS)
    assert sorted(changed(model, before)) == WEIGHTS
    for name, weight in merged(callback, before, 2.0).items():
        assert torch.equal(model.get_parameter(name), weight)


def test_groups_keep_their_options_names_and_schedulers() -> None:
    class Grouped(MLP):
        def configure_optimizers(self) -> Any:
            groups = [
                {"params": list(self.net[:4].named_parameters()), "lr": 0.1},
                {"params": list(self.net[4:].named_parameters()), "lr": 0.0},
            ]
            optimizer = torch.optim.SGD(groups, momentum=0.9)
            halving = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda epoch: 0.5**epoch] * 2)
            return [optimizer], [halving]

    model = pruned(Grouped)
    before = start(model)
    trainer = fit(model, MaskedAdapters(2))
    assert all(name.startswith(("net.0", "net.1")) or name not in changed(model, before) for name in before)
    first, second = trainer.optimizers[0].param_groups
    assert (first["lr"], second["lr"]) == (0.025, 0.0)
    names = ["0.weight", "0.weight.down", "0.weight.up", "0.bias", "1.weight", "1.bias"]
    assert first["param_names"] == names
    assert [tuple(parameter.shape) for parameter in first["params"]][:3] == [(8, 6), (2, 6), (8, 2)]


def test_optimizers_have_no_state_of_the_weights() -> None:
    model = pruned(optimizer="adam")
    optimizer = fit(model, MaskedAdapters(1)).optimizers[0]
    assert not {name for name, parameter in model.named_parameters() if parameter in optimizer.state} & {*WEIGHTS}


# ------------------------------------------------------------------------------------------------ again


def test_a_later_fit_starts_from_the_weights_that_are_there() -> None:
    model, callback = pruned(), MaskedAdapters(2)
    fit(model, callback)
    between = start(model)
    fit(model, callback)
    for name, weight in merged(callback, between, 2.0).items():
        assert torch.equal(model.get_parameter(name), weight)
    other = pruned(seed=1)
    expected, fresh = copy.deepcopy(other), MaskedAdapters(2)
    fit(other, callback)
    fit(expected, fresh)
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name))


def test_a_checkpoint_is_that_of_the_plain_model_and_small(tmp_path: Path) -> None:
    model = pruned(amount=0.9)
    keys = list(model.state_dict())
    fit(model, MaskedAdapters(1), ModelCheckpoint(tmp_path, "last"), enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == keys
    MLP().load_state_dict(saved["state_dict"])
    (state,) = (value for key, value in saved["callbacks"].items() if "MaskedAdapters" in key)
    kept = sum(int((weight != 0).sum()) for weight in weights(model).values())
    assert sum(values.numel() for values in state["base"].values()) == kept


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
def test_another_rank_or_strength_is_refused_when_resumed(tmp_path: Path) -> None:
    fit(pruned(), MaskedAdapters(2), ModelCheckpoint(tmp_path, "last"), enable_checkpointing=True, max_epochs=1)
    for other in (MaskedAdapters(3), MaskedAdapters(2, alpha=1.0), MaskedAdapters(2, train=("bias",))):
        with pytest.raises(ValueError, match="arguments of MaskedAdapters must be those of the checkpoint"):
            fit(pruned(), other, ckpt_path=str(tmp_path / "last.ckpt"))


def test_a_layer_that_is_replaced_loses_its_adapter() -> None:
    model = pruned()

    def replace(trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            module.net[4] = nn.Linear(8, 10)

    callback = MaskedAdapters(2)
    with pytest.warns(UserWarning, match=re.escape("drops the adapters of ['net.4.weight']")):
        fit(model, On(on_train_epoch_start=replace), callback, max_epochs=EPOCHS)
    assert list(callback.state.down) == ["net.0.weight", "net.6.weight"]
    assert agrees(model, callback.masks)


# ------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": -1}, "rank must be"),
        ({"alpha": 0.0}, "alpha must be"),
        ({"train": "bias"}, "train must be a sequence"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedAdapters(**arguments)


def test_a_pattern_that_matches_nothing_lists_close_names() -> None:
    with pytest.raises(ValueError, match=r"train must match a parameter, got 'net\.7\.weight'; close names: .*net\.6"):
        fit(pruned(), MaskedAdapters(2, train=("net.7.weight",)))


def with_optimizer(make: Callable[..., torch.optim.Optimizer]) -> LightningModule:
    model = pruned()
    model.configure_optimizers = lambda: make(model.parameters(), 0.1)
    return model


class Stepping(MLP):
    """Steps by hand with an optimizer that runs the model a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return SAM(self.parameters(), 0.1)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (partial(with_optimizer, torch.optim.LBFGS), "LBFGS"),
        (partial(with_optimizer, SAM), "SAM"),
        (Stepping, "SAM"),
    ],
)
def test_an_optimizer_that_runs_the_model_inside_its_step(make: Callable[[], LightningModule], name: str) -> None:
    with pytest.raises(ValueError, match=f"must not run the model inside its step for MaskedAdapters, got {name}"):
        fit(make(), MaskedAdapters(2))


def test_uninitialised_parameters() -> None:
    class Lazy(MLP):
        def build(self, dropout: float) -> nn.Sequential:
            return nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3))

    with pytest.raises(ValueError, match="got uninitialised ones: run a batch through the model"):
        fit(Lazy(), MaskedAdapters(2))


def test_a_sparse_gradient_names_the_parameter() -> None:
    class Words(MLP):
        def build(self, dropout: float) -> nn.Sequential:
            return nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(24, 3))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.net(inputs.abs().long().clamp(max=8))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), self.lr)

    with pytest.raises(ValueError, match=re.escape("'net.0.weight' must have a dense gradient for MaskedAdapters")):
        fit(Words(), MaskedAdapters(2, targets=["*.weight"]))
    model = Words()
    before = start(model)
    fit(model, MaskedAdapters(2))  # which is not trained
    assert changed(model, before) == ["net.2.weight", "net.2.bias"]
