"""Example inputs are those with which the training step calls the model, whatever a batch looks like."""

from typing import Any

import torch
from models import MLP, fit
from torch import Tensor, nn

from lightning_prune import Channel, MagnitudePruning, PruningAtInit
from lightning_prune.models.forward import call
from lightning_prune.training.step_inputs import inputs_of_step


class Keyed(MLP):
    """Takes its inputs from the second part of a batch, by keyword, beside a flag."""

    steps = 0

    def forward(self, scale: float, inputs: Tensor) -> Tensor:  # type: ignore[override]
        return self.net(inputs) * scale

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        labels, data = batch[1], {"inputs": batch[0]}
        torch.rand(1)
        loss = nn.functional.cross_entropy(self(2.0, **data), labels)
        self.steps += 1
        self.log("loss", loss)
        return loss


def reversed_batch() -> list[Any]:
    inputs, labels = next(iter(MLP().train_dataloader()))
    return [inputs, labels]


def test_coupled_channels_need_no_example_where_a_batch_is_no_input() -> None:
    for callback in (
        MagnitudePruning(0.5, granularity=Channel(coupled=True), schedule="one_shot", start=0),
        PruningAtInit(0.5, granularity=Channel(coupled=True)),
    ):
        model = Keyed()
        fit(model, callback, max_epochs=1, limit_val_batches=0)
        assert callback.sparsity_now > 0.3
        assert not model.net[0].bias[~callback.masks["net.0.bias"]].any()  # coupled
        assert "net.0.bias" in callback.masks
        assert model.steps == 4


def test_the_step_that_is_looked_at_leaves_nothing_behind() -> None:
    model = Keyed()
    callback = MagnitudePruning(0.5, granularity=Channel(coupled=True), schedule="one_shot", start=0)
    fit(model, callback, max_epochs=1, limit_val_batches=0)
    batch, state = reversed_batch(), torch.random.get_rng_state()
    inputs = inputs_of_step(model, batch)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert list(inputs) == ["scale", "inputs"]
    assert torch.equal(inputs["inputs"], batch[0])
    assert call(model, inputs).shape == (8, 3)
    assert model.steps == 4


def test_failing_that_the_first_part_of_a_batch_serves() -> None:
    model, batch = MLP(), reversed_batch()
    model.training_step = None  # type: ignore[assignment, method-assign]
    assert inputs_of_step(model, batch) is batch[0]
