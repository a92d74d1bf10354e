"""Coupled channels and heads: what is scored together, dies together, and is counted exactly."""

import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CASES, Case, build
from distributed import Layout, Net, rank, result
from distributed import fit as fit_ranks
from models import ConvNet, On, Tiny, agrees, fit
from ranks import run
from torch import Tensor, nn

from lightning_prune import Channel, Entropy, Head, Magnitude, Pruning, Random, Sensitivity, Wanda, prune, shrink
from lightning_prune.granularities import Granularity
from lightning_prune.models.parameters import find
from lightning_prune.structure.surgery import dead_units, named_tensors
from lightning_prune.structure.tracing import trace
from lightning_prune.units.coupled import CoupledUnits

COUPLED = Channel(coupled=True)
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Residual(Tiny):
    """Convolutions whose outputs are added, so that they lose the same channels."""

    size = (2, 6, 6)

    def build(self, dropout: float) -> nn.Sequential:
        self.example_input_array = torch.zeros(1, *self.size)
        self.first, self.second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.first(inputs)
        return self.net((x + self.second(x.sigmoid())).sigmoid())


def units_of(model: nn.Module, granularity: Granularity, inputs: Any) -> list[CoupledUnits]:
    return granularity.find_units(find(model), model, inputs)[0]


# ------------------------------------------------------------------------------------------------ counts


@cases
@pytest.mark.parametrize("criterion", [Magnitude(), Random()])
def test_exactly_the_channels_asked_for_go_and_can_be_removed(case: Case, criterion: Any) -> None:
    model, inputs = build(case)
    sizes = {unit.name: unit.size for unit in units_of(model, COUPLED, inputs)}
    masks = prune(model, 0.5, criterion=criterion, granularity=COUPLED, example_inputs=inputs)
    assert agrees(model, masks)
    tensors = named_tensors(model)
    groups = [group for group in trace(model, inputs).groups if group.name in sizes]
    dead = {group.name: int(dead_units([tensors], group.role("producer")).sum()) for group in groups}
    assert sum(dead.values()) == round(0.5 * sum(sizes.values()))
    assert all(count < sizes[name] for name, count in dead.items()), "a layer has no channel left"
    entries = sum(int(mask.sum()) for mask in masks.values())
    entries += sum(p.numel() for name, p in model.named_parameters() if name not in masks)
    small = shrink(model, inputs)
    assert sum(parameter.numel() for parameter in small.parameters()) == entries
    assert torch.allclose(small.eval()(inputs), model.eval()(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "gpt"])
def test_exactly_the_heads_asked_for_go_and_can_be_removed(name: str) -> None:
    model, inputs = build(CASES[name])
    prune(model, 0.5, granularity=Head(), example_inputs=inputs)
    small = shrink(model, inputs)
    attentions = [layer.attention for layer in small.layers]
    assert sum(getattr(a, "num_heads", None) or a.n_head for a in attentions) == 4
    assert sum(a.o.in_features for a in attentions) == 4 * 4
    assert torch.allclose(small.eval()(inputs), model.eval()(inputs), rtol=1e-4, atol=1e-5)


def test_packed_attention_loses_whole_heads_without_a_trace() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    masks = prune(layer, 0.5, granularity=Head())
    assert masks.keys() == {"self_attn.in_proj_weight", "self_attn.in_proj_bias", "self_attn.out_proj.weight"}
    rows = masks["self_attn.in_proj_weight"].all(1).view(3, 4, 4)
    heads = rows[0, :, 0]
    assert int(heads.sum()) == 2
    assert torch.equal(rows, heads[None, :, None].expand(3, 4, 4))
    assert torch.equal(masks["self_attn.out_proj.weight"].all(0).view(4, 4)[:, 0], heads)
    with pytest.warns(UserWarning, match="self_attn.in_proj_weight .2 of 4: the outputs of the model differ"):
        assert shrink(layer, torch.randn(2, 3, 16)).self_attn.num_heads == 4


@pytest.mark.parametrize("scope", ["global", "local", {"first.*": 0.5, "*": 0.9}])
def test_no_layer_loses_its_last_channel(scope: Any) -> None:
    model, inputs = (
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)),
        torch.ones(4),
    )
    model[0].weight.data.mul_(1e-3)  # a global ranking would take all of it
    if isinstance(scope, dict):
        prune(model, {"0.*": 0.99, "2.*": 0.5}, granularity=COUPLED, example_inputs=inputs)
    else:
        prune(model, 0.5, granularity=Channel(coupled=True, minimum=2), scope=scope, example_inputs=inputs)
    left = int(model[0].weight.any(1).sum())
    assert left == {"global": 2, "local": 4}.get(str(scope), 1)
    assert int(model[2].weight.any(1).sum()) == {"global": 6}.get(str(scope), 4)


def test_the_channels_that_stay_are_a_multiple() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 2))
    prune(model, 0.5, granularity=Channel(coupled=True, round_to=8), example_inputs=torch.ones(4))
    left = [int(model[layer].weight.any(1).sum()) for layer in (0, 2)]
    assert sum(left) == 16  # 24 would be more than half of 44
    assert left[0] % 8 == 0
    assert left[1] % 8 == 0 or left[1] == 20


# ------------------------------------------------------------------------------------------------ scores


def test_a_channel_is_scored_by_all_layers_that_make_it() -> None:
    model = Residual()
    (units,) = units_of(model, COUPLED, model.example_input_array)
    assert [member.name for member in units.group.role("producer")] == ["first.weight", "second.weight"]
    both = torch.cat([layer.weight.detach().flatten(1) for layer in (model.first, model.second)], 1)
    assert torch.allclose(Magnitude().scores(units), both.abs().mean(1))
    for layer in (model.first, model.second):
        layer.weight.grad = torch.randn_like(layer.weight)
    gradients = torch.cat([layer.weight.grad.flatten(1) for layer in (model.first, model.second)], 1)
    units.grad_scale = 4.0
    assert torch.allclose(Sensitivity().observe(units), ((both * gradients / 4).sum(1)) ** 2)
    units.statistic, units.steps = torch.arange(6.0), 1
    assert Entropy(prune="low").scores(units).tolist() == pytest.approx(list(range(6)))


def test_a_layer_that_makes_its_channels_alone_looks_like_itself() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Conv1d(3, 2, 1))
    (units,) = units_of(model, COUPLED, torch.ones(1, 2, 8))
    assert units.weight().shape == (3, 2, 3)
    assert torch.allclose(units.mean(torch.square), model[0].weight.detach().square().mean((1, 2)))


def test_an_entry_is_pruned_with_its_row_or_its_column() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    masks = prune(model, 0.5, granularity=COUPLED, scope="local", example_inputs=torch.ones(4))
    first, second = masks["0.weight"].all(1), masks["2.bias"]
    assert torch.equal(masks["2.weight"], second[:, None] & first)
    assert torch.equal(masks["4.weight"], second.expand(2, 6))
    assert torch.equal(masks["0.bias"], first)
    assert "4.bias" not in masks


# ------------------------------------------------------------------------------------------------ training


def coupled(criterion: Any, granularity: Granularity = Channel()) -> Pruning:
    return Pruning(0.5, criterion, granularity, schedule="linear", start=1, end=7, frequency=3)


CRITERIA = {"weights": Magnitude(), "gradients": Sensitivity(window=2), "forwards": Entropy(window=2)}


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA)
def test_training_ends_with_channels_that_can_be_removed(criterion: Any) -> None:
    model, callback = Residual(), coupled(criterion)
    fit(model, callback)
    assert agrees(model, callback.masks)
    assert [int(layer.bias.count_nonzero()) for layer in (model.first, model.second)] == [3, 3]
    assert int(model.net[2].weight.any(0).sum()) == 3
    weights = [parameter for name, parameter in model.named_parameters() if name.endswith("weight")]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert callback.sparsity_now == pytest.approx(zeros / sum(weight.numel() for weight in weights))
    small = shrink(model)
    assert small.first.out_channels == small.second.in_channels == small.net[2].in_features == 3
    assert torch.allclose(small(torch.ones(1, 2, 6, 6)), model(torch.ones(1, 2, 6, 6)), rtol=1e-5, atol=1e-6)


def test_the_first_batch_serves_as_example_and_is_not_taken_from_training() -> None:
    model, other = Residual(), Residual()
    other.example_input_array = None
    callback, waiting = coupled(Magnitude()), coupled(Magnitude(), COUPLED)
    fit(model, callback)
    fit(other, waiting)
    assert all(torch.equal(waiting.masks[name], mask) for name, mask in callback.masks.items())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_without_an_example_channels_are_rows_as_before() -> None:
    model, callback = ConvNet(), coupled(Magnitude())
    fit(model, callback)
    plain, uncoupled = ConvNet(), coupled(Magnitude(), Channel(coupled=False))
    plain.example_input_array = torch.zeros(1, 2, 6, 6)
    fit(plain, uncoupled)
    assert callback.masks.keys() == uncoupled.masks.keys()
    assert all(torch.equal(uncoupled.masks[name], mask) for name, mask in callback.masks.items())
    assert "net.4.bias" in callback.masks


@pytest.mark.parametrize("example", [True, False], ids=["array", "batch"])
@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA)
def test_a_resumed_run_ends_with_the_bits_of_the_uninterrupted_one(
    criterion: Any, example: bool, tmp_path: Path
) -> None:
    def model() -> Residual:
        made = Residual(optimizer="adam")
        made.example_input_array = made.example_input_array if example else None
        return made

    granularity = Channel() if example else COUPLED
    whole, callback = model(), coupled(criterion, granularity)
    save = On(
        on_train_epoch_end=lambda trainer, *_: trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")
    )
    fit(whole, callback, save)
    resumed, other = model(), coupled(criterion, granularity)
    seen: list[float] = []
    fit(resumed, other, On(on_train_start=lambda *_: seen.append(other.sparsity_now)), ckpt_path=tmp_path / "0.ckpt")
    assert seen[0] > 0
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert all(torch.equal(other.masks[name], mask) for name, mask in callback.masks.items())


def test_the_plan_names_what_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    class Normed(Residual):
        def build(self, dropout: float) -> nn.Sequential:
            self.example_input_array = torch.zeros(1, 72)
            layers = (nn.Flatten(), nn.Linear(72, 8), nn.LayerNorm(8), nn.Linear(8, 4), nn.Linear(4, 3))
            return nn.Sequential(*layers)

        forward = Tiny.forward

    callback = coupled(Magnitude())
    with caplog.at_level("INFO", logger="lightning.pytorch.lightning_prune"):
        fit(Normed(), callback, max_epochs=3)
    assert "left out: net.1.weight: LayerNorm takes statistics over its channels" in caplog.text
    assert "left out: net.4.weight: its channels are outputs of the model" in caplog.text
    assert "net.3.weight: " not in caplog.text
    assert callback.masks.keys() == {"net.3.weight", "net.3.bias", "net.4.weight"}


# ------------------------------------------------------------------------------------------------ what is not known


class Mixing(nn.Module):
    """The same layers twice; the function between them looks at all channels together, or at each alone."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.one, self.two, self.between = nn.Linear(4, 6), nn.Linear(6, 2), between

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.between(self.one(x)))


ACROSS = {
    "softmax": lambda x: x.softmax(-1),
    "norm": lambda x: nn.functional.normalize(x.sigmoid(), dim=-1),
    "mean": lambda x: x - x.mean(-1, keepdim=True),
    "rms": nn.RMSNorm(6),
    "halves": lambda x: torch.cat([x[..., 3:], x[..., :3]], -1),
    "size": lambda x: x.view(-1, 6),
}


@pytest.mark.parametrize("between", ACROSS.values(), ids=ACROSS)
def test_channels_that_a_function_mixes_are_left_out_and_never_removed(between: Any) -> None:
    model, inputs = Mixing(between), torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"must find units to prune, got none .*: prune single weights \(granularity="):
        prune(model, 0.5, granularity=COUPLED, example_inputs=inputs)
    for parameter in (model.one.weight, model.one.bias):
        parameter.data[:3] = 0.0
    with pytest.warns(UserWarning, match=r"these channels are zero and stay in the model: one.weight \(3 of 6"):
        small = shrink(model, inputs)
    assert torch.equal(small(inputs), model(inputs))


class Recurring(nn.Module):
    """A recurrent layer between linear ones."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.inner, self.layer = nn.Linear(4, 6), layer
        self.out = nn.Linear(2 * layer.hidden_size if layer.bidirectional else layer.hidden_size, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(self.inner(x).relu())[0][:, -1])


class Shuffling(nn.Module):
    """Puts channels into places of the feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Conv2d(3, 16, 3), nn.Conv2d(4, 8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        shuffled = nn.functional.pixel_shuffle(self.one(x).relu(), 2)
        return self.out(self.two(shuffled).relu().mean((2, 3)))


def test_channels_that_are_shuffled_into_places_stay() -> None:
    torch.manual_seed(0)
    model, inputs = Shuffling(), torch.randn(2, 3, 8, 8)
    masks = prune(model, 0.5, granularity=COUPLED, example_inputs=inputs)
    assert masks.keys() == {"two.weight", "two.bias", "out.weight"}
    assert "in a way that torch-pruning does not know" in trace(model, inputs).left_out["one.weight"]
    small = shrink(model, inputs)
    assert (small.one.out_channels, small.two.out_channels) == (16, 4)
    assert torch.allclose(small(inputs), model(inputs), atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            nn.GRU(6, 8, batch_first=True),
            r"channels cannot be followed through GRU 'layer': prune single weights \(granularity=Weight\(\)\)",
        ),
        (
            nn.RNN(6, 8, batch_first=True),
            "must find units to prune, got none .*inner.weight: a layer reads some channels more",
        ),
        (nn.LSTM(6, 8, bidirectional=True, batch_first=True), "they go through an LSTM with two directions"),
        (nn.LSTM(6, 8, proj_size=3, batch_first=True), r"traceable by torch-pruning, got .* through LSTM 'layer'"),
    ],
    ids=["GRU", "RNN", "bidirectional", "projection"],
)
def test_recurrent_layers_that_are_not_known_are_named(layer: nn.RNNBase, message: str) -> None:
    model, inputs = Recurring(layer), torch.randn(2, 5, 4)
    if layer.proj_size:
        model.out = nn.Linear(3, 2)
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        prune(model, 0.5, granularity=COUPLED, example_inputs=inputs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_criterion_that_knows_one_layer_only_is_refused() -> None:
    model, inputs = build(CASES["vit"])
    with pytest.raises(ValueError, match=r"the units of .*attention.q.weight' lie in .*take another criterion"):
        prune(model, 0.5, criterion=Wanda(window=1), granularity=Head(), example_inputs=inputs, data=[inputs])


def test_a_frozen_or_ignored_layer_keeps_its_channels() -> None:
    model = Residual()
    model.second.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"its channels are those of second.weight too, which is not among the targets"
    ):
        prune(model, 0.5, granularity=COUPLED)
    model.second.requires_grad_(True)
    model.net[2].requires_grad_(False)
    with pytest.raises(ValueError, match=r"what depends on it is frozen: net.2.weight"):
        prune(model, 0.5, granularity=COUPLED)


def test_without_torch_pruning_channels_are_rows_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    model = Residual()
    with pytest.warns(
        UserWarning, match=r"without what depends on them: .* pip install '\.\[shrink\]' in the repository"
    ):
        assert "net.2.bias" in prune(model, 0.5, granularity=Channel(), targets=("*",))
    with pytest.raises(ImportError, match="need torch-pruning"):
        prune(model, 0.5, granularity=COUPLED)
    with pytest.raises(ImportError, match="need torch-pruning"):
        shrink(model)


def test_where_no_channel_can_be_coupled_they_are_rows_and_it_is_said() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
    with pytest.warns(
        UserWarning, match=r"without what depends on them: .* got none .0.weight: its channels are outputs of the model"
    ):
        masks = prune(model, 0.5, granularity=Channel(), example_inputs=torch.ones(2, 4))
    assert int((~masks["0.weight"].any(1)).sum()) == 3


@pytest.mark.parametrize(
    ("granularity", "arguments", "message"),
    [
        (COUPLED, {}, "coupled channels need example inputs"),
        (COUPLED, {"example_inputs": torch.ones(3)}, "the model must run on example_inputs"),
        (Head(), {}, r"got none .no attention with a stated number of heads is known\): say Head\(heads="),
    ],
)
def test_what_cannot_be_coupled_is_refused(granularity: Granularity, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), 0.5, granularity=granularity, **arguments)


@pytest.mark.parametrize("arguments", [{"minimum": 0}, {"round_to": 0}])
def test_bad_arguments_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        Channel(**arguments)


def test_looking_for_groups_leaves_the_model_as_it_was() -> None:
    model, inputs = build(CASES["resnet_basic"])
    state, calls = deepcopy(model.state_dict()), []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    drawn = torch.random.get_rng_state()
    units_of(model, COUPLED, inputs)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert (model.training, all(p.grad is None for p in model.parameters()), calls) == (True, True, [])
    handle.remove()


class Unstated(nn.Module):
    """An attention whose number of heads stands nowhere: it works with their size."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, 2)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_the_number_of_heads_can_be_told() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(Unstated(), nn.Linear(8, 2)), torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match=r"0: the 8 channels that 0.o.weight reads cannot be divided evenly among 3"):
        prune(model, 0.5, granularity=Head(heads=3), example_inputs=inputs)
    for granularity in (Head(), Head(heads=4)):  # the shapes of views tell it as well
        masks = prune(deepcopy(model), 0.5, granularity=granularity, example_inputs=inputs)
        assert masks["0.qkv.weight"].all(1).view(3, 4, 2).all(2).sum(1).tolist() == [2, 2, 2]


# ------------------------------------------------------------------------------------------------ ranks


def train_on(layout: Layout) -> dict[str, Any]:
    model, callback = Net(layout), coupled(Entropy(window=2), COUPLED)
    torch.manual_seed(rank())
    fit_ranks(model, callback)
    return result(model, callback.masks)


def train_in_pieces() -> str:
    with pytest.raises(ValueError, match="needs whole parameters, got sharded ones") as error:
        train_on("fsdp")
    return str(error.value)


@pytest.mark.distributed
def test_with_ddp_every_rank_has_the_masks_of_one_process() -> None:
    expected = train_on("one")["masks"]
    assert sum(int((~mask).sum()) for mask in expected.values()) > 0
    for found in run(train_on, 2, "ddp"):
        assert found["masks"].keys() == expected.keys()
        assert all(torch.equal(found["masks"][name], mask) for name, mask in expected.items())


@pytest.mark.distributed
def test_pieces_of_parameters_are_refused() -> None:
    assert all("Channel(coupled=False)" in told for told in run(train_in_pieces, 2))
