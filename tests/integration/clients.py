"""Models of packages that nobody here wrote, trained with the callbacks as they are: `make clients`.

Not collected by the test suite, since it needs packages of some gigabytes.
"""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from models import QUIET, On
from modes import Probe, assert_masked, leftovers
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune import Distillation, MagnitudePruning, PruningReport, RigL

# advice and deprecations of the packages themselves
pytestmark = pytest.mark.filterwarnings("default")

Client = tuple[LightningModule, Callable[[], Any]]


def forecasting(kind: str) -> Client:
    """Return a network of pytorch-forecasting, and its loader over three noisy waves."""
    import pytorch_forecasting as forecasting
    from pytorch_forecasting.metrics import NormalDistributionLoss, QuantileLoss

    steps = np.arange(60)
    waves = [np.sin(steps / (2 + series)) + np.random.default_rng(series).normal(0, 0.1, 60) for series in range(3)]
    table = pd.DataFrame(
        {
            "step": np.tile(steps, 3),
            "series": np.repeat(["a", "b", "c"], 60),
            "value": np.concatenate(waves).astype("float32"),
        }
    )
    data = forecasting.TimeSeriesDataSet(
        table,
        time_idx="step",
        target="value",
        group_ids=["series"],
        max_encoder_length=12,
        max_prediction_length=4,
        min_encoder_length=12,
        time_varying_unknown_reals=["value"],
        time_varying_known_reals=["step"] if kind == "TemporalFusionTransformer" else [],
    )
    losses = {"TemporalFusionTransformer": QuantileLoss(), "DeepAR": NormalDistributionLoss()}
    options: dict[str, Any] = {"loss": losses[kind]} if kind in losses else {}
    if kind == "NBeats":
        options["widths"] = [16, 64]
    network = getattr(forecasting, kind).from_dataset(data, learning_rate=0.01, **options)
    return network, partial(data.to_dataloader, train=True, shuffle=False, batch_size=16, num_workers=0)


class Nodes(LightningModule):
    """A network of PyG that labels the nodes of one random graph."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        from torch_geometric.nn import models

        self.net = getattr(models, kind)(8, 16, num_layers=2, out_channels=3)

    def forward(self, batch: Any) -> Tensor:
        return self.net(batch.x, batch.edge_index)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch), batch.y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


def graphs(kind: str) -> Client:
    """Return a graph network, and eight batches of one graph each."""
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader as GraphLoader

    def graph() -> Data:
        nodes = torch.randn(30, 8)
        return Data(x=nodes, edge_index=torch.randint(30, (2, 90)), y=nodes[:, :3].argmax(1))

    data = [graph() for _ in range(8)]
    return Nodes(kind), lambda: GraphLoader(data, batch_size=1)


def molecules(_: str) -> Client:
    """Return the message passing network of chemprop, and small molecules."""
    from chemprop import data, featurizers, models
    from chemprop import nn as parts

    smiles = ["C" * n + end for n in range(1, 9) for end in ("", "O", "N", "C(=O)O")]
    points = [data.MoleculeDatapoint.from_smi(one, [float(len(one))]) for one in smiles]
    featurizer = featurizers.SimpleMoleculeMolGraphFeaturizer()
    dataset = data.MoleculeDataset(points, featurizer)
    dataset.normalize_targets()
    network = models.MPNN(parts.BondMessagePassing(d_h=32), parts.MeanAggregation(), parts.RegressionFFN(input_dim=32))
    return network, lambda: data.build_dataloader(dataset, batch_size=4, num_workers=0, shuffle=False)


class Language(LightningModule):
    """A model of transformers, given the batches that a tokenizer makes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        import transformers

        small = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes = {
            "Bert": {**small, "intermediate_size": 64},
            "Llama": {**small, "intermediate_size": 64, "num_key_value_heads": 2},
            "GPT2": {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
        }
        ends = {"Bert": "ForMaskedLM", "Llama": "ForCausalLM", "GPT2": "LMHeadModel"}
        config = getattr(transformers, f"{kind}Config")(**sizes[kind])
        self.net = getattr(transformers, f"{kind}{ends[kind]}")(config)

    def forward(self, **inputs: Tensor) -> Any:
        return self.net(**inputs)

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        return self(**batch, labels=batch["input_ids"]).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def language(kind: str) -> Client:
    """Return a small language model, and batches of eight sentences of random words."""
    words = torch.randint(50, (64, 12))
    data = [{"input_ids": sentence, "attention_mask": torch.ones(12, dtype=torch.int64)} for sentence in words]
    return Language(kind), lambda: DataLoader(data, batch_size=8)


class SelfSupervised(LightningModule):
    """BYOL as in the examples of lightly: two networks, one of which follows the other by a moving average."""

    def __init__(self) -> None:
        super().__init__()
        import copy

        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        convolutions = [nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.backbone = nn.Sequential(*convolutions)
        self.projection_head = BYOLProjectionHead(16, 32, 16)
        self.prediction_head = BYOLPredictionHead(16, 32, 16)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NegativeCosineSimilarity()

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        from lightly.models.utils import update_momentum

        update_momentum(self.backbone, self.backbone_momentum, m=0.99)
        update_momentum(self.projection_head, self.projection_head_momentum, m=0.99)
        predicted = [self.prediction_head(self.projection_head(self.backbone(view))) for view in batch]
        with torch.no_grad():
            seen = [self.projection_head_momentum(self.backbone_momentum(view)) for view in batch]
        return 0.5 * (self.criterion(predicted[0], seen[1]) + self.criterion(predicted[1], seen[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


def pictures(_: str) -> Client:
    """Return the network of lightly, and pairs of views: a picture, and the same with noise."""
    data = [(view, view + 0.1 * torch.randn_like(view)) for view in torch.rand(64, 3, 16, 16)]
    return SelfSupervised(), lambda: DataLoader(data, batch_size=8)


CLIENTS: dict[str, Callable[[], Client]] = {
    "forecasting, TFT": partial(forecasting, "TemporalFusionTransformer"),
    "forecasting, NHiTS": partial(forecasting, "NHiTS"),
    "forecasting, NBeats": partial(forecasting, "NBeats"),
    "forecasting, DeepAR": partial(forecasting, "DeepAR"),
    "PyG, GCN": partial(graphs, "GCN"),
    "PyG, GAT": partial(graphs, "GAT"),
    "PyG, GraphSAGE": partial(graphs, "GraphSAGE"),
    "chemprop, MPNN": partial(molecules, "MPNN"),
    "transformers, BERT": partial(language, "Bert"),
    "transformers, GPT-2": partial(language, "GPT2"),
    "transformers, Llama": partial(language, "Llama"),
    "lightly, BYOL": partial(pictures, "BYOL"),
}
EPOCHS = 4


def train(client: str, *callbacks: Any, ckpt_path: Path | None = None, **options: Any) -> LightningModule:
    """Train a client with the callbacks, from the same start each time; return the module."""
    seed_everything(0, verbose=False)
    model, loader = CLIENTS[client]()
    settings = {**QUIET, "max_epochs": EPOCHS, "limit_val_batches": 0, **options}
    # dropout draws from the global generator, which no checkpoint holds
    seeded = On(on_train_batch_start=lambda trainer, *_: seed_everything(trainer.global_step, verbose=False))
    trainer = Trainer(**settings, callbacks=[seeded, *callbacks])
    masked = [callback for callback in callbacks if hasattr(callback, "masks")]
    with warnings.catch_warnings(), Probe(model, *masked) as probe:
        warnings.simplefilter("ignore")
        trainer.fit(model, loader(), ckpt_path=ckpt_path and str(ckpt_path), weights_only=False)
    assert not probe.dense
    assert not leftovers(model, *trainer.optimizers)
    return model


@pytest.mark.parametrize("client", CLIENTS)
def test_magnitude_pruning_with_its_defaults_is_exact_and_loads_into_the_plain_model(client: str) -> None:
    callback = MagnitudePruning(0.8)
    model = train(client, callback)
    assert_masked(model, callback, 0.8)
    plain, _ = CLIENTS[client]()
    plain.load_state_dict(model.state_dict())
    assert all(not plain.get_parameter(name)[~mask].any() for name, mask in callback.masks.items())


@pytest.mark.parametrize("client", CLIENTS)
def test_a_run_that_was_killed_ends_as_the_whole_one(client: str, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)
    expected = train(client, MagnitudePruning(0.8, start=0.1, end=0.9), saver, enable_checkpointing=True)
    again = MagnitudePruning(0.8, start=0.1, end=0.9)
    found = train(client, again, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_masked(found, again, 0.8)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name


@pytest.mark.parametrize("client", CLIENTS)
def test_sparse_training_holds_its_masks(client: str) -> None:
    callback = RigL(0.8, frequency=4)
    assert_masked(train(client, callback), callback, 0.8)


# what the errors of Distillation ask for where a model does not return logits, or is not called as a whole
TAUGHT: dict[str, dict[str, str]] = {
    "forecasting, NHiTS": {"layer": ""},
    "forecasting, NBeats": {"layer": ""},
    "chemprop, MPNN": {"network": "message_passing", "layer": ""},
}


@pytest.mark.parametrize("client", [client for client in CLIENTS if "BYOL" not in client])  # which has no one output
def test_a_dense_teacher_and_a_report_go_along(client: str, tmp_path: Path) -> None:
    callback = MagnitudePruning(0.8)
    report = PruningReport(str(tmp_path / "report.html"))
    assert_masked(train(client, callback, Distillation("dense", **TAUGHT.get(client, {})), report), callback, 0.8)
    assert "MagnitudePruning" in (tmp_path / "report.html").read_text()
