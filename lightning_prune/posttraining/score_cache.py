"""The score cache: measured scores in a file, so that an interrupted analysis can resume."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prune.tensors.distributed import full_tensor, local


class Trials:
    """Scores by layer and sparsity, and the JSON file that stores them.

    Args:
        path: The file; None stores nothing.
        analysis: What identifies the analysis that the scores belong to, as JSON.

    Attributes:
        scores: The known scores by (name of the layer, sparsity).

    Raises:
        ValueError: If the file holds the scores of another analysis.

    >>> trials = Trials(None, {})
    >>> trials.add("0.weight", 0.5, 0.97)
    >>> trials.scores
    {('0.weight', 0.5): 0.97}
    """

    def __init__(self, path: str | Path | None, analysis: dict[str, Any]) -> None:
        self.scores: dict[tuple[str, float], float] = {}
        self._path = None if path is None else Path(path)
        self._analysis = json.loads(json.dumps(analysis))
        if self._path is not None and self._path.exists():
            held = json.loads(self._path.read_text())
            differing = [key for key in self._analysis if held.get(key) != self._analysis[key]]
            if differing:
                raise ValueError(
                    f"path must hold the scores of this analysis or be new, got {path}, which differs in {differing}"
                )
            self.scores = {(name, level): score for name, level, score in held["scores"]}

    def add(self, name: str, level: float, score: float) -> None:
        """Store a score; the file is replaced atomically."""
        self.scores[name, level] = score
        if self._path is None or (torch.distributed.is_initialized() and torch.distributed.get_rank() > 0):
            return
        stored = {**self._analysis, "scores": [[*trial, score] for trial, score in self.scores.items()]}
        partial = self._path.with_name(self._path.name + ".part")
        partial.write_text(json.dumps(stored, indent=1))
        partial.replace(self._path)


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a digest of named tensors; a collective if they are sharded.

    >>> fingerprint([("weight", torch.zeros(2))]) == fingerprint([("weight", torch.zeros(2))])
    True
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        values = full_tensor(local(tensor), tensor).cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def lasting_name(value: Any) -> str:
    """Return a name for an argument that is the same in every process.

    >>> lasting_name(len), lasting_name("val_acc")
    ('len', 'val_acc')
    """
    if isinstance(value, str) or is_dataclass(value):
        return str(value)
    if callable(value):
        return str(getattr(value, "__qualname__", type(value).__qualname__))
    return f"{type(value).__qualname__}{vars(value)}"
