"""Whole experts: no token goes to one that is pruned, and the model without them computes what the masked one does."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from models import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader
from variants import label

from lightning_prune import (
    REAP,
    Channel,
    Expert,
    Magnitude,
    Pruning,
    Random,
    Sensitivity,
    load_shrunk,
    prune,
    save_compressed,
    save_shrunk,
    shrink,
    sparsity,
)
from lightning_prune.models.experts import expert_layers
from lightning_prune.models.forward import difference, run
from lightning_prune.models.parameters import find
from lightning_prune.updates.statistics import Observation

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

SIZES: dict[str, Any] = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
    **{"intermediate_size": 12, "vocab_size": 20, "num_experts_per_tok": 2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
KINDS: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": {"num_local_experts": 5},
    "Qwen2MoeForCausalLM": {"num_experts": 5, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 8},
    "Qwen3MoeForCausalLM": {"num_experts": 5, "moe_intermediate_size": 6, "norm_topk_prob": True},
    "OlmoeForCausalLM": {"num_experts": 5},
    "GptOssForCausalLM": {"num_local_experts": 5},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def build(kind: str = "MixtralForCausalLM") -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model in double precision, whose routers have preferences, and a batch as a tokenizer returns it."""
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    config = cls.config_class(**{**SIZES, **KINDS[kind]})
    config._experts_implementation = "eager"  # the others have no double precision
    model = cls(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.3)
    ids = torch.randint(3, 20, (3, 7))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def taken(model: nn.Module, inputs: dict[str, Tensor]) -> list[set[int]]:
    """Return which experts of each layer get a token."""
    found: list[set[int]] = []
    handles = [
        layer.experts.register_forward_pre_hook(lambda _, args: found.append(set(args[1].flatten().tolist())))
        for layer in expert_layers(model)
    ]
    run(model, inputs)
    for handle in handles:
        handle.remove()
    return found


@kinds
def test_pruned_experts_get_no_token_and_can_be_taken_out(kind: str) -> None:
    model, inputs = build(kind)
    dense = run(copy.deepcopy(model), inputs)
    assert any(0 in used for used in taken(model, inputs)), "the test needs experts that are used"
    masks = prune(model, 0.4, criterion=Random(1), granularity=Expert(), example_inputs=inputs)
    for layer, used in zip(expert_layers(model), taken(model, inputs), strict=True):
        stack = masks[f"{layer.name}.down_proj"]
        left = stack.flatten(1).any(1)
        assert stack.flatten(1).all(1).equal(left)
        assert int(left.sum()) == 3
        assert masks[f"{layer.router_name}.weight"].all(1).equal(left)
        assert used <= set(left.nonzero().flatten().tolist())
    assert difference(dense, run(model, inputs)) > 1e-3
    small = shrink(model, inputs)
    assert difference(run(model, inputs), run(small, inputs)) < 1e-10
    assert [layer.count for layer in expert_layers(small)] == [3, 3]
    assert [len(layer.router.weight) for layer in expert_layers(small)] == [3, 3]
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert not any(layer.router._forward_hooks for layer in expert_layers(small))
    assert sparsity(small) == 0.0


def grouped(experts: int = 16, groups: int = 4) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model whose router chooses two groups of experts, and two of their experts."""
    torch.manual_seed(0)
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 4, "qk_nope_head_dim": 4}
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    sizes |= {"num_key_value_heads": 2, "moe_intermediate_size": 6, "first_k_dense_replace": 0}
    config = transformers.DeepseekV3Config(
        **sizes, **latent, n_routed_experts=experts, n_group=groups, topk_group=2, n_shared_experts=1
    )
    config._experts_implementation = "eager"
    model = transformers.DeepseekV3ForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.3)
    ids = torch.randint(3, 20, (3, 7))
    return model, {"input_ids": ids}


@pytest.mark.parametrize(("experts", "groups", "left"), [(16, 4, 12), (16, 2, 12), (32, 4, 24)])
def test_groups_that_a_router_chooses_among_keep_as_many_experts_each(experts: int, groups: int, left: int) -> None:
    model, inputs = grouped(experts, groups)
    masks = prune(model, 0.3, criterion=Random(1), granularity=Expert(), example_inputs=inputs)
    for layer in expert_layers(model):
        kept = masks[f"{layer.name}.down_proj"].flatten(1).any(1).view(groups, -1).sum(1)
        assert kept.tolist() == [left // groups] * groups
    other = {"input_ids": torch.cat([inputs["input_ids"][:, :4], inputs["input_ids"][:, :3]], 1)}
    same = difference(run(model, inputs)[0][:, :4], run(model, other)[0][:, :4])
    assert same == 0.0, "tokens do not depend on later ones"
    small = shrink(model, inputs)
    assert difference(run(model, inputs), run(small, inputs)) < 1e-10
    assert [layer.count for layer in expert_layers(small)] == [left] * 2


def test_experts_whose_router_does_not_run_with_fewer_are_left_out_by_name() -> None:
    torch.manual_seed(0)
    layers = {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0, "moe_intermediate_size": 6}
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    config = transformers.Lfm2MoeConfig(**sizes, **layers, num_experts=5)
    config._experts_implementation = "eager"
    model = transformers.Lfm2MoeForCausalLM(config).eval()
    inputs = {"input_ids": torch.randint(3, 20, (2, 5))}
    with pytest.raises(ValueError, match=r"got none \(model.layers.0.feed_forward.*its router does not run with fewer"):
        prune(model, 0.4, granularity=Expert(), example_inputs=inputs)
    assert run(model, inputs)[0].isfinite().all()


def test_weights_of_a_pruned_model_alone_are_told_from_it() -> None:
    model, inputs = build("Qwen3MoeForCausalLM")
    prune(model, 0.4, granularity=Expert(), example_inputs=inputs)
    fresh, _ = build("Qwen3MoeForCausalLM")
    fresh.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="but the router chooses among all of them.*save what shrink returns"):
        shrink(fresh, inputs)


@kinds
def test_configs_say_how_many_experts_are_left(kind: str, tmp_path: Path) -> None:
    model, inputs = build(kind)
    prune(model, 0.4, granularity=Expert(), example_inputs=inputs)
    small = shrink(model, inputs)
    name = next(iter(KINDS[kind]))
    assert getattr(small.config, name) == 3
    assert getattr(model.config, name) == 5
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path, dtype=torch.float64)
    again.set_experts_implementation("eager")
    assert difference(run(small, inputs), run(again.eval(), inputs)) < 1e-10


def test_layers_with_different_numbers_are_saved_as_shrunk_models(tmp_path: Path) -> None:
    model, inputs = build()
    levels = {"*layers.0.*": 0.6, "*layers.1.*": 0.2}
    prune(model, levels, granularity=Expert(), example_inputs=inputs, targets=["*experts*"])
    small = shrink(model, inputs)
    assert [layer.count for layer in expert_layers(small)] == [2, 4]
    assert small.config.num_local_experts == 5
    save_shrunk(small, tmp_path / "small.pt")
    loaded = load_shrunk(lambda: build()[0], tmp_path / "small.pt")
    assert difference(run(small, inputs), run(loaded.eval(), inputs)) < 1e-10
    assert [layer.experts.num_experts for layer in expert_layers(loaded)] == [2, 4]


def test_as_many_stay_as_a_token_takes() -> None:
    model, inputs = build()
    prune(model, 0.99, granularity=Expert(), example_inputs=inputs)
    assert [layer.count for layer in expert_layers(shrink(model, inputs))] == [2, 2]
    model, inputs = build()
    prune(model, 0.4, granularity=Expert(minimum=4), example_inputs=inputs)
    assert [layer.count for layer in expert_layers(shrink(model, inputs))] == [4, 4]


def test_the_expert_that_matters_least_goes() -> None:
    model, inputs = build()
    with torch.no_grad():
        for layer in expert_layers(model):
            layer.experts.gate_up_proj[3] *= 0.1
            layer.experts.down_proj[3] *= 0.1
    masks = prune(model, 0.2, criterion=Magnitude(), granularity=Expert(), example_inputs=inputs)
    assert all(not masks[f"{layer.name}.down_proj"][3].any() for layer in expert_layers(model))


def scores(model: nn.Module, *batches: dict[str, Tensor]) -> list[Tensor]:
    """Return what ``REAP`` says of the experts of each layer."""
    criterion = REAP()
    units, _ = Expert().find_units(find(model), model, batches[0])
    observation = Observation(criterion, units)
    observation.open()
    for batch in batches:
        run(model, batch)
        observation.step()
    observation.close()
    observation.finish()
    return [criterion.scores(unit) for unit in units]


@torch.no_grad()
def by_hand(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return the mean of gate times norm over the tokens that each expert gets."""
    calls: list[tuple[Any, tuple[Tensor, ...]]] = []
    layers = list(expert_layers(model))
    handles = [layer.experts.register_forward_pre_hook(lambda m, args: calls.append((m, args))) for layer in layers]
    run(model, inputs)
    for handle in handles:
        handle.remove()
    found = []
    for module, (hidden, chosen, gates) in calls:
        means = torch.zeros(5, dtype=torch.float64)
        for expert in range(5):
            tokens, places = torch.where(chosen == expert)
            alone = [
                module.forward(hidden[t, None], torch.tensor([[expert]]), torch.ones(1, 1).double()) for t in tokens
            ]
            parts = [gates[t, p] * out.norm() for t, p, out in zip(tokens, places, alone, strict=True)]
            means[expert] = torch.stack(parts).mean() if parts else 0.0
        found.append(means)
    return found


@kinds
def test_what_an_expert_adds_is_the_mean_over_its_tokens(kind: str) -> None:
    model, inputs = build(kind)
    found = scores(model, inputs)
    for mine, expected in zip(found, by_hand(model, inputs), strict=True):
        torch.testing.assert_close(mine, expected)
    parts = [{name: tensor[rows] for name, tensor in inputs.items()} for rows in (slice(0, 1), slice(1, 3))]
    for mine, together in zip(scores(model, *parts), found, strict=True):
        torch.testing.assert_close(mine, together)


def test_the_expert_that_adds_least_goes() -> None:
    model, inputs = build()
    lowest = [int(found.argmin()) for found in by_hand(model, inputs)]
    masks = prune(model, 0.2, criterion=REAP(), granularity=Expert(), data=[inputs], example_inputs=inputs)
    gone = [int((~masks[f"{layer.name}.down_proj"].flatten(1).any(1)).nonzero()) for layer in expert_layers(model)]
    assert gone == lowest


def test_only_experts_are_scored_by_what_they_add() -> None:
    model, inputs = build()
    with pytest.raises(ValueError, match=r"REAP.*it is no expert of a mixture: use granularity=Expert\(\)"):
        prune(model, 0.2, criterion=REAP(), granularity=Channel(), data=[inputs], example_inputs=inputs)
    unit = Expert().find_units(find(model), model, inputs)[0][0]
    unit.module = unit.modules[0]
    with pytest.raises(ValueError, match="must be called with the hidden states, the experts of each token and their"):
        REAP().observe(unit, (torch.zeros(3, 16), torch.zeros(3, 2)))


def test_experts_that_only_a_mask_zeroes_and_width_go_together() -> None:
    model, inputs = build()
    prune(model, 0.2, granularity=Expert(), example_inputs=inputs)
    masks = prune(model, 0.5, granularity=Channel(coupled=True), example_inputs=inputs)
    small = shrink(model, inputs, masks=masks)
    assert difference(run(model, inputs), run(small, inputs)) < 1e-10
    assert {layer.experts.down_proj.shape[0] for layer in expert_layers(small)} == {4}


@pytest.mark.parametrize("first", [Expert(), Channel(coupled=True)], ids=label)
def test_experts_and_their_width_are_taken_out_in_one_call(first: Any) -> None:
    model, inputs = build()
    second = Channel(coupled=True) if isinstance(first, Expert) else Expert()
    for granularity in (first, second):
        level = 0.4 if isinstance(granularity, Expert) else 0.5
        prune(model, level, granularity=granularity, example_inputs=inputs)
    small = shrink(model, inputs)
    assert difference(run(model, inputs), run(small, inputs)) < 1e-10
    assert {tuple(layer.experts.down_proj.shape) for layer in expert_layers(small)} == {(3, 16, 6)}


def test_a_dense_model_and_one_with_too_few_experts_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Expert\(.*\) must find layers with more experts than a token takes, got none"
    ):
        prune(nn.Linear(4, 4), 0.5, granularity=Expert(), example_inputs=torch.zeros(1, 4))
    model, inputs = build()
    with pytest.raises(ValueError, match='of must be "units" for Expert'):
        prune(model, 0.5, granularity=Expert(), of="flops", example_inputs=inputs)
    with pytest.raises(ValueError, match="needs example inputs"):
        prune(model, 0.5, granularity=Expert())
    with pytest.raises(ValueError, match=r"experts.down_proj.*not among the targets|not among the targets"):
        prune(model, 0.5, granularity=Expert(), example_inputs=inputs, targets=["*gate_up_proj"])


def test_weights_alone_are_not_the_model(tmp_path: Path) -> None:
    model, inputs = build()
    prune(model, 0.4, granularity=Expert(), example_inputs=inputs)
    with pytest.raises(ValueError, match="routers choose among the experts that are left"):
        save_compressed(model, tmp_path / "model.safetensors")


class Mixture(LightningModule):
    """A small mixture of experts on token sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build()[0].float().train()
        self.model.config.use_cache = False
        self.example_input_array = {"ids": build()[1]["input_ids"]}

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits

    def training_step(self, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.randint(3, 20, (16, 7), generator=torch.Generator().manual_seed(1)), batch_size=4)


def fit(model: Mixture, pruning: Pruning, *more: Any, ckpt_path: str | None = None) -> Mixture:
    arguments = {**QUIET, "enable_checkpointing": bool(more), "max_epochs": 2}
    trainer = Trainer(**arguments, callbacks=[pruning, *more])
    trainer.fit(model, ckpt_path=ckpt_path)
    return model


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
@pytest.mark.parametrize("criterion", [Magnitude(), Sensitivity(window=1), REAP(window=2)], ids=label)
def test_experts_go_while_training_and_a_resumed_run_ends_with_the_same_bits(criterion: Any, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"criterion": criterion, "granularity": Expert(), "start": 1, "end": 5}
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    first = Pruning(0.4, **arguments)
    model = fit(Mixture(), first, saver)
    inputs = {"input_ids": model.example_input_array["ids"]}
    for layer, used in zip(expert_layers(model.model), taken(model.model, inputs), strict=True):
        left = first.masks[f"model.{layer.name}.down_proj"].flatten(1).any(1)
        assert int(left.sum()) == 3
        assert used <= set(left.nonzero().flatten().tolist())
        assert not layer.experts.down_proj[~left].any()
    small = shrink(model)
    assert difference(model(inputs["input_ids"]), small(inputs["input_ids"])) < 1e-5
    again = fit(Mixture(), Pruning(0.4, **arguments), ckpt_path=str(tmp_path / "step=4.ckpt"))  # of an epoch's end
    found = again.state_dict()
    assert all(value.equal(found[name]) for name, value in model.state_dict().items())


def test_a_run_may_end_with_the_small_model() -> None:
    model = fit(Mixture(), Pruning(0.4, granularity=Expert(), shrink_at_end=True))
    assert [layer.count for layer in expert_layers(model.model)] == [3, 3]
    assert model.model.config.num_local_experts == 3
