"""Models that hold on to tensors of a graph are copied all the same: as teachers, and for trials."""

import threading
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torchmetrics
from models import MLP, fit
from test_distillation import expert
from torch import Tensor, nn

from lightning_prune import Channel, Distillation, MagnitudePruning, Pruning, PruningAtInit
from lightning_prune.methods.gradient_injection import tensor_in
from lightning_prune.models.copying import copied


class Measured(MLP):
    """Feeds its loss to a metric and logs that, and keeps what it has computed."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.example_input_array = torch.zeros(2, 6)
        self.mean = torchmetrics.MeanMetric()
        self.kept: dict[str, Any] = {}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.mean(loss)
        self.log("mean", self.mean)
        self.kept["losses"] = [(loss, partial(torch.add, loss))]
        return loss


def test_a_copy_has_the_values_and_no_graph() -> None:
    model = MLP()
    model.loss = {"all": [(model.net(torch.ones(2, 6)).sum(), "a word")]}
    model.register_buffer("seen", model.net[0].weight * 2)
    model.method = model.net[0].forward
    copy = copied(model)
    assert copy.loss["all"][0][0].equal(model.loss["all"][0][0])
    assert copy.loss["all"][0][0].grad_fn is None
    assert copy.seen.equal(model.seen)
    assert copy.seen is not model.seen
    assert copy.method.__self__ is copy.net[0]
    assert copy.net[0].weight.requires_grad
    assert copy.net[0].weight is not model.net[0].weight


@pytest.mark.parametrize("start", [0, 3])
def test_a_model_with_a_metric_of_its_loss_teaches_itself(start: int) -> None:
    plain, model = MLP(), Measured()
    for each in (plain, model):
        fit(each, MagnitudePruning(0.5, start=start, end=6), Distillation())
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_it_shrinks_when_training_ends() -> None:
    model = Measured()
    fit(
        model, Pruning(0.5, granularity=Channel(), schedule="one_shot", start=2, shrink_at_end=True, targets=("net.*",))
    )
    assert model.net[0].out_features < 8


def test_it_is_pruned_in_a_second_fit_at_its_beginning() -> None:
    model = Measured()
    fit(model, max_epochs=1)
    callback = PruningAtInit(0.5)
    fit(model, callback, max_epochs=1)
    assert callback.sparsity_now == 0.5


def test_a_model_that_nothing_can_copy_is_refused_before_the_first_step() -> None:
    model = MLP()
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"teacher must be a module where copy.deepcopy cannot copy the model, got"):
        fit(model, MagnitudePruning(0.5, start=3, end=6), Distillation())
    assert model.trainer.global_step == 0


@dataclass
class Output:
    """What forecasting models return."""

    hidden: None
    prediction: Tensor


@dataclass
class Classified:
    """With logits that are not the first."""

    embedding: Tensor
    logits: Tensor


Pair = namedtuple("Pair", ["prediction", "state"])


@pytest.mark.parametrize(
    "wrap",
    [
        partial(Output, None),
        lambda logits: Classified(logits[:, :1], logits),
        lambda logits: {"loss": logits.sum(), "steps": torch.zeros(2).long(), "prediction": logits},
        lambda logits: Pair(logits, None),
        lambda logits: (Output(None, logits), logits.sum()),
        lambda logits: [logits],
    ],
    ids=["dataclass", "logits", "dict", "namedtuple", "nested", "list"],
)
def test_outputs_with_names_are_taught(wrap: Any) -> None:
    class Wrapped(MLP):
        def forward(self, inputs: Tensor) -> Any:
            return wrap(super().forward(inputs))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(tensor_in(self(batch[0])), batch[1])

    class Teacher(Wrapped):
        def __init__(self) -> None:
            super().__init__()
            self.net = expert().net

    plain, model = MLP(), Wrapped()
    fit(plain, Distillation(expert()), limit_val_batches=0)
    fit(model, Distillation(Teacher()), limit_val_batches=0)
    assert (plain.net[6].weight - MLP().net[6].weight).abs().max() > 0.01
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name))


@pytest.mark.parametrize("output", [{}, (), None, {"loss": torch.ones(1)}, {"ids": torch.ones(1).long()}, "logits"])
def test_outputs_without_a_tensor_are_refused(output: Any) -> None:
    with pytest.raises(ValueError, match="the output must be a tensor, a tuple that begins with one, or a mapping or"):
        tensor_in(output)
