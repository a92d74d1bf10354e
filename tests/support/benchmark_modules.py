"""Modules of benchmarks, which lie in folders that are no packages."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"


@contextmanager
def imported(folders: Sequence[Path], names: Sequence[str]) -> Iterator[dict[str, ModuleType]]:
    """Import modules, and leave neither them, nor paths that they add, nor a number of threads behind."""
    known, paths, threads = set(sys.modules), list(sys.path), torch.get_num_threads()
    sys.path[:0] = map(str, folders)
    yield {name: __import__(name) for name in names}
    sys.path[:] = paths
    torch.set_num_threads(threads)
    for name in set(sys.modules) - known:
        if str(FOLDER) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]
