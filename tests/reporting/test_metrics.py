"""Metrics: counted by hand, logged by a LightningModule, and the same on one rank and on several, sharded or not."""

from typing import Any

import distributed
import pytest
import torch
from distributed import Layout, Net
from models import MLP, fit
from ranks import run
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics import MetricCollection

from lightning_prune import ActiveFLOPs, ActiveParameters, Channel, MaskOverlap, Pruning, Sparsity, prune, sparsity
from lightning_prune.models.flops import dense_flops, sparse_flops


def two_layers() -> nn.Sequential:
    """Return layers of 12 and 8 weights, with 3 and 4 zeros among them."""
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2), nn.Linear(2, 4, bias=False))
    with torch.no_grad():
        model[0].weight.view(-1)[:3] = 0
        model[3].weight.view(-1)[:4] = 0
    return model


# ------------------------------------------------------------------------------------------------ sparsity


def test_sparsity_per_layer_and_in_total() -> None:
    metric = Sparsity(layers=True)
    metric.update(two_layers())
    assert {name: float(value) for name, value in metric.compute().items()} == {
        "total": pytest.approx(7 / 26),
        "0.weight": 0.25,
        "2.weight": 0.0,
        "3.weight": 0.5,
    }
    chosen = Sparsity(targets=["0.*", "3.*"], ignore=["re:0"])
    assert float(chosen(two_layers())) == 0.5
    with pytest.raises(ValueError, match="targets must match a parameter, got 'nope'"):
        Sparsity(targets=["nope"]).update(two_layers())


def test_sparsity_over_several_updates_is_their_mean_and_reset_forgets() -> None:
    model, metric = nn.Linear(4, 5), Sparsity()
    for level in (0.0, 0.5):
        prune(model, level)
        assert float(metric(model)) == level  # of this update alone
    assert float(metric.compute()) == 0.25
    metric.reset()
    metric.update(model)
    assert float(metric.compute()) == 0.5


# ------------------------------------------------------------------------------------------------ overlap


def test_overlap_is_the_jaccard_index_of_what_is_kept() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    metric = MaskOverlap(layers=True)
    values = ([[1.0, 0.0], [2.0, 3.0]], [[1.0, 4.0], [0.0, 3.0]], [[1.0, 4.0], [0.0, 3.0]])
    found = []
    for value in values:
        model[0].weight.data = torch.tensor(value)
        found.append({name: float(overlap) for name, overlap in metric(model).items()})
    assert found[0] == {"total": 1.0, "0.weight": 1.0, "1.weight": 1.0}  # nothing to compare yet
    assert found[1] == {"total": pytest.approx(4 / 6), "0.weight": 0.5, "1.weight": 1.0}
    assert found[2] == {"total": 1.0, "0.weight": 1.0, "1.weight": 1.0}
    assert float(metric.compute()["0.weight"]) == pytest.approx(5 / 7)


def test_overlap_of_masks_instead_of_weights() -> None:
    model, metric = nn.Linear(2, 2), MaskOverlap()
    for kept in ([[True, True], [False, False]], [[True, False], [True, False]]):
        metric.update(model, {"weight": torch.tensor(kept)})
    assert float(metric.compute()) == pytest.approx(1 / 3)
    assert float(metric(model)) == 0.5  # no mask any more: no weight is zero


def test_the_masks_that_are_remembered_do_not_follow_the_model() -> None:
    mask = torch.tensor([[True, True]])
    model, metric = nn.Linear(2, 1), MaskOverlap()
    metric.update(model, {"weight": mask})
    mask[0, 0] = False
    assert float(metric(model, {"weight": mask})) == 0.5


def test_overlap_and_sparsity_count_the_weights_of_frozen_models_alike() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).requires_grad_(False)
    model[0].bias.requires_grad_()  # as in a quantized model: nothing but biases is left to train
    overlap, level = MaskOverlap(layers=True), Sparsity(layers=True)
    assert overlap(model).keys() == level(model).keys() == {"total", "0.weight", "1.weight"}
    model[1].weight.requires_grad_()
    assert overlap(model).keys() == level(model).keys() == {"total", "1.weight"}


# ------------------------------------------------------------------------------------------------ amounts


def test_active_parameters_count_everything_that_is_not_zero() -> None:
    model = two_layers()
    nn.init.zeros_(model[1].bias)
    nn.init.ones_(model[2].bias)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert int(ActiveParameters()(model)) == total - 3 - 4 - 3
    model.requires_grad_(False)
    assert int(ActiveParameters()(model)) == total - 10


class Everything(nn.Module):
    """A convolution, attention, weights that are used twice, and a product of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.5)
        self.twice = nn.Linear(8, 8)
        self.own = nn.Parameter(torch.randn(8, 4))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.conv(inputs)).transpose(1, 2)
        hidden = self.attention(hidden, hidden, hidden, need_weights=False)[0]
        return self.twice(self.twice(hidden)) @ self.own


def test_flops_by_parameter_are_those_of_torch() -> None:
    model, inputs = Everything(), torch.randn(3, 2, 5)
    found = dense_flops(model, inputs)
    tokens = 3 * 5
    assert found == {
        "conv.weight": 2 * tokens * 8 * 2 * 3,
        "attention.in_proj_weight": 2 * tokens * 8 * 24,
        "": 2 * 2 * 3 * 2 * 5 * 5 * 4,  # scores, and values by scores
        "attention.out_proj.weight": 2 * tokens * 8 * 8,
        "twice.weight": 2 * 2 * tokens * 8 * 8,
        "own": 2 * tokens * 8 * 4,
    }
    model.eval()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # in training: no fused operation
        model.attention.train()
        model(inputs)
    assert sum(found.values()) == counter.get_total_flops()


def test_flops_of_recurrent_layers() -> None:
    found = dense_flops(nn.LSTM(4, 3), torch.zeros(5, 1, 4))
    assert found == {"weight_ih_l0": 2 * 5 * 4 * 12, "weight_hh_l0": 2 * 5 * 3 * 12}


def test_counting_leaves_the_model_as_it_was() -> None:
    model, inputs = Everything(), torch.randn(3, 2, 5)
    model.attention.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    dense_flops(model, inputs)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model.attention.training
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError):
        dense_flops(model, torch.randn(3, 7, 5))
    assert model.training
    assert not model.attention.training
    assert torch.backends.mha.get_fastpath_enabled()


def test_active_flops_fall_with_the_density_of_each_layer() -> None:
    model, inputs = Everything(), torch.randn(3, 2, 5)
    dense = dense_flops(model, inputs)
    assert float(ActiveFLOPs(inputs)(model)) == sum(dense.values())
    prune(model, {"conv.*": 0.5, "twice.*": 0.75})
    expected = sum(dense.values()) - 0.5 * dense["conv.weight"] - 0.75 * dense["twice.weight"]
    assert float(ActiveFLOPs({"inputs": inputs})(model)) == expected
    assert float(ActiveFLOPs((inputs,))(model)) == expected
    assert sparse_flops({"a": 10, "b": 4}, {"a": 0.1}) == 5.0


def test_active_flops_take_the_example_of_the_module() -> None:
    model = MLP()
    with pytest.raises(ValueError, match="inputs must be given since MLP has no example_input_array, got None"):
        ActiveFLOPs().update(model)
    model.example_input_array = torch.zeros(2, 6)
    assert int(ActiveFLOPs()(model)) == 2 * 2 * (48 + 80 + 30)


# ------------------------------------------------------------------------------------------------ in a LightningModule


class Logging(MLP):
    """Logs all four metrics from its validation, as a user would."""

    example_input_array = torch.zeros(1, 6)

    def __init__(self) -> None:
        super().__init__()
        self.sparsity = Sparsity(layers=True)
        self.overlap = MaskOverlap()
        self.amounts = MetricCollection({"size": ActiveParameters(), "flops": ActiveFLOPs()}, compute_groups=False)
        self.seen: list[dict[str, float]] = []

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.sparsity(self))
        self.log("overlap", self.overlap(self))
        self.amounts.update(self)
        self.log_dict(self.amounts.compute())
        self.amounts.reset()

    def on_train_epoch_end(self) -> None:
        self.seen.append({name: float(value) for name, value in self.trainer.callback_metrics.items()})


def test_a_module_logs_them_all() -> None:
    model = Logging()
    fit(model, Pruning(0.5, schedule="linear", start=0, end=12, frequency=4), max_epochs=4)
    assert [seen["total"] for seen in model.seen] == pytest.approx([26 / 158, 53 / 158, 0.5, 0.5], abs=1e-6)
    assert model.seen[-1]["total"] == sparsity(model)
    # pruned weights do not come back: what both keep is what the later one keeps
    assert [seen["overlap"] for seen in model.seen] == pytest.approx([1, 105 / 132, 79 / 105, 1], abs=1e-6)
    others = 8 + 10 + 3 + 2 * 8  # biases and the norm
    assert [seen["size"] for seen in model.seen] == [132 + others, 105 + others, 79 + others, 79 + others]
    assert [seen["flops"] for seen in model.seen] == [2 * 132, 2 * 105, 2 * 79, 2 * 79]
    assert model.state_dict().keys() == MLP().state_dict().keys()


# ------------------------------------------------------------------------------------------------ several ranks


def measured(layout: Layout, tensors: bool) -> dict[str, Any]:
    """Return what the metrics of a pruned model say on this rank, before and after they are reduced over the ranks."""
    model = distributed.build(layout, tensors)
    found: dict[str, Any] = {}
    metrics = {
        "sparsity": Sparsity(layers=True),
        "overlap": MaskOverlap(layers=True),
        "parameters": ActiveParameters(),
        "flops": ActiveFLOPs(torch.ones(4, 8)),
    }
    for level in (0.2, 0.5):
        prune(model, level)
        distributed.reshard(model)
        for name, metric in metrics.items():
            found[f"{name} at {level}"] = metric(model)
            distributed.reshard(model)
    found |= {name: metric.compute() for name, metric in metrics.items()}
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(("layout", "size"), [("ddp", 2), ("fsdp", 2), ("tp", 2)])
def test_several_ranks_measure_what_one_does(layout: Layout, size: int) -> None:
    tensors = layout == "tp"
    [alone] = run(measured, 1, "one", tensors)
    assert float(alone["sparsity"]["total"]) == pytest.approx(0.35, abs=0.01)
    assert float(alone["overlap at 0.5"]["total"]) == pytest.approx(0.5 / 0.8, abs=0.02)
    for found in run(measured, size, layout, tensors):
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            assert found[name] == value, name


class Averaged(Net):
    """Logs its metrics over the ranks of a real run."""

    def on_fit_start(self) -> None:
        self.sparsity = Sparsity()

    def on_train_epoch_end(self) -> None:
        self.sparsity.update(self)
        self.log("found", self.sparsity)


def logged() -> float:
    model = Averaged("ddp")
    trainer = distributed.fit(model, Pruning(0.5, granularity=Channel(), start=0, end=2, ignore=["net.6.*"]))
    return float(trainer.callback_metrics["found"])


@pytest.mark.distributed
def test_a_run_with_two_processes_logs_them() -> None:
    model = Averaged("one")
    trainer = distributed.fit(model, Pruning(0.5, granularity=Channel(), start=0, end=2, ignore=["net.6.*"]))
    alone = float(trainer.callback_metrics["found"])
    assert alone > 0.2
    assert run(logged, 2) == [pytest.approx(alone)] * 2
