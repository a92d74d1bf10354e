"""Targets: which parameters are pruned, by default and by name, and what is said when a name is wrong."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.models.parameters import (
    Target,
    channel_dim,
    find,
    fractions,
    left_out,
    matches,
    named_parameters,
    plain_name,
)


def names(model: nn.Module, *targets: str, ignore: tuple[str, ...] = ()) -> list[str]:
    return [target.name for target in find(model, targets, ignore)]


# ------------------------------------------------------------------------------------------------ by default


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(2, 3), ["weight"]),
        (nn.Linear(2, 3, bias=False), ["weight"]),
        (nn.Bilinear(2, 3, 4), ["weight"]),
        (nn.Conv1d(2, 4, 3), ["weight"]),
        (nn.Conv2d(2, 4, 3, groups=2), ["weight"]),
        (nn.Conv3d(2, 4, 3), ["weight"]),
        (nn.ConvTranspose2d(2, 4, 3), ["weight"]),
        (nn.LSTM(2, 3, num_layers=2), ["weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"]),
        (
            nn.GRU(2, 3, bidirectional=True),
            ["weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"],
        ),
        (nn.LSTM(2, 4, proj_size=3), ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]),
        (nn.GRUCell(2, 3), ["weight_ih", "weight_hh"]),
        (nn.MultiheadAttention(4, 2), ["in_proj_weight", "out_proj.weight"]),
        # bias_k and bias_v have three dimensions, and are biases
        (
            nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True),
            ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
        ),
        (
            nn.TransformerEncoderLayer(4, 2, 8),
            ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"],
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_weights_of_layers_are_targets(layer: nn.Module, expected: list[str]) -> None:
    assert names(layer) == expected


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(3),
        nn.BatchNorm2d(3),
        nn.InstanceNorm2d(3, affine=True),
        nn.GroupNorm(1, 3),
        nn.LayerNorm(3),
        nn.LayerNorm((2, 3)),  # a norm with two dimensions
        nn.RMSNorm((2, 3)),
        nn.PReLU(3),
        nn.Embedding(4, 3),
        nn.EmbeddingBag(4, 3),
        nn.Linear(2, 3).requires_grad_(False),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_other_parameters_are_not(layer: nn.Module) -> None:
    model = nn.Sequential(layer, nn.Linear(2, 2))
    assert names(model) == ["1.weight"]


def test_a_frozen_weight_is_found_once_it_is_trained() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    assert names(model) == ["1.weight"]
    assert [target.name for target in find(model, frozen=True)] == ["0.weight", "1.weight"]
    model[0].requires_grad_()
    assert names(model) == ["0.weight", "1.weight"]


class Own(nn.Module):
    """Parameters that the model owns itself, in lists, of integers, complex ones, none at all."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, 3))
        self.scale = nn.Parameter(torch.zeros(3))
        self.bias = nn.Parameter(torch.zeros(2, 3))
        self.log_bias_table = nn.Parameter(torch.zeros(2, 3))
        self.counts = nn.Parameter(torch.zeros(2, 3, dtype=torch.int64), requires_grad=False)
        self.phases = nn.Parameter(torch.zeros(2, 3, dtype=torch.complex64))
        self.register_parameter("nothing", None)
        self.register_buffer("table", torch.zeros(2, 3))
        self.heads = nn.ParameterList([torch.zeros(2, 2), torch.zeros(2)])
        self.by_name = nn.ParameterDict({"key": nn.Parameter(torch.zeros(2, 2, 2))})


def test_parameters_of_the_root_and_in_lists() -> None:
    assert names(Own(), "*") == ["w", "heads.0", "by_name.key"]
    unknown = "it is not the weight of a known kind of layer"
    assert left_out(Own()) == dict.fromkeys(["w", "heads.0", "by_name.key"], unknown)
    assert left_out(Own(), ["w"]) == {}
    assert left_out(Own(), ignore=["heads.*"]) == dict.fromkeys(["w", "by_name.key"], unknown)
    with pytest.raises(ValueError, match=rf"must have a prunable parameter .*got none \(w: {unknown}; heads.0"):
        find(Own())


class Conv1D(nn.Module):
    """A linear layer with its inputs first, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))


class Embeddings(Conv1D):
    """A table that is no nn.Embedding."""


class MixtralExperts(nn.Module):
    """Matrices of all experts in one, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.zeros(4, 6, 3)), nn.Parameter(torch.zeros(4, 3, 6))


class Token(nn.Module):
    """Parameters that are added, or exponents, or compared with: no weights of layers."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("cls_token", "pos_embed", "W_pos", "A_log", "att", "comp"):
            setattr(self, name, nn.Parameter(torch.zeros(1, 2, 3)))


class LoRA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 2)}), nn.Parameter(torch.zeros(4, 2))
        self.base = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Conv1D(), ["weight"]),
        (MixtralExperts(), ["gate_up_proj", "down_proj"]),
        (LoRA(), ["base.weight"]),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(2, 3)), ["parametrizations.weight.original"]),
        (Embeddings(), []),
        (Token(), []),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)), []),
        (nn.utils.parametrizations.orthogonal(nn.Linear(2, 3)), []),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_weights_of_known_kinds_of_layers_are_targets_and_others_are_named(
    module: nn.Module, expected: list[str]
) -> None:
    model = nn.ModuleDict({"a": module, "b": nn.Linear(2, 2)})
    found = [f"a.{name}" for name in expected]
    assert names(model) == [*found, "b.weight"]
    weights = [name for name, p in model.named_parameters() if p.ndim >= 2 and "bias" not in name]
    assert [*left_out(model)] == [name for name in weights if name not in [*found, "b.weight"]]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.utils.parametrizations.weight_norm, "a row of zeros becomes NaN"),
        (nn.utils.weight_norm, "a row of zeros becomes NaN"),
        (nn.utils.parametrizations.orthogonal, "an orthogonal parametrization turns its zeros into other weights"),
    ],
)
def test_weights_whose_zeros_would_be_lost_are_no_targets_even_if_they_are_named(
    layer: Callable[[nn.Module], nn.Module], reason: str
) -> None:
    model = nn.Sequential(layer(nn.Linear(2, 3)), nn.Linear(3, 3))
    assert names(model, "*") == ["1.weight"]
    assert all(why.endswith(reason) for why in left_out(model, ["*"]).values())
    assert left_out(model, ["*"]).keys() == {name for name, p in model[0].named_parameters(prefix="0") if p.ndim > 1}
    with pytest.raises(ValueError, match=reason):
        find(model, ["0.*"])


def test_a_literal_bracket_is_found_by_the_name_itself() -> None:
    model = nn.ModuleDict({"a[0]": nn.Linear(2, 2), "a[1]": nn.Linear(2, 2)})
    assert names(model, "a[0].weight") == ["a[0].weight"]


@pytest.mark.parametrize("name", ["counts", "phases", "scale", "bias", "table", "nothing"])
def test_what_is_no_weight_cannot_be_asked_for(name: str) -> None:
    with pytest.raises(ValueError, match=f"targets must match a parameter, got '{name}'; close names: "):
        find(Own(), [name])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_weight_without_entries_is_no_target() -> None:
    assert names(nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 3), nn.Linear(4, 4))) == ["2.weight"]


def test_a_lazy_weight_is_found_once_it_is_there() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 2))
    assert names(model) == ["2.weight"]
    assert names(model, "0.weight", "2.*") == ["2.weight"]  # it may be named before
    model(torch.zeros(3, 5))
    assert names(model) == ["0.weight", "2.weight"]


def test_a_model_that_is_lazy_throughout_has_no_targets_yet() -> None:
    assert find(nn.Sequential(nn.LazyLinear(4), nn.LazyConv2d(3, 2))) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_float_type_is_a_target(dtype: torch.dtype) -> None:
    assert names(nn.Linear(2, 2, dtype=dtype)) == ["weight"]


def test_targets_are_in_the_order_of_the_model() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(12)))
    assert names(model) == [f"{i}.weight" for i in range(12)]


def test_a_target_knows_its_parameter_and_its_module() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(2, 2))
    (target,) = find(model)
    assert target.parameter is model[1].weight
    assert target.modules == (model[1],)
    assert target.aliases == ("1.weight",)


# ------------------------------------------------------------------------------------------------ tied weights


class Tied(nn.Module):
    def __init__(self, embedding: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Embedding(3, 3) if embedding else nn.Linear(3, 3)
        self.decoder = nn.Linear(3, 3)
        self.decoder.weight = self.encoder.weight


def test_tied_weights_count_once_under_their_first_name() -> None:
    model = Tied()
    (target,) = find(model)
    assert target.name == "encoder.weight"
    assert target.aliases == ("encoder.weight", "decoder.weight")
    assert target.modules == (model.encoder, model.decoder)


@pytest.mark.parametrize("pattern", ["encoder.weight", "decoder.weight", "dec*", "re:.*coder", "*"])
def test_tied_weights_are_found_by_either_name(pattern: str) -> None:
    assert names(Tied(), pattern) == ["encoder.weight"]


@pytest.mark.parametrize("pattern", ["encoder.weight", "decoder.weight"])
def test_tied_weights_are_ignored_by_either_name(pattern: str) -> None:
    model = nn.ModuleDict({"tied": Tied(), "free": nn.Linear(2, 2)})
    assert names(model, ignore=(f"tied.{pattern}",)) == ["free.weight"]


def test_a_weight_that_is_an_embedding_too_must_be_asked_for() -> None:
    model = nn.ModuleDict({"tied": Tied(embedding=True), "free": nn.Linear(2, 2)})
    assert names(model) == ["free.weight"]
    assert names(model, "tied.decoder.weight") == ["tied.encoder.weight"]


def test_a_module_that_is_used_twice_counts_once() -> None:
    layer = nn.Linear(2, 2)
    (target,) = find(nn.Sequential(layer, nn.ReLU(), layer))
    assert target.aliases == ("0.weight", "2.weight")
    assert target.modules == (layer,)


# ------------------------------------------------------------------------------------------------ by name


def transformer() -> nn.Module:
    layers = nn.Sequential(*(nn.ModuleDict({"fc1": nn.Linear(2, 4), "fc2": nn.Linear(4, 2)}) for _ in range(2)))
    return nn.ModuleDict({"emb": nn.Embedding(5, 2), "layers": layers, "head": nn.Linear(2, 5)})


@pytest.mark.parametrize(
    ("targets", "ignore", "expected"),
    [
        (["head.weight"], [], ["head.weight"]),
        (
            ["layers.*"],
            [],
            ["layers.0.fc1.weight", "layers.0.fc2.weight", "layers.1.fc1.weight", "layers.1.fc2.weight"],
        ),
        (["*.fc1.*"], [], ["layers.0.fc1.weight", "layers.1.fc1.weight"]),
        (["layers.?.fc[2-9].weight"], [], ["layers.0.fc2.weight", "layers.1.fc2.weight"]),
        (["head.*", "layers.0.*"], ["*.fc2.*"], ["layers.0.fc1.weight", "head.weight"]),
        (["emb.weight"], [], ["emb.weight"]),
        (["*"], ["layers.*"], ["emb.weight", "head.weight"]),
        ([], ["layers.1.*", "head.*"], ["layers.0.fc1.weight", "layers.0.fc2.weight"]),
        ([r"re:layers\.\d+\.fc1"], [], ["layers.0.fc1.weight", "layers.1.fc1.weight"]),
        ([r"re:(head|layers\.0\.fc2)\.weight$"], [], ["layers.0.fc2.weight", "head.weight"]),
        ([], [r"re:layers"], ["head.weight"]),
        ([], ["head.bias"], [f"layers.{i}.fc{j}.weight" for i in (0, 1) for j in (1, 2)] + ["head.weight"]),
    ],
)
def test_patterns(targets: list[str], ignore: list[str], expected: list[str]) -> None:
    assert [target.name for target in find(transformer(), targets, ignore)] == expected


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("fc.weight", "fc.weight", True),
        ("fc", "fc.weight", False),  # a glob covers the whole name
        ("FC.weight", "fc.weight", False),
        ("*.weight", "a.b.weight", True),
        ("[ab].weight", "b.weight", True),
        ("re:fc", "fc.weight", True),  # a regular expression its beginning
        ("re:fc$", "fc.weight", False),
        ("re:weight", "fc.weight", False),
        ("re:.*weight", "fc.weight", True),
    ],
)
def test_matches(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, ["other", name]) is expected


@pytest.mark.parametrize(
    ("pattern", "close"),
    [
        ("haed.weight", "head.weight"),
        ("layers.0.fc3.weight", "layers.0.fc2.weight"),
        ("layer.1.fc1.weight", "layers.1.fc1.weight"),
        ("xyz", "emb.weight"),  # nothing is close: the first names there are
    ],
)
@pytest.mark.parametrize("argument", ["targets", "ignore"])
def test_a_pattern_that_matches_nothing_is_refused_with_close_names(argument: str, pattern: str, close: str) -> None:
    message = rf"{argument} must match a parameter, got '{re.escape(pattern)}'; close names: \[.*'{re.escape(close)}'"
    with pytest.raises(ValueError, match=message):
        find(transformer(), **{argument: ["*", pattern]})  # type: ignore[arg-type]


@pytest.mark.parametrize("argument", ["targets", "ignore"])
def test_a_string_in_place_of_a_sequence_is_refused(argument: str) -> None:
    message = rf"{argument} must be a sequence of patterns, got the string 'head\.\*': write \['head\.\*'\]"
    with pytest.raises(ValueError, match=message):
        find(transformer(), **{argument: "head.*"})  # type: ignore[arg-type]


def test_a_broken_regular_expression_is_refused() -> None:
    with pytest.raises(ValueError, match=r"targets must .*'re:\['"):
        find(transformer(), ["re:["])


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: nn.Sequential(nn.ReLU()), r"its parameters: \[\]"),
        (lambda: nn.BatchNorm1d(2), r"its parameters: \['weight', 'bias'\]"),
        (lambda: nn.Linear(2, 2).requires_grad_(False), r"frozen: \['weight'\]"),
        (lambda: nn.Embedding(2, 2), r"its parameters: \['weight'\]"),
    ],
)
def test_a_model_without_a_prunable_parameter_is_refused(build: Callable[[], nn.Module], why: str) -> None:
    with pytest.raises(ValueError, match=rf"the model must have a prunable parameter .* got none \({why}\)"):
        find(build())


def test_ignoring_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="the model must have a prunable parameter"):
        find(transformer(), ignore=["*"])


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("fc.weight", "fc.weight"),
        ("_orig_mod.fc.weight", "fc.weight"),
        ("layers.0._orig_mod.fc.weight", "layers.0.fc.weight"),
        ("_fsdp_wrapped_module.a._fsdp_wrapped_module.weight", "a.weight"),
        ("_orig_mod._orig_mod.weight", "weight"),
        ("my_orig_model.weight", "my_orig_model.weight"),
        ("feed_forward_module.weight", "feed_forward_module.weight"),
        ("a.my_orig_mod.weight", "a.my_orig_mod.weight"),
    ],
)
def test_plain_names(name: str, plain: str) -> None:
    assert plain_name(name) == plain


def test_compiled_modules_are_found_under_the_names_of_the_plain_model() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    expected = names(model)
    model[1] = torch.compile(model[1])
    assert names(model) == expected
    assert names(torch.compile(model)) == expected
    assert names(torch.compile(model), "1.weight") == ["1.weight"]
    assert list(named_parameters(torch.compile(model))) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_named_parameters_are_the_parameters_each_once() -> None:
    model = Tied()
    found = named_parameters(model)
    assert list(found) == ["encoder.weight", "encoder.bias", "decoder.bias"]
    assert found["encoder.weight"] is model.decoder.weight


# ------------------------------------------------------------------------------------------------ per layer


@pytest.mark.parametrize(
    ("per_layer", "expected"),
    [
        ({"*": 0.5}, {"encoder.weight": 0.5, "free.weight": 0.5}),
        ({"free.*": 0.1, "*": 0.5}, {"encoder.weight": 0.5, "free.weight": 0.1}),
        ({"re:f": 0.1}, {"free.weight": 0.1}),
        ({"decoder.*": 0.3}, {"encoder.weight": 0.3}),  # a tied weight by its other name
    ],
)
def test_the_first_pattern_decides(per_layer: dict[str, float], expected: dict[str, float]) -> None:
    model = Tied()
    model.free = nn.Linear(2, 2)
    assert fractions(per_layer, find(model)) == expected


def test_a_pattern_that_decides_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sparsity must map .* got '1\.\*'"):
        fractions({"0.*": 0.5, "1.*": 0.5}, find(nn.Sequential(nn.Linear(2, 2))))


# ------------------------------------------------------------------------------------------------ output channels


@pytest.mark.parametrize(
    ("layer", "dim"),
    [
        (nn.Linear(2, 3), 0),
        (nn.Conv2d(2, 3, 1), 0),
        (nn.LSTM(2, 3), 0),
        (nn.ConvTranspose1d(2, 3, 1), 1),
        (nn.ConvTranspose2d(2, 3, 1), 1),
        (nn.ConvTranspose3d(2, 3, 1), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_dimension_of_the_output_channels(layer: nn.Module, dim: int) -> None:
    assert {channel_dim(target) for target in find(layer)} == {dim}


def test_a_weight_of_a_module_of_ones_own_has_its_output_channels_first() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3, 2))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w.T

    (target,) = find(Mine(), ["w"])
    assert isinstance(target, Target)
    assert channel_dim(target) == 0
