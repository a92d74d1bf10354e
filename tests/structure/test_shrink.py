"""Shrinking: the smaller model gives the outputs of the masked one, and what cannot go is named."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from architectures import CASES, Case, build
from torch import Tensor, nn

from lightning_prune import shrink
from lightning_prune.structure.groups import Graph, Group
from lightning_prune.structure.surgery import named_tensors
from lightning_prune.structure.tracing import trace

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def kept(group: Group, share: float = 0.5) -> Tensor:
    """A decision that keeps this share of the units, here and there."""
    return torch.randperm(group.size, generator=torch.Generator().manual_seed(group.size)) < round(share * group.size)


@torch.no_grad()
def kill(model: nn.Module, graph: Graph, share: float = 0.5) -> int:
    """Zero all that dies with the units that go, and return how many weights of the smaller model should be left."""
    parameters = dict(model.named_parameters())
    masks = {name: torch.ones_like(parameter, dtype=torch.bool) for name, parameter in parameters.items()}
    for group in graph.groups:
        for member in group.members:
            if member.name in masks:
                masks[member.name].index_fill_(member.dim, member.index[~kept(group, share)].flatten(), False)
    for name, mask in masks.items():
        parameters[name].mul_(mask)
    return sum(int(mask.sum()) for mask in masks.values())


def outputs(model: nn.Module, inputs: Tensor, training: bool) -> Tensor:
    return deepcopy(model).train(training)(inputs)


def assert_same(model: nn.Module, other: nn.Module, inputs: Tensor) -> None:
    for training in (False, True):
        expected, found = outputs(model, inputs, training), outputs(other, inputs, training)
        assert expected.isfinite().all()
        assert expected.std() > 1e-3, "outputs that do not depend on the inputs"
        assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("inplace", [False, True])
def test_it_logs_what_was_cut(inplace: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    seen: list[nn.Module] = []
    model[0].register_forward_hook(lambda module, *_: seen.append(module))
    with torch.no_grad():
        model[2].weight[3:] = 0.0
        model[2].bias[3:] = 0.0
    with caplog.at_level("INFO", logger="lightning_prune"):
        shrink(model, torch.zeros(1, 1, 6, 6), inplace=inplace)
    [record] = caplog.records
    flops = [2 * (16 * 4 * 9 + 4 * width * 36 + 4 * width * 2) for width in (8, 3)]
    assert record.message.splitlines() == [
        f"shrink: parameters 354 -> 159 (-55.1%), FLOPs {flops[0]:,} -> {flops[1]:,} ({flops[1] / flops[0] - 1:+.1%}), "
        "channels:",
        "  2  8 -> 3",
    ]
    assert not seen


@cases
def test_the_shrunk_model_gives_the_outputs_of_the_masked_one(case: Case) -> None:
    model, inputs = build(case)
    dense = sum(parameter.numel() for parameter in model.parameters())
    left = kill(model, trace(model, inputs))
    state, kinds = deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    small = shrink(model, inputs)
    assert [type(module) for module in small.modules()] == kinds
    assert list(small.state_dict()) == list(state)
    assert sum(parameter.numel() for parameter in small.parameters()) == left < 0.75 * dense
    assert_same(model, small, inputs)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), "the model has changed"
    repr(small)  # layers state the sizes that they have
    for module in small.modules():
        for argument, tensor, dim in (("out_features", "weight", 0), ("num_features", "running_mean", 0)):
            if hasattr(module, argument):
                assert getattr(module, argument) == getattr(module, tensor).shape[dim]


@cases
def test_every_weight_has_a_group_or_a_reason(case: Case) -> None:
    model, inputs = build(case)
    graph = trace(model, inputs)
    weights = {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    made = {member.name for group in graph.groups for member in group.role("producer")}
    assert graph.left_out.keys() == set(case.stays)
    assert made.isdisjoint(case.stays)
    assert made | set(case.stays) | {"token", "places"} >= weights
    assert all(reason for reason in graph.left_out.values())


@cases
def test_a_unit_lies_in_every_tensor_once(case: Case) -> None:
    model, inputs = build(case)
    tensors, cut = named_tensors(model), set()
    for group in trace(model, inputs).groups:
        for member in group.members:
            places = member.index.flatten().tolist()
            assert len(set(places)) == len(places)
            assert max(places) < tensors[member.name].shape[member.dim]
            taken = {(member.name, member.dim, place) for place in places}
            assert cut.isdisjoint(taken), "two units share a place"
            cut |= taken


def test_a_padding_row_is_no_dead_channel() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, padding_idx=0), nn.Flatten(), nn.Linear(8, 2))
    with pytest.warns(UserWarning, match="nothing was removed: no channel is all zero"):
        shrink(model, torch.ones(3, 2, dtype=torch.int64))
    with torch.no_grad():
        model[0].weight[:, 1] = 0.0
    with pytest.warns(UserWarning, match=r"0.weight \(1 of 4: "):
        shrink(model, torch.ones(3, 2, dtype=torch.int64))


class InPlace(dict[str, Tensor]):
    """A batch that moves itself and returns nothing, as some packages have it."""

    def to(self, device: torch.device) -> None:
        self.update({name: tensor.to(device) for name, tensor in self.items()})


class OfBatches(nn.Sequential):
    def forward(self, batch: InPlace) -> Tensor:
        return super().forward(batch["x"])


def test_a_batch_that_moves_itself_is_an_example() -> None:
    model = OfBatches(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    nn.init.zeros_(model[2].weight[:, 1:])
    assert shrink(model, (InPlace(x=torch.ones(2, 4)),))[0].out_features == 1


class Caching(nn.Module):
    """Returns what it has computed on the way beside its output, as transformers do with keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(use_cache=True)
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> dict[str, object]:
        inner = self.first(x)
        cache = SimpleNamespace(keys=inner) if self.config is None else (inner,) if self.config.use_cache else None
        return {"out": self.last(inner), "cache": cache, "note": "text", "length": torch.tensor(4)}


def test_a_cache_is_no_output_of_the_model() -> None:
    model = Caching()
    (group,) = trace(model, torch.ones(2, 4)).groups
    assert [(member.name, member.role) for member in group.members] == [
        ("first.weight", "producer"),
        ("first.bias", "dependent"),
        ("last.weight", "consumer"),
    ]
    assert model.config.use_cache  # the model is left as it was
    model.config = None  # a cache that is an object
    assert len(trace(model, torch.ones(2, 4)).groups) == 1
