"""Batches that are mappings, as tokenizers make them, and outputs with parts that are no tensors."""

from collections import UserDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from models import fit
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune import SNIP, Channel, Pruning, Wanda, prune, sparsegpt, sparsity
from lightning_prune.models.forward import convert, difference, tensors


class Encoding(UserDict[str, Tensor]):
    """A mapping that is no dict, as a tokenizer returns it."""


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None
    cache: Any = None


class Tagger(nn.Module):
    """Takes keywords and returns a dataclass, with a cache unless its config forbids it."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(use_cache=True)
        self.embed, self.head = nn.Embedding(20, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Output:
        hidden = self.embed(input_ids) * attention_mask[..., None]
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(hidden)
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Output(logits, loss, (hidden,) if self.config.use_cache else None)


def batches(labels: bool = False, kind: Any = dict) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(2):
        ids = torch.randint(20, (3, 5), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones(3, 5, dtype=torch.int64)}
        found.append(kind({**batch, "labels": ids % 3} if labels else batch))
    return found


@pytest.mark.parametrize("kind", [dict, Encoding])
@pytest.mark.parametrize("sequential", [None, "blocks"])
def test_a_batch_of_a_tokenizer_calibrates(kind: Any, sequential: str | None) -> None:
    model = Tagger()
    prune(model, 0.5, criterion=Wanda(window=2), data=batches(kind=kind), sequential=sequential)
    assert sparsity(model) == 0.5
    sparsegpt(model, 0.75, data=batches(kind=kind), sequential=sequential)
    assert sparsity(model) == pytest.approx(0.75, abs=0.01)
    assert model.config.use_cache


def test_a_model_that_returns_its_loss_needs_no_other_one() -> None:
    model = Tagger()
    prune(model, 0.5, criterion=SNIP(window=2), data=batches(labels=True))
    assert sparsity(model) == 0.5
    with pytest.raises(ValueError, match=r"'attention_mask'. and an output of Output: add labels"):
        prune(model, 0.5, criterion=SNIP(window=2), data=batches())


def test_keys_that_the_model_does_not_take_are_named() -> None:
    data = [{**batch, "text": ["a"]} for batch in batches()]
    with pytest.raises(TypeError, match=r"Tagger.forward as its keys, got .*'text'.*drop the other entries"):
        prune(Tagger(), 0.5, criterion=Wanda(window=2), data=data)


class Trained(LightningModule):
    """Takes batches as they come; no example input is given."""

    def __init__(self) -> None:
        super().__init__()
        self.tagger = Tagger()

    def forward(self, **batch: Tensor) -> Output:
        return self.tagger(**batch)

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        loss = self(**batch).loss
        assert loss is not None
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(batches(labels=True), batch_size=None)  # type: ignore[arg-type]


def test_the_first_batch_of_a_training_is_the_example() -> None:
    model = Trained()
    pruning = Pruning(0.5, granularity=Channel(coupled=True), start=0, end=3, scope="local", shrink_at_end=True)
    fit(model, pruning, max_epochs=2)
    assert [block[0].out_features for block in model.tagger.blocks] == [4, 4]
    assert [block[2].in_features for block in model.tagger.blocks] == [4, 4]


@dataclass(frozen=True)
class Batch:
    """A frozen batch with more than tensors in it."""

    x: Tensor
    names: tuple[str, ...] = ("a",)


def test_dataclasses_are_converted_and_compared() -> None:
    batch = convert(Batch(torch.ones(2)), torch.device("cpu"), torch.float64)
    assert (batch.x.dtype, batch.names) == (torch.float64, ("a",))
    output = Output(torch.ones(2), cache=SimpleNamespace(keys=torch.zeros(3)))
    assert [tensor.numel() for tensor in tensors(output)] == [2]
    assert difference(output, Output(torch.ones(2), cache=object())) == 0.0
