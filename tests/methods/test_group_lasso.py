"""GroupLasso: against loops written by hand, and beside the callbacks that prune."""

import copy
import re
from typing import Any

import distributed
import pytest
import torch
from lightning.pytorch import LightningModule
from models import BATCHES, MLP, Attending, ConvNet, Deep, On, TwoOptimizers, agrees, fit, weights
from ranks import run
from torch import Tensor, nn

from lightning_prune import NM, Block, Channel, ConstantSparsity, GroupLasso, Head, Layer, Pruning, Weight

EPOCHS = 2
STEPS = EPOCHS * BATCHES


def write(model: LightningModule, *callbacks: Any, **given: Any) -> LightningModule:
    fit(model, *callbacks, **{"max_epochs": EPOCHS, "limit_val_batches": 0, **given})
    return model


def coupled(kind: type[ConvNet] = ConvNet, **given: Any) -> ConvNet:
    model = kind(**given)
    model.example_input_array = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    return model


def parts(net: nn.Sequential) -> list[list[tuple[nn.Parameter, Tensor]]]:
    """The channels of both convolutions: parameters, and which channel each element belongs to."""
    first, norm, second, behind, head = (net[i] for i in (0, 1, 3, 4, 8))
    six, four = torch.arange(6), torch.arange(4)
    return [
        [
            *((first.weight, six.view(6, 1, 1, 1)), (norm.weight, six), (norm.bias, six)),
            (second.weight, six.view(1, 6, 1, 1)),
        ],
        [
            *((second.weight, four.view(4, 1, 1, 1)), (second.bias, four)),
            *((behind.weight, four), (behind.bias, four), (head.weight, four.repeat_interleave(4).view(1, 16))),
        ],
    ]


def force(members: list[tuple[nn.Parameter, Tensor]], growth: float) -> tuple[Tensor, Tensor]:
    """The norm of each channel, and how hard it is pressed, one channel at a time."""
    count = len(members[0][0])
    norms = torch.stack(
        [sum((p * (ids == c)).square().sum() for p, ids in members).sqrt() for c in range(count)]  # type: ignore[union-attr]
    )
    span = norms.max() - norms.min()
    return norms, torch.stack([2 ** (growth * (norms.max() - norm) / span) for norm in norms])


def by_hand(strength: float, growth: float, squared: bool, proximal: bool, first: int, last: int) -> ConvNet:
    model = coupled().double()
    optimizer = torch.optim.SGD(model.parameters(), model.lr, momentum=0.9, weight_decay=1e-3)
    for step in range(STEPS):
        images, labels = list(model.train_dataloader())[step % BATCHES]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images.double()), labels).backward()
        for act in ("add", "step", "shrink"):
            if act == "step":
                optimizer.step()
            if act == ("shrink" if proximal else "add") and first <= step < last:
                with torch.no_grad():
                    forces = [force(members, growth) for members in parts(model.net)]
                    for members, (norms, pressed) in zip(parts(model.net), forces, strict=True):
                        factors = strength * pressed if squared else strength * pressed / norms
                        for parameter, channel in members:
                            factor = factors[channel]
                            if act == "add":
                                parameter.grad.add_(factor * parameter)
                            else:
                                step_size = model.lr * factor
                                parameter.mul_(1 / (1 + step_size) if squared else (1 - step_size).clamp(min=0))
    return model


class Double(ConvNet):
    def on_before_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        return [batch[0].double(), batch[1]]


@pytest.mark.parametrize("proximal", [False, True])
@pytest.mark.parametrize(("growth", "squared"), [(0.0, False), (4.0, False), (4.0, True)])
def test_it_is_the_loop_written_by_hand(growth: float, squared: bool, proximal: bool) -> None:
    given: Any = {"growth": growth, "squared": squared, "proximal": proximal}
    model = coupled(Double).double()
    model.example_input_array = model.example_input_array.double()
    write(model, GroupLasso(0.02, Channel(coupled=True), start=2, end=6, **given))
    wanted, free = by_hand(0.02, **given, first=2, last=6), by_hand(0.02, **given, first=0, last=0)
    for found, other, without in zip(*(net.parameters() for net in (model, wanted, free)), strict=True):
        torch.testing.assert_close(found, other, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(found, without, rtol=1e-4)


class Plain(ConvNet):
    """Without momentum and weight decay."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr)


@pytest.mark.parametrize("proximal", [False, True])
def test_without_overlaps_it_is_the_loop_bit_by_bit(proximal: bool) -> None:
    """Rows with their biases and norms: in this order no element belongs to two channels."""
    model, wanted = Plain(), Plain()
    write(model, GroupLasso(0.05, Channel(coupled=False), proximal=proximal, targets=["net.0.weight", "net.3.weight"]))
    optimizer = wanted.configure_optimizers()
    rows = [[wanted.net[0].weight, wanted.net[1].weight, wanted.net[1].bias]]
    rows += [[wanted.net[3].weight, wanted.net[3].bias, wanted.net[4].weight, wanted.net[4].bias]]
    for step in range(STEPS):
        images, labels = list(wanted.train_dataloader())[step % BATCHES]
        optimizer.zero_grad()
        nn.functional.cross_entropy(wanted(images), labels).backward()
        if proximal:
            optimizer.step()
        with torch.no_grad():
            for members in rows:
                squares = [p.square() if p.ndim == 1 else p.square().sum((1, 2, 3)) for p in members]
                norm = sum(squares).sqrt()  # type: ignore[union-attr]
                factor = torch.full_like(norm, 0.05) / norm
                for p in members:
                    shaped = factor.view(-1, *[1] * (p.ndim - 1))
                    if proximal:  # soft thresholding of the norm
                        p.mul_((1 - wanted.lr * shaped).clamp(min=0))
                    else:
                        p.grad.add_(p * shaped)
        if not proximal:
            optimizer.step()
    for (name, found), other in zip(model.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(found, other), name


def test_proximal_steps_take_norms_down_to_zero_exactly() -> None:
    """With a gradient of zero, a norm falls by the learning rate times the strength in every step."""
    model = Plain(lr=0.5)
    model.training_step = lambda batch, batch_idx: 0.0 * model(batch[0]).sum()  # type: ignore[method-assign]
    before = model.net[0].weight.detach().clone().flatten(1)
    joined = torch.cat([before, torch.ones(6, 1), torch.zeros(6, 1)], 1)  # with the entries of the norm
    write(model, GroupLasso(0.05, Channel(coupled=False), proximal=True, targets=["net.0.weight"]))
    wanted = joined.norm(dim=1) - STEPS * 0.5 * 0.05
    after = torch.cat([model.net[0].weight.flatten(1), model.net[1].weight[:, None], model.net[1].bias[:, None]], 1)
    torch.testing.assert_close(after.norm(dim=1), wanted.clamp(min=0))
    assert wanted.min() > 0
    write(model, GroupLasso(0.5, Channel(coupled=False), proximal=True, targets=["net.0.weight"]))
    assert not model.net[0].weight.any()
    assert torch.isfinite(model.net[1].weight).all()


@pytest.mark.parametrize("proximal", [False, True])
@pytest.mark.parametrize("growth", [0.0, 4.0])
def test_channels_that_are_pruned_get_nothing(growth: float, proximal: bool) -> None:
    """A pruned channel stays at zero without a NaN anywhere, and counts in no other channel's force."""
    lasso, seen = GroupLasso(0.05, Channel(coupled=True), growth=growth, proximal=proximal), []
    gradual = Pruning(0.5, granularity=Channel(coupled=True), schedule="linear", start=0, end=7, scope="local")

    def look(trainer: Any, module: Any, optimizer: Any) -> None:
        dead = module.net[0].weight.flatten(1).eq(0).all(1)
        seen.append((int(dead.sum()), module.net[0].weight.grad[dead].abs().sum().item()))

    model = coupled(lr=0.01)
    model.zero_grad()
    write(model, gradual, lasso, On(on_before_optimizer_step=look))
    assert [count for count, _ in seen][-1] == 3
    assert any(0 < count < 3 for count, _ in seen)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert agrees(model, gradual.masks)


def test_a_model_of_zeros_stays_finite() -> None:
    for growth, squared, proximal in [(4.0, False, False), (0.0, True, False), (4.0, False, True), (4.0, True, True)]:
        model = Plain()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        write(model, GroupLasso(0.1, growth=growth, squared=squared, proximal=proximal))
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("proximal", [False, True])
def test_beside_pruning_the_counts_are_exact_and_it_ends_with_the_target(proximal: bool) -> None:
    lasso = GroupLasso(0.05, Channel(coupled=True), proximal=proximal)
    pruning = Pruning(0.5, granularity=Channel(coupled=True), schedule="one_shot", start=4)
    logged: list[bool] = []
    look = On(on_train_batch_end=lambda trainer, *_: logged.append("group_lasso/penalty" in trainer.callback_metrics))
    values: list[float] = []
    each = On(
        on_train_batch_end=lambda trainer, *_: values.append(float(trainer.callback_metrics["group_lasso/penalty"]))
    )
    model = write(coupled(), lasso, pruning, look, each)
    assert [int((model.net[i].weight.flatten(1) == 0).all(1).sum()) for i in (0, 3)] == [3, 2]
    assert logged == [True] * STEPS
    assert len(set(values[:4])) == 4
    assert len(set(values[3:])) == 1  # of the fourth step; none was added after it


def test_it_makes_what_is_pruned_small() -> None:
    lost = []
    for strength in (1e-9, 0.05):
        before: list[dict[str, Tensor]] = []
        pruning = Pruning(0.5, granularity=Channel(coupled=True), schedule="one_shot", start=39)
        look = On(on_train_batch_start=lambda trainer, module, *_, seen=before: seen.append(weights(module)))
        write(coupled(), GroupLasso(strength, Channel(coupled=True), growth=4.0), pruning, look, max_epochs=10)
        last, whole = before[38], sum(float(weight.square().sum()) for weight in before[38].values())
        gone = {name: mask for name, mask in pruning.masks.items() if name in last}
        lost.append(sum(float(last[name][~mask].square().sum()) for name, mask in gone.items()) / whole)
    assert lost[1] < 0.5 * lost[0], lost


@pytest.mark.parametrize("proximal", [False, True])
@pytest.mark.parametrize("make", [coupled, TwoOptimizers])
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(tmp_path: Any, make: Any, proximal: bool) -> None:
    """Also of a longer run: where the window is stays as it was."""

    def callbacks() -> list[Any]:
        lasso = GroupLasso(0.02, growth=2.0, proximal=proximal, schedule="linear", start=1, end=1.0)
        return [lasso, Pruning(0.5, granularity=Channel(), schedule="one_shot", start=10)]

    whole = write(make(), *callbacks(), max_epochs=3)
    for epoch in (0, 1):
        path = str(tmp_path / f"{epoch}.ckpt")

        def save(trainer: Any, _: Any, at: int = epoch, to: str = path) -> None:
            if trainer.current_epoch == at:
                trainer.save_checkpoint(to)

        write(make(), *callbacks(), On(on_train_epoch_end=save), max_epochs=3)
        again = write(make(seed=5), *callbacks(), ckpt_path=path, max_epochs=3)
        for (name, found), other in zip(again.named_parameters(), whole.parameters(), strict=True):
            assert torch.equal(found, other), (epoch, name)


def test_a_longer_resumed_run_does_not_move_the_window(tmp_path: Any) -> None:
    path, lasso = str(tmp_path / "a.ckpt"), GroupLasso(0.02, end=0.5)
    write(Plain(), lasso, On(on_train_end=lambda trainer, _: trainer.save_checkpoint(path)))
    assert lasso.state_dict() == {"version": 1, "steps": STEPS, "window": [0, STEPS // 2]}
    longer = GroupLasso(0.02, end=0.5)
    write(Plain(), longer, ckpt_path=path, max_epochs=2 * EPOCHS)
    assert longer.state_dict()["window"] == [0, STEPS // 2]


def test_its_strength_follows_the_schedule() -> None:
    """Halves of the squares of a model that does not learn: the penalty that is logged is the strength that is due."""
    values: list[float] = []
    model = Plain(lr=0.0)
    look = On(
        on_train_batch_end=lambda trainer, *_: values.append(
            float(trainer.callback_metrics.get("group_lasso/penalty", 0))
        )
    )
    write(model, GroupLasso(0.1, squared=True, schedule="linear", start=1, end=5, targets=["net.3.weight"]), look)
    size = sum(p.square().sum().item() for p in model.net[3:5].parameters()) / 2
    assert values[2:5] == pytest.approx([0.1 * at / 4 * size for at in (1, 2, 3)])
    assert values[5:] == [values[4]] * 3  # the last that was logged


def test_coupled_channels_are_found_with_the_first_batch() -> None:
    model = ConvNet()
    wanted = write(coupled(), GroupLasso(0.05, Channel(coupled=True), growth=2.0))
    write(model, GroupLasso(0.05, Channel(coupled=True), growth=2.0))
    assert all(map(torch.equal, model.parameters(), wanted.parameters()))


def test_blocks_of_weights_are_units_too() -> None:
    before, after = MLP(), write(MLP(), GroupLasso(0.05, Block(2, 2)))
    assert not torch.equal(before.net[0].weight, after.net[0].weight)


def test_heads_are_units_too() -> None:
    lasso, model = GroupLasso(0.3, Head(), proximal=True), Attending(lr=1e-3)
    before = float(model.net[0].q.weight.detach().norm())
    write(model, lasso)
    assert float(model.net[0].q.weight.detach().norm()) < before


@pytest.mark.parametrize("granularity", [Weight(), NM(2, 4), Layer()])
def test_single_weights_and_whole_layers_are_no_units(granularity: Any) -> None:
    with pytest.raises(ValueError, match="granularity must form units of several elements of a weight, such as"):
        write(Deep(), GroupLasso(0.05, granularity))


def test_outputs_of_the_model_are_pressed_only_if_they_are_named() -> None:
    free, pressed = write(MLP(lr=1e-9)), write(MLP(lr=1e-9), GroupLasso(1e6, proximal=True))
    assert torch.equal(free.net[6].bias, pressed.net[6].bias)
    named = write(MLP(lr=1e-9), GroupLasso(1e6, proximal=True, targets=["net.6.weight"]))
    assert not torch.equal(free.net[6].bias, named.net[6].bias)


def test_a_run_in_which_there_was_nothing_to_do_says_so() -> None:
    with pytest.warns(UserWarning, match="GroupLasso did nothing in this run"):
        write(MLP(), GroupLasso(0.1), ConstantSparsity())


def test_a_copy_holds_no_model() -> None:
    copies: list[GroupLasso] = []
    lasso = GroupLasso(0.1)
    write(MLP(), lasso, On(on_train_batch_end=lambda *_: copies.append(copy.deepcopy(lasso))))
    assert copies[3].state_dict()["steps"] in (3, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strength": 0}, "strength must be above 0"),
        ({"strength": float("nan")}, "strength must be above 0"),
        ({"growth": -1.0}, "growth must be in [0, 64]"),
        ({"squared": 1}, "squared must be"),
        ({"proximal": "yes"}, "proximal must be"),
        ({"start": 0.6, "end": 0.5}, "start must not lie after end"),
        ({"granularity": "channel"}, "granularity must be"),
        ({"schedule": "steep"}, "schedule must be"),
    ],
)
def test_wrong_arguments_are_errors(given: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        GroupLasso(**given)


def test_what_does_not_fit_a_run_is_an_error_before_training() -> None:
    with pytest.raises(ValueError, match="optimizer must step by the gradients alone for GroupLasso, got LBFGS"):
        write(MLP(optimizer="lbfgs"), GroupLasso())
    with pytest.raises(ValueError, match="targets"):
        write(MLP(), GroupLasso(targets=["nothing.*"]))
    with pytest.raises(ValueError, match="start must be an int where the length of the run is unknown"):
        write(MLP(), GroupLasso(), max_epochs=-1, max_steps=-1)
    with pytest.raises(ValueError, match=re.escape("Head(")):
        write(coupled(), GroupLasso(granularity=Head()))


class Words(MLP):
    """Embeds words, with sparse gradients."""

    def build(self, dropout: float) -> nn.Sequential:
        return nn.Sequential(
            nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs.abs().long().clamp(max=8))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr)


def test_a_sparse_gradient_is_an_error_that_names_the_parameter() -> None:
    with pytest.raises(ValueError, match=re.escape("'net.0.weight' must have a dense gradient for GroupLasso")):
        write(Words(), GroupLasso(targets=["net.0.weight"]))
    write(Words(), GroupLasso())


def test_a_damaged_state_is_an_error() -> None:
    with pytest.raises(ValueError, match=re.escape("the state of GroupLasso must have")):
        GroupLasso().load_state_dict({"steps": 3, "window": [4, 1]})


# ------------------------------------------------------------------------------------------- several ranks


def pressed_on_ranks(layout: distributed.Layout, proximal: bool) -> dict[str, Tensor]:
    model, channels = distributed.Net(layout), Channel(coupled=False)
    lasso = GroupLasso(0.05, channels, growth=2.0, proximal=proximal, targets=["net.0.weight", "net.3.weight"])
    distributed.fit(model, lasso, Pruning(0.4, granularity=channels, schedule="one_shot", start=5))
    return distributed.result(model, {})["weights"]


@pytest.mark.distributed
@pytest.mark.parametrize(("layout", "proximal"), [("ddp", False), ("fsdp", False), ("fsdp", True)])
def test_two_ranks_learn_what_one_process_learns(layout: distributed.Layout, proximal: bool) -> None:
    """Norms are those of whole channels, of which each rank has a part."""
    alone, free = pressed_on_ranks("one", proximal), distributed.Net()
    distributed.fit(free, Pruning(0.4, granularity=Channel(coupled=False), schedule="one_shot", start=5))
    assert (alone["net.0.weight"] - free.net[0].weight).abs().max() > 0.005
    for found in run(pressed_on_ranks, 2, layout, proximal):
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
