"""Transfer learning: a transformer is pruned while it is fine-tuned with frozen parts, or with low-rank adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from models import fit
from modes import Probe
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import ConstantSparsity, MagnitudePruning, prune, sparsity, summary

GRADUAL: dict[str, Any] = {"schedule": "linear", "start": 0, "end": 10, "frequency": 2}


def bert() -> nn.Module:
    """An encoder of two layers, each with four matrices of 256 and two of 512 weights, dropout switched off."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 8}
    depth = {"num_hidden_layers": 2, "num_attention_heads": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.BertModel(transformers.BertConfig(**sizes, **depth, **dropout), add_pooling_layer=False)


class Classifier(LightningModule):
    """Says which of the first three tokens is the greatest, from the mean of what the encoder outputs."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids=tokens).last_hidden_state.mean(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), 0.01)

    def train_dataloader(self) -> DataLoader:
        tokens = torch.randint(30, (32, 6), generator=torch.Generator().manual_seed(7))
        return DataLoader(TensorDataset(tokens, tokens[:, :3].argmax(1)), batch_size=8)


class UpperLayer(BaseFinetuning):
    """Trains the head alone in the first epoch, then the upper layer too; the rest stays as it was pretrained."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.encoder)

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.encoder.encoder.layer[1], optimizer)
        elif epoch > 1:  # a resumed run has frozen it again
            self.make_trainable(pl_module.encoder.encoder.layer[1])


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


# ------------------------------------------------------------------------------------------------ frozen parts


def test_layers_that_are_unfrozen_in_mid_run_are_pruned_and_frozen_ones_are_not() -> None:
    model = Classifier(bert())
    before = copies(model)
    callback = MagnitudePruning(0.5, **GRADUAL)
    with Probe(model, callback) as probe:
        fit(model, UpperLayer(), callback, max_epochs=3)
    assert not probe.dense
    assert {name.rpartition(".encoder.")[2].split(".")[0] for name in callback.masks} == {"layer", "head"}
    assert all(name.startswith(("encoder.encoder.layer.1.", "head.")) for name in callback.masks)
    assert len(callback.masks) == 7
    for name, parameter in model.named_parameters():
        trained = name.startswith(("encoder.encoder.layer.1.", "head."))
        assert torch.equal(parameter, before[name]) is not trained or "key.bias" in name, name
    assert sparsity(model) == callback.sparsity_now == 0.5
    assert sum(row.weights for row in summary(model).rows) == 4 * 256 + 2 * 512 + 48


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
def test_a_run_with_frozen_parts_resumes_exactly(tmp_path: Path) -> None:
    def run(path: str | None = None, *others: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model, callback = Classifier(bert()), MagnitudePruning(0.5, **GRADUAL)
        fit(model, UpperLayer(), callback, *others, ckpt_path=path, max_epochs=4, enable_checkpointing=bool(others))
        return copies(model), callback.masks

    weights, masks = run(None, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1))
    for epoch in range(3):  # 0: before the upper layer is unfrozen
        again, held = run(str(tmp_path / f"epoch={epoch}.ckpt"))
        assert all(torch.equal(again[name], weight) for name, weight in weights.items())
        assert masks.keys() == held.keys()
        assert all(torch.equal(held[name], mask) for name, mask in masks.items())


# ------------------------------------------------------------------------------------------------ adapters


def adapted(encoder: nn.Module) -> nn.Module:
    """The encoder with low-rank adapters on queries and values; all else is frozen."""
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return peft.get_peft_model(encoder, peft.LoraConfig(r=4, target_modules=["query", "value"]))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_are_pruned_and_what_they_adapt_is_not() -> None:
    model = Classifier(adapted(bert()))
    before = copies(model)
    assert {row.name for row in summary(model).rows} == {"head.weight"}  # adapters are pruned if they are named
    callback = MagnitudePruning(0.5, targets=("*.lora_*",), **GRADUAL)
    with Probe(model, callback) as probe:
        fit(model, callback, max_epochs=3)
    probe.assert_sparse()
    assert len(callback.masks) == 2 * 2 * 2
    assert all(".lora_" in name for name in callback.masks)
    assert sum(int((~mask).sum()) for mask in callback.masks.values()) == round(0.5 * 8 * 64)
    for name, parameter in model.encoder.named_parameters():
        assert torch.equal(parameter, before[f"encoder.{name}"]) is ("lora_" not in name), name


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_merged_adapters_fill_zeros_and_masks_bring_them_back() -> None:
    encoder = bert()
    masks = prune(encoder, 0.5)  # named as in the encoder, before and after it is adapted
    model = Classifier(adapted(encoder))
    fit(model, max_epochs=2)
    base = encoder.get_parameter("encoder.layer.0.attention.self.query.base_layer.weight")
    assert not base[~masks["encoder.layer.0.attention.self.query.weight"]].any()  # it is frozen

    model.encoder = model.encoder.merge_and_unload()
    assert model.encoder is encoder
    assert sparsity(encoder.requires_grad_()) < 0.4  # W + BA has values where W has none
    masks.apply(encoder)
    assert sparsity(encoder) == 0.5

    holding = ConstantSparsity(targets=("encoder.*",))
    before = copies(model)
    fit(model, holding, max_epochs=2)
    assert sparsity(model, targets=("encoder.encoder.*",)) == 0.5
    for name, mask in masks.items():
        weight = model.encoder.get_parameter(name)
        assert not weight[~mask].any()
        assert not torch.equal(weight, before[f"encoder.{name}"])
