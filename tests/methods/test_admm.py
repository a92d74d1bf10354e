"""ADMM: against a loop written by hand, bit by bit, and what its weights are before and after the masks are set."""

import re
from typing import Any

import pytest
import torch
from models import BATCHES, MLP, ConvNet, MaskRecorder, On, agrees, fit, size, weights, zeros
from torch import Tensor, nn

from lightning_prune import ADMM, Channel

EPOCHS, FIRST, LAST, EVERY = 3, 1, 9, 2


def write(callback: ADMM, model: nn.Module | None = None, *others: Any) -> MLP:
    model = MLP() if model is None else model
    fit(model, callback, *others, max_epochs=EPOCHS, limit_val_batches=0)
    return model


def projected(weights: list[Tensor], sparsity: float) -> list[Tensor]:
    """Masks of the largest weights, over all layers."""
    flat = torch.cat([weight.abs().flatten() for weight in weights])
    pruned = round(sparsity * len(flat))
    mask = torch.ones(len(flat), dtype=torch.bool).index_fill(0, flat.argsort(stable=True)[:pruned], False)
    parts = mask.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]


@torch.no_grad()
def by_hand(sparsity: float, penalty: float) -> MLP:
    """The augmented Lagrangian as the paper writes it: w by the optimizer, z by projection, u by summing up."""
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), model.lr, momentum=0.9, weight_decay=1e-3)
    pruned = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    z, u = [], [torch.zeros_like(w) for w in pruned]
    masks: list[Tensor] = []
    for step in range(EPOCHS * BATCHES):
        batch = list(model.train_dataloader())[step % BATCHES]
        if FIRST <= step < LAST and (step - FIRST) % EVERY == 0:
            v = [w + dual for w, dual in zip(pruned, u, strict=True)]
            z = [w * mask for w, mask in zip(v, projected(v, sparsity), strict=True)]
            u = [w - split for w, split in zip(v, z, strict=True)]
        if step == LAST:
            masks = projected(pruned, sparsity)
            for w, mask in zip(pruned, masks, strict=True):
                w.mul_(mask)
                optimizer.state[w]["momentum_buffer"].mul_(mask)
        optimizer.zero_grad()
        with torch.enable_grad():
            nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        for w, split, dual in zip(pruned, z, u, strict=True) if z and not masks else ():
            w.grad.add_(w - (split - dual), alpha=penalty)
        optimizer.step()
        for w, mask in zip(pruned, masks, strict=True) if masks else ():
            w.mul_(mask)
    return model


@pytest.mark.parametrize(("sparsity", "penalty"), [(0.5, 0.1), (0.8, 1.0)])
def test_it_is_the_loop_of_the_paper_bit_by_bit(sparsity: float, penalty: float) -> None:
    model = write(ADMM(sparsity, penalty, start=FIRST, end=LAST, frequency=EVERY))
    wanted = by_hand(sparsity, penalty)
    for (name, found), other in zip(model.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(found, other), name


def test_no_weight_is_zero_before_the_masks_are_set() -> None:
    callback = ADMM(0.6, start=0, end=8, frequency=3)
    recorder = MaskRecorder(callback)
    model = write(callback, None, recorder)
    pruned = round(0.6 * size(model))
    assert recorder.counts == [0] * 8 + [pruned] * (EPOCHS * BATCHES - 8 + 1)
    assert zeros(model) == pruned
    assert agrees(model, callback.masks)


def test_the_penalty_takes_the_weights_to_a_sparse_copy() -> None:
    """How little the masks take is what training under the penalty is for."""
    lost = []
    for penalty in (1e-6, 0.1):
        before: list[dict[str, Tensor]] = []
        callback, model = ADMM(0.6, penalty, start=0, end=39, frequency=3), MLP()
        look = On(on_train_batch_start=lambda trainer, module, *_, seen=before: seen.append(weights(module)))
        fit(model, callback, look, max_epochs=10, limit_val_batches=0)
        last, whole = before[38], sum(float(weight.square().sum()) for weight in before[38].values())
        lost.append(sum(float(last[name][~mask].square().sum()) for name, mask in callback.masks.items()) / whole)
    assert lost[1] < 0.5 * lost[0], lost


def test_what_a_projection_leaves_is_no_reason_to_warn(recwarn: pytest.WarningsRecorder) -> None:
    told = "leaves no unit|leaves one unit"
    write(ADMM({"net.0.*": 0.99, "*": 0.5}, start=0, end=50, frequency=3))  # the run ends before
    assert not [warning for warning in recwarn if re.search(told, str(warning.message))]
    with pytest.warns(UserWarning, match=told):
        write(ADMM({"net.0.*": 0.99, "*": 0.5}, start=0, end=8, frequency=3))


def test_channels_are_projected_with_all_that_goes_with_them() -> None:
    callback, model = ADMM(0.5, 0.5, granularity=Channel(), start=0, end=8, frequency=2), ConvNet()
    seen: list[set[str]] = []
    look = On(on_train_batch_end=lambda *_: seen.append(set(callback.state.centers)))
    write(callback, model, look)
    assert {"net.0.weight", "net.1.weight", "net.1.bias", "net.3.weight"} <= seen[3]
    assert seen[-1] == set()  # nothing is kept of it once the masks are set
    assert [int((model.net[i].weight.flatten(1) == 0).all(1).sum()) for i in (0, 3)] == [3, 2]


@pytest.mark.parametrize("given", [0, -1.0, float("nan"), float("inf"), "strong"])
def test_a_penalty_is_a_number_above_zero(given: Any) -> None:
    with pytest.raises(ValueError, match=re.escape("penalty must be above 0")):
        ADMM(0.5, given)


def test_an_optimizer_that_compares_losses_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="optimizer must step by the gradients alone for ADMM, got LBFGS"):
        write(ADMM(0.5), MLP(optimizer="lbfgs"))


class Words(MLP):
    """Embeds words, with sparse gradients."""

    def build(self, dropout: float) -> nn.Sequential:
        return nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(24, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs.abs().long().clamp(max=8))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr)


def test_a_sparse_gradient_is_an_error_that_names_the_parameter() -> None:
    with pytest.raises(ValueError, match=re.escape("'net.0.weight' must have a dense gradient for ADMM")):
        write(ADMM(0.5, targets=["*.weight"]), Words())
    write(ADMM(0.5, targets=["net.2.weight"]), Words())
