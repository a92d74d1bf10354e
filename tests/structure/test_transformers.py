"""Transformers as their library has them: channels and heads are found and go, and the outputs stay as they were."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import (
    ActivationNorm,
    Channel,
    Granularity,
    Head,
    Layer,
    Random,
    ResidualChannel,
    load_shrunk,
    prune,
    save_shrunk,
    shrink,
)
from lightning_prune.structure.tracing import trace

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 30},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
}
SHORT = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_inner": 24, "vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2}
KINDS: dict[str, tuple[str, dict[str, Any], int, int]] = {  # model, its sizes, units of channels, units of heads
    "encoder": ("BertModel", SIZES, 24, 4),
    "disentangled": ("DebertaV2Model", {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, 24, 4),
    "fused and gated": ("ModernBertModel", SIZES, 24, 4),
    "position biases": ("MPNetModel", SIZES, 24, 4),
    "transposed": ("GPT2LMHeadModel", SHORT, 24, 4),
    "fused": ("GPTNeoXForCausalLM", SIZES, 24, 4),
    "one key": ("FalconForCausalLM", {**SIZES, "ffn_hidden_size": 24, "alibi": False}, 24, 4),
    "gated, grouped queries": ("LlamaForCausalLM", {**SIZES, "num_key_value_heads": 2}, 24, 2),
    "one key, gated": ("LlamaForCausalLM", {**SIZES, "num_key_value_heads": 1}, 24, 4),
    "fused, grouped queries": (
        "FalconForCausalLM",
        {**SIZES, "ffn_hidden_size": 24, "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
        *(24, 2),
    ),
    "numbers of heads in the config": ("Phi3ForCausalLM", {**SIZES, "num_key_value_heads": 2}, 24, 2),
    "experts": ("MixtralForCausalLM", {**SIZES, "num_key_value_heads": 2, "num_local_experts": 3}, 24, 2),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def build(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model in double precision, and a batch as a tokenizer returns it."""
    torch.manual_seed(0)
    name, sizes, *_ = KINDS[kind]
    cls = getattr(transformers, name)
    config = cls.config_class(**sizes)
    config._experts_implementation = "eager"  # the others have no double precision
    ids = torch.randint(3, 30, (2, 5))
    ids[1, 3:] = 0
    return cls(config).double().eval(), {"input_ids": ids, "attention_mask": (ids > 0).long()}


def without_padding(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values[:1] for name, values in batch.items()}


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch)[0]


@kinds
@pytest.mark.parametrize("heads", [False, True])
def test_half_of_the_units_go_and_the_outputs_stay(kind: str, heads: bool) -> None:
    model, batch = build(kind)
    count = KINDS[kind][2 + heads]
    granularity = Head() if heads else Channel(coupled=True)
    masks = prune(model, 0.5, granularity=granularity, example_inputs=without_padding(batch))
    small = shrink(model, without_padding(batch), masks=masks)
    for example in (batch, without_padding(batch)):  # which run through other functions
        assert torch.allclose(output(small, example), output(model, example), rtol=0.0, atol=1e-10)
    (group,) = [group for group in trace(model, batch).groups if bool(group.owners) == heads]
    assert group.size == count
    parameters = dict(small.named_parameters())
    for member in group.members:
        length = dict(model.named_parameters())[member.name].shape[member.dim]
        assert parameters[member.name].shape[member.dim] == length - member.index.numel() // 2
    assert getattr(model.config, "use_cache", None) in (None, True)  # as it was


def test_a_shrunk_decoder_generates() -> None:
    model, batch = build("gated, grouped queries")
    small = shrink(model, batch, masks=prune(model, 0.5, granularity=Head(), example_inputs=batch))
    attention = small.model.layers[0].self_attn
    assert attention.q_proj.out_features == 2 * attention.k_proj.out_features == 16
    written = [each.generate(**without_padding(batch), max_new_tokens=4, do_sample=False) for each in (model, small)]
    assert torch.equal(*written)


QUERIES = {
    "LLaMA": ("LlamaForCausalLM", {}),
    "odd numbers": ("LlamaForCausalLM", {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3}),
    "Mistral": ("MistralForCausalLM", {}),
    "biases": ("Qwen2ForCausalLM", {}),
    "norms of queries and keys": ("Qwen3ForCausalLM", {"head_dim": 8}),
    "fused": ("Phi3ForCausalLM", {}),
    "fused, one behind the other": (
        "FalconForCausalLM",
        {"ffn_hidden_size": 24, "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "experts": ("MixtralForCausalLM", {"num_local_experts": 3}),
    "one key": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
}


@pytest.mark.parametrize("kind", QUERIES)
def test_single_queries_go_and_their_keys_stay(kind: str) -> None:
    torch.manual_seed(0)
    name, sizes = QUERIES[kind]
    cls = getattr(transformers, name)
    config = cls.config_class(**{**SIZES, "num_attention_heads": 8, "num_key_value_heads": 2, **sizes})
    config._experts_implementation = "eager"
    model, ids = cls(config).double().eval(), torch.randint(3, 30, (2, 5))
    before = output(model, {"input_ids": ids})
    masks = prune(model, 1 / 3, granularity=Head(queries=True), example_inputs={"input_ids": ids})
    small = shrink(model, {"input_ids": ids})
    assert torch.allclose(output(small, {"input_ids": ids}), output(model, {"input_ids": ids}), rtol=0.0, atol=1e-10)
    assert not torch.allclose(before, output(model, {"input_ids": ids}), atol=1e-6)
    former, now = dict(model.named_parameters()), dict(small.named_parameters())
    cut = {name for name in former if former[name].shape != now[name].shape}
    assert cut == set(masks)
    assert not any(".k_proj" in name or ".v_proj" in name for name in cut)
    queries = config.num_attention_heads
    kept = 6 if queries == 9 else 5 if kind == "one key" else 6
    (read,) = {now[name].shape[1] / former[name].shape[1] for name in cut if ".o_proj." in name or ".dense." in name}
    assert read == kept / queries
    cached, whole = (small.generate(ids, max_new_tokens=3, do_sample=False, use_cache=use) for use in (True, False))
    assert cached.equal(whole)


def test_what_stays_has_a_reason_that_names_the_layer() -> None:
    model, batch = build("gated, grouped queries")
    reasons = trace(model, batch).left_out
    assert reasons["lm_head.weight"] == "its channels are outputs of the model"
    assert reasons["model.layers.0.self_attn.o_proj.weight"] == (
        "model.layers.0.mlp.gate_proj.weight reads a mixture of its channels, as behind a norm over all of them"
    )


class Rectified(nn.Module):
    """Attention beside a block with a rectifier, whose channels may all be inactive, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.norm, self.down = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 8)
        nn.init.constant_(self.up.bias, -100.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = self.o((torch.softmax(q @ k.mT, -1) @ v).transpose(1, 2).flatten(2))
        return self.down(torch.relu(self.norm(self.up(x).transpose(1, 2)).transpose(1, 2)))


def test_rectifiers_hide_no_channel() -> None:
    by_name = {group.name: group for group in trace(Rectified(), torch.randn(2, 3, 8)).groups}
    assert by_name["q.weight"].size == 2
    assert by_name["up.weight"].size == 6
    assert {member.name for member in by_name["up.weight"].members} == {
        *("up.weight", "up.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "down.weight")
    }
    assert by_name["o.weight"].size == 8


DEEP: dict[str, tuple[str, dict[str, Any]]] = {
    "LLaMA": ("LlamaForCausalLM", {**SIZES, "num_hidden_layers": 4, "num_key_value_heads": 2}),
    "windows": (
        "Gemma3ForCausalLM",
        {
            **SIZES,
            **{"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "GPT-2": ("GPT2LMHeadModel", {**SHORT, "n_layer": 4}),
    "two stacks": (
        "PegasusForConditionalGeneration",
        {
            **{"d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4, "vocab_size": 30},
            **{"decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
        },
    ),
}


@pytest.mark.parametrize("kind", DEEP)
def test_a_shallower_model_is_saved_and_loaded_and_generates_like_the_masked_one(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    name, sizes = DEEP[kind]
    cls = getattr(transformers, name)
    config = cls.config_class(**sizes)
    model, ids = cls(config).eval(), torch.randint(3, 30, (2, 6))
    batch = {"input_ids": ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {})}
    prune(model, 0.5, criterion=Random(), granularity=Layer(), example_inputs=batch)
    small = shrink(model, batch)
    removed = len(small._kept_channels.removed)
    assert removed == (3 if kind == "two stacks" else 2)
    assert torch.allclose(output(small, batch), output(model, batch), atol=1e-5)
    assert model.config.to_dict() == config.to_dict()
    before, now = (sum(len(m) for m in each.modules() if isinstance(m, nn.ModuleList)) for each in (model, small))
    assert before - now == removed

    small.save_pretrained(tmp_path)
    loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.allclose(output(loaded.eval(), batch), output(small, batch), atol=1e-6)
    with_cache, without = (
        small.generate(ids, max_new_tokens=4, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert with_cache.equal(without)
    assert with_cache.equal(loaded.generate(ids, max_new_tokens=4, do_sample=False))


def test_the_first_blocks_of_t5_stay_since_they_hold_the_position_biases() -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 4, "vocab_size": 30}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()
    ids = torch.randint(3, 30, (2, 6))
    batch = {"input_ids": ids, "decoder_input_ids": ids}
    masks = prune(model, 0.5, criterion=Random(), granularity=Layer(), example_inputs=batch)
    assert {name.split(".layer")[0] for name in masks} == {
        f"{stack}.block.{number}" for stack in ("encoder", "decoder") for number in (1, 2)
    }
    small = shrink(model, batch)
    assert (small.config.num_layers + small.config.num_decoder_layers) == 4
    assert torch.allclose(output(small, batch), output(model, batch), atol=1e-5)


def test_bert_is_refused_by_the_name_of_its_norm() -> None:
    model = transformers.BertModel(transformers.BertConfig(**{**SIZES, "num_hidden_layers": 2}))
    batch = {"input_ids": torch.randint(3, 30, (2, 6))}
    with pytest.raises(ValueError, match=r"layer\.0\..*'output\.LayerNorm' acts on the sum .* prune channels or heads"):
        prune(model, 0.5, granularity=Layer(), example_inputs=batch)


WIDE = {**SIZES, "num_hidden_layers": 2, "intermediate_size": 48}
GROUPED = {**WIDE, "num_key_value_heads": 2}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 30}
SAYING: dict[str, tuple[str, dict[str, Any], Granularity, dict[str, int]]] = {
    "gate, up and down": ("LlamaForCausalLM", GROUPED, Channel(), {"intermediate_size": 24, "num_attention_heads": 4}),
    "heads": (
        *("LlamaForCausalLM", GROUPED, Head()),
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "hidden_size": 32, "intermediate_size": 48},
    ),
    "single queries": (
        *("LlamaForCausalLM", GROUPED, Head(queries=True)),
        {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 32, "intermediate_size": 48},
    ),
    "heads as wide as the feed-forward layer": (
        *("LlamaForCausalLM", {**GROUPED, "intermediate_size": 32}, Head(queries=True)),
        {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32},
    ),
    "single queries of fused layers": (
        *("Phi3ForCausalLM", GROUPED, Head(queries=True)),
        {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
    ),
    "no name for the size of a head": ("BertModel", WIDE, Channel(), {"intermediate_size": 24}),
    "four times the width": ("GPT2LMHeadModel", {**SHORT, "n_layer": 2, "n_inner": None}, Channel(), {"n_inner": 64}),
    "hidden width": (
        *("LlamaForCausalLM", GROUPED, ResidualChannel(round_to=4)),
        {"hidden_size": 16, "head_dim": 8, "num_attention_heads": 4, "intermediate_size": 48},
    ),
    "hidden width of fused layers": ("Phi3ForCausalLM", GROUPED, ResidualChannel(), {"hidden_size": 16, "head_dim": 8}),
    "configs of two stacks": ("T5ForConditionalGeneration", T5, Channel(), {"d_ff": 24}),
}


def pruned(name: str, sizes: dict[str, Any], granularity: Granularity, **given: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Return a model, pruned, the same shrunk, and a batch."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    config = cls.config_class(**sizes)
    model, ids = cls(config).eval(), torch.randint(3, 30, (2, 6))
    batch = {"input_ids": ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {})}
    before = config.to_dict()
    prune(model, 0.5, criterion=Random(), granularity=granularity, example_inputs=batch, **given)
    small = shrink(model, batch)
    assert model.config.to_dict() == before
    assert torch.allclose(output(small, batch), output(model, batch), atol=1e-5)
    return model, small, batch


@pytest.mark.parametrize("kind", SAYING)
def test_configs_say_the_new_sizes(kind: str, tmp_path: Path) -> None:
    name, sizes, granularity, expected = SAYING[kind]
    model, small, batch = pruned(name, sizes, granularity)
    assert {size: getattr(small.config, size) for size in expected} == expected
    small.save_pretrained(tmp_path / "folder")
    loaded = type(model).from_pretrained(tmp_path / "folder").eval()
    assert torch.allclose(output(loaded, batch), output(small, batch), atol=1e-6)
    save_shrunk(small, tmp_path / "small.pt")
    again = load_shrunk(type(model)(model.config), tmp_path / "small.pt").eval()
    assert {size: getattr(again.config, size) for size in expected} == expected
    assert torch.allclose(output(again, batch), output(small, batch), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "sizes", "granularity", "given"),
    [
        ("LlamaForCausalLM", GROUPED, Channel(), {"scope": "global"}),  # layers of different widths
        ("LlamaForCausalLM", GROUPED, Channel(), {"targets": ["model.layers.0.*"]}),
        ("BertModel", WIDE, Head(), {}),  # whose config takes heads for parts of the hidden width
        ("BertForMaskedLM", WIDE, ResidualChannel(), {}),
        ("GPT2LMHeadModel", SHORT, ResidualChannel(), {}),
        ("GemmaForCausalLM", {**GROUPED, "head_dim": 8}, ResidualChannel(), {}),  # a factor follows from the width
        ("LlamaForCausalLM", GROUPED, ResidualChannel(minimum=18), {}),  # has to be a multiple of the heads
    ],
)
def test_configs_stay_where_they_cannot_say_it(
    name: str, sizes: dict[str, Any], granularity: Granularity, given: dict[str, Any], tmp_path: Path
) -> None:
    model, small, batch = pruned(name, sizes, granularity, **given)
    assert small.config.to_dict() == model.config.to_dict()
    save_shrunk(small, tmp_path / "small.pt")
    again = load_shrunk(type(model)(model.config), tmp_path / "small.pt").eval()
    assert torch.allclose(output(again, batch), output(small, batch), atol=1e-6)


def stream(name: str, sizes: dict[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model in double precision, with norms and biases that do something, and a batch."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**sizes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.rand_like(parameter))
    if "image_size" in sizes:
        return model, {"pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.float64)}
    return model, {"input_ids": torch.randint(3, 30, (2, 5))}


IMAGES = {**SIZES, "image_size": 8, "patch_size": 4}
STREAMS = {
    "rms norms, grouped queries": ("LlamaForCausalLM", GROUPED),
    "tied embeddings": ("LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "factors of one and the weight": ("GemmaForCausalLM", {**GROUPED, "head_dim": 8}),
    "norms of queries and keys": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}),
    "transposed, learned positions": ("GPT2LMHeadModel", {**SHORT, "n_layer": 2}),
    "norms of sums": ("BertForSequenceClassification", WIDE),
    "a head of its own": ("BertForMaskedLM", WIDE),
    "images": ("ViTForImageClassification", IMAGES),
    "branches side by side": ("GPTNeoXForCausalLM", WIDE),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_half_of_the_hidden_width_goes_and_the_outputs_stay(kind: str, tmp_path: Path) -> None:
    model, batch = stream(*STREAMS[kind])
    given = {"criterion": ActivationNorm(), "data": [batch], "example_inputs": batch}
    prune(model, 0.5, granularity=ResidualChannel(), **given)
    small = shrink(model, batch)
    assert torch.allclose(output(small, batch), output(model, batch), rtol=0.0, atol=1e-10)
    norms = [module for module in small.modules() if "norm" in type(module).__name__.lower()]
    assert {len(norm.weight) for norm in norms} <= {16, 8}  # those of heads have 8
    save_shrunk(small, tmp_path / "small.pt")
    again = load_shrunk(stream(*STREAMS[kind])[0], tmp_path / "small.pt").eval()
    assert torch.equal(output(again, batch), output(small.eval(), batch))


def test_a_decoder_with_less_hidden_width_generates() -> None:
    model, batch = stream(*STREAMS["tied embeddings"])
    prune(model, 0.25, granularity=ResidualChannel(), example_inputs=batch)
    small = shrink(model, batch)
    written = [each.generate(**batch, max_new_tokens=4, do_sample=False) for each in (model, small)]
    assert torch.equal(*written)


def test_a_stream_that_is_an_output_stays() -> None:
    model, batch = stream("BertModel", WIDE)
    with pytest.raises(ValueError, match="its channels are outputs of the model"):
        prune(model, 0.25, granularity=ResidualChannel(), example_inputs=batch)
