"""Commands: what each subcommand does; those that write a file say what they wrote."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from lightning_prune.command_line.files import Contents, is_safetensors, read
from lightning_prune.command_line.tables import diff_text, report_text, summary_text
from lightning_prune.export.compressed import load_compressed, save_compressed
from lightning_prune.reporting.contents import history_figures
from lightning_prune.reporting.history import History
from lightning_prune.reporting.html_page import STYLE, render

_REPORT = {"model", "made_by", "steps", "sparsity", "before", "after", "callbacks", "history", "layers", "config"}


def summary(given: argparse.Namespace) -> str:
    """Describe a checkpoint."""
    return summary_text(given.checkpoint, read(given.checkpoint))


def diff(given: argparse.Namespace) -> str:
    """Compare the masks of two checkpoints."""
    first, second = read(given.a), read(given.b)
    return f"a: {given.a}, {first.kind}\nb: {given.b}, {second.kind}\n{diff_text(first, second)}"


def compress(given: argparse.Namespace) -> str:
    """Write the weights of a checkpoint to a compressed file."""
    contents = read(given.checkpoint)
    target = _writable(given.output or _beside(given.checkpoint, ".compressed.safetensors"), given.checkpoint, given)
    save_compressed(contents.tensors, target)
    return _written(contents, target)


def expand(given: argparse.Namespace) -> str:
    """Write the weights of a compressed file as a ``state_dict``, or as a plain safetensors file."""
    if not is_safetensors(Path(given.compressed)):
        raise ValueError(f"{given.compressed} must be a file that `compress` or save_compressed wrote")
    state = load_compressed(given.compressed)
    target = _writable(given.output or _beside(given.compressed, ".pt"), given.compressed, given)
    if target.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({name: tensor.clone() for name, tensor in state.items()}, target)  # tied tensors are refused
    else:
        torch.save(state, target)
    return _written(Contents("a compressed file", state), target)


def report(given: argparse.Namespace) -> str:
    """Print the tables of a report or, with an output, draw its page again."""
    found = _report(given.report)
    try:
        if given.output is None:
            return report_text(found)
        target = _writable(given.output, given.report, given)
        history = found["history"]
        metrics = {
            name: [(at, math.nan if value is None else value) for at, value in points]
            for name, points in history["metrics"].items()
        }
        drawn = History([(at, level) for at, level in history["sparsity"]], metrics)
        without_masks = "The JSON file of a report has no masks."
        page = render(found, history_figures(drawn, STYLE), without_masks=without_masks)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{given.report} {_IS_REPORT}, got a damaged one: {error!r}") from error
    target.write_text(page, encoding="utf-8")
    return f"{target}: {target.stat().st_size:,} bytes"


_IS_REPORT = "must be the JSON file that PruningReport writes beside its page"


def _report(path: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{path} {_IS_REPORT}, got no JSON: {error}") from error
    missing = sorted(_REPORT - found.keys()) if isinstance(found, dict) else sorted(_REPORT)
    if missing:
        raise ValueError(f"{path} {_IS_REPORT}, got one without {missing[:3]}")
    return {"shrunk": {}, **found}


def _beside(path: str, suffix: str) -> str:
    name = Path(path).name.removesuffix(".safetensors").removesuffix(".compressed")
    stem = name if name != Path(path).name else Path(path).stem
    return str(Path(path).with_name(stem + suffix))


def _writable(path: str, source: str, given: argparse.Namespace) -> Path:
    target = Path(path)
    if target.exists() and target.samefile(source):
        raise ValueError(f"output must be another file than the input, got {path}")
    if target.exists() and not given.force:
        raise ValueError(f"output must be a new file, got {path}, which exists: give another one, or --force")
    if not target.parent.is_dir():
        raise ValueError(f"output must be in an existing folder, got {path}")
    return target


def _written(contents: Contents, target: Path) -> str:
    size = sum(tensor.numel() * tensor.element_size() for tensor in contents.tensors.values())
    left = "" if not contents.methods else "; masks, optimizer and loop state stay behind in the checkpoint"
    return f"{target}: {target.stat().st_size:,} bytes, for {size:,} bytes of weights{left}"
