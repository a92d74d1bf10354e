"""Layers that hold their weight as (inputs, outputs): the Conv1D of transformers, and any that says fan_in_fan_out."""

import copy
from typing import Any

import pytest
import torch
from models import fit
from test_references_posttraining import Training
from torch import Tensor, nn

from lightning_prune import (
    FPGM,
    NM,
    SNIP,
    SRSTE,
    APoZ,
    BatchNormScale,
    Block,
    Channel,
    Entropy,
    Granularity,
    InputChannel,
    Magnitude,
    Random,
    Sensitivity,
    Wanda,
    Weight,
    prune,
    sparsegpt,
)
from lightning_prune.structure.surgery import update_sizes

X = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3.0, 8)
DATA = [(X, X[:, :6])]


class Conv1D(nn.Module):
    """As transformers has it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Turned(nn.Linear):
    """As loralib has it: a linear layer that says how its weight lies, and is square."""

    fan_in_fan_out = True

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight = nn.Parameter(self.weight.detach().T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.T, self.bias)


def pair(kind: type[nn.Module]) -> tuple[nn.Module, nn.Linear]:
    """Return such a layer, and the linear layer that does the same."""
    torch.manual_seed(0)
    layer, linear = kind(6, 8) if kind is Conv1D else kind(8, 6), nn.Linear(8, 6)
    with torch.no_grad():
        linear.weight.copy_(layer.weight.T)
        linear.bias.copy_(layer.bias)
    return layer, linear


kinds = pytest.mark.parametrize("kind", [Conv1D, Turned])


@kinds
@pytest.mark.parametrize("granularity", [NM(2, 4), Block(2, 4), Channel(), InputChannel()], ids=str)
def test_units_lie_as_in_the_linear_layer_that_does_the_same(kind: type[nn.Module], granularity: Granularity) -> None:
    layer, linear = pair(kind)
    found, expected = (prune(each, 0.5, granularity=granularity) for each in (layer, linear))
    assert torch.equal(found["weight"].T, expected["weight"])
    assert found.keys() == expected.keys()
    if isinstance(granularity, Channel):
        assert torch.equal(found["bias"], expected["bias"])


@kinds
@pytest.mark.parametrize("scored", [Wanda(), Wanda(by_row=False)], ids=str)
@pytest.mark.parametrize("granularity", [Weight(), NM(2, 4)], ids=str)
def test_wanda_prunes_what_it_prunes_of_the_linear_layer(
    kind: type[nn.Module], scored: Wanda, granularity: Granularity
) -> None:
    layer, linear = pair(kind)
    options: dict[str, Any] = {"criterion": scored, "granularity": granularity, "scope": "local", "data": [X]}
    found, expected = (prune(each, 0.5, **options)["weight"] for each in (layer, linear))
    assert torch.equal(found.T, expected)


@kinds
@pytest.mark.parametrize("granularity", [Weight(), NM(2, 4)], ids=str)
def test_sparsegpt_reconstructs_what_it_does_of_the_linear_layer(
    kind: type[nn.Module], granularity: Granularity
) -> None:
    layer, linear = pair(kind)
    found, expected = (sparsegpt(each, 0.5, data=[X], granularity=granularity) for each in (layer, linear))
    assert torch.equal(found["weight"].T, expected["weight"])
    torch.testing.assert_close(layer.weight.T, linear.weight)
    assert torch.equal(layer.weight != 0, found["weight"])


@kinds
@pytest.mark.parametrize("scored", [Sensitivity(), SNIP(), APoZ(), Entropy(), FPGM(), Magnitude(2)], ids=str)
def test_channels_are_scored_as_those_of_the_linear_layer(kind: type[nn.Module], scored: Any) -> None:
    layer, linear = pair(kind)
    options: dict[str, Any] = {"criterion": scored, "granularity": Channel(), "data": DATA}
    found, expected = (prune(each, 0.5, **options) for each in (layer, linear))
    assert torch.equal(found["weight"].T, expected["weight"])
    assert torch.equal(found["bias"], expected["bias"])


@kinds
def test_the_norm_behind_it_is_found(kind: type[nn.Module]) -> None:
    model = nn.Sequential(pair(kind)[0], nn.BatchNorm1d(6), nn.ReLU())
    with torch.no_grad():
        model[1].weight.copy_(torch.arange(6.0))
    masks = prune(model, 0.5, criterion=BatchNormScale(), granularity=Channel())
    assert masks["0.weight"].all(0).tolist() == masks["1.bias"].tolist() == [False] * 3 + [True] * 3


def test_srste_trains_groups_along_its_inputs() -> None:
    model = Training(Conv1D(6, 8), [(X, torch.zeros(50, dtype=torch.long))] * 3)
    fit(model, SRSTE(2, 4), max_epochs=1)
    assert (model.net.weight.view(2, 4, 6) != 0).sum(1).tolist() == [[2] * 6] * 2


@pytest.mark.parametrize("kind", [Conv1D, Turned])
def test_its_sizes_follow_its_weight(kind: type[nn.Module]) -> None:
    layer, _ = pair(kind)
    layer.weight.data = layer.weight.data[:5, :4].clone()
    update_sizes(layer)
    assert (layer.nx, layer.nf) == (5, 4) if kind is Conv1D else (layer.in_features, layer.out_features) == (5, 4)


@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 3)])
def test_another_module_of_that_name_does_not_hold_its_weight_so(shape: tuple[int, ...]) -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(shape))

    module = Conv1D()
    module.fan_in_fan_out = len(shape) == 3
    assert prune(module, 0.5, granularity=Channel())["weight"].flatten(1).all(1).sum() == 4


# ------------------------------------------------------------------------------------------------ GPT-2


@pytest.fixture
def gpt2() -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 64, "n_positions": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends)).eval()


TOKENS = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))


def test_groups_of_gpt2_lie_along_its_inputs(gpt2: Any) -> None:
    masks = prune(gpt2, 0.5, granularity=NM(2, 4))
    found = [mask for name, mask in masks.items() if ".h." in name]
    assert len(found) == 8
    assert all((mask.unflatten(0, (-1, 4)).sum(1) == 2).all() for mask in found)


@pytest.mark.parametrize("how", ["Wanda", "SparseGPT"])
@pytest.mark.parametrize("sequential", [None, "transformer.h"])
def test_gpt2_is_pruned_without_training(gpt2: Any, how: str, sequential: str | None) -> None:
    options: dict[str, Any] = {"data": [TOKENS], "targets": ["transformer.h.*"], "sequential": sequential}
    dense = copy.deepcopy(gpt2)
    if how == "Wanda":
        masks = prune(gpt2, 0.5, criterion=Wanda(), **options)
        assert all((mask.sum(0) == mask.shape[0] // 2).all() for mask in masks.values())  # of each output
    else:
        gpt2.config.use_cache = False
        masks = sparsegpt(gpt2, 0.5, **options)
        assert not torch.equal(gpt2.transformer.h[0].mlp.c_fc.weight, dense.transformer.h[0].mlp.c_fc.weight)
    assert sum(int((~mask).sum()) for mask in masks.values()) == 2 * 12 * 32 * 32 // 2


@pytest.mark.parametrize("scored", [Magnitude(), FPGM(), Random(0)], ids=str)
def test_channels_of_gpt2_are_coupled_and_shrink(gpt2: Any, scored: Any) -> None:
    pytest.importorskip("torch_pruning")
    from lightning_prune import shrink

    granularity = Channel(coupled=True)
    masks = prune(gpt2, 0.5, criterion=scored, granularity=granularity, scope="local", example_inputs=TOKENS)
    mlp, kept = "transformer.h.1.mlp", masks["transformer.h.1.mlp.c_fc.bias"]
    assert kept.sum() == 64
    assert torch.equal(masks[f"{mlp}.c_fc.weight"], kept.expand(32, 128))
    assert torch.equal(masks[f"{mlp}.c_proj.weight"], kept[:, None].expand(128, 32))
    small = shrink(gpt2, TOKENS)
    layer = small.transformer.h[1].mlp.c_fc
    assert (tuple(layer.weight.shape), layer.nf, layer.nx) == ((32, 64), 64, 32)
    torch.testing.assert_close(small(TOKENS).logits, gpt2(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_heads_of_gpt2_are_pruned_and_shrink(gpt2: Any) -> None:
    pytest.importorskip("torch_pruning")
    from lightning_prune import Head, shrink

    masks = prune(gpt2, 0.5, granularity=Head(), scope="local", example_inputs=TOKENS)
    kept = masks["transformer.h.0.attn.c_proj.weight"].all(1).view(4, 8)
    assert kept.all(1).sum() == 2
    assert torch.equal(masks["transformer.h.0.attn.c_attn.weight"].all(0).view(3, 4, 8), kept.expand(3, 4, 8))
    small = shrink(gpt2, TOKENS)
    assert tuple(small.transformer.h[0].attn.c_attn.weight.shape) == (32, 48)
    torch.testing.assert_close(small(TOKENS).logits, gpt2(TOKENS).logits, rtol=1e-4, atol=1e-5)
