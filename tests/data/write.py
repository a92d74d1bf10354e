"""Write the files that later versions have to load: ran with the code of commit 21700a1, before there were rooms.

    PYTHONPATH=<checkout of that commit>:tests/support python tests/data/write.py

What the files hold is told by ``tests/support/earlier.py``; ``tests/integration/test_earlier.py`` loads them.
"""

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from earlier import DATA, KEPT, RUNS, WHERE, ConvNet, Model, Save, end, fit, pack, probe, run, shrunk
from lightning.pytorch.cli import LightningCLI

import lightning_prune
from lightning_prune import (
    Channel,
    Magnitude,
    prune,
    save_compressed,
    save_shrunk,
    schedules,
    scopes,
    sensitivity,
    shrink,
)

CALLBACKS = ["MagnitudePruning", "EntropyPruning", "Pruning", "SET", "GuardedPruning", "LotteryTicket", "PruningReport"]


def keep(value: Any, name: str, folder: Path) -> None:
    torch.save(value, folder / name)
    pack(folder / name, DATA / f"{name}.xz")


def write_runs(folder: Path) -> None:
    """Write the checkpoint of a run in the middle of a window, and the end of the run that was not interrupted."""
    for name in RUNS:
        path = folder / f"{name}.ckpt"
        model, callback, _ = run(name, Save(KEPT.get(name, WHERE), path))
        pack(path, DATA / f"{name}.ckpt.xz")
        keep(end(model, callback), f"{name}.end.pt", folder)


def write_shrunk(folder: Path) -> None:
    """Write a model that was shrunk after pruning, and the checkpoint of a run that shrinks at its end."""
    model = ConvNet()
    prune(model, 0.5, granularity=Channel())
    small = shrink(model, probe(model.size)).eval()
    save_shrunk(small, folder / "small.pt")
    pack(folder / "small.pt", DATA / "small.pt.xz")
    keep(small(probe(model.size)).detach(), "small.outputs.pt", folder)
    model = ConvNet()
    fit(model, shrunk()).save_checkpoint(folder / "shrunk.ckpt")
    pack(folder / "shrunk.ckpt", DATA / "shrunk.ckpt.xz")
    keep(model.eval()(probe(model.size)).detach(), "shrunk.outputs.pt", folder)


def write_compressed(folder: Path) -> None:
    """Write a compressed state, and what it was made of."""
    model = Model()
    prune(model, 0.75)
    save_compressed(model, folder / "compressed.safetensors")
    pack(folder / "compressed.safetensors", DATA / "compressed.safetensors.xz")
    keep(dict(model.state_dict()), "compressed.state.pt", folder)


def loss(model: Model, batches: Any) -> float:
    return sum(float(model.training_step(batch, 0)) for batch in batches) / len(batches)


def write_analysis(folder: Path) -> None:
    """Write the scores of a sensitivity analysis, as it saves them to go on with."""
    model = Model()
    sensitivity(
        model, model.train_dataloader(), loss, (0.5, 0.9), mode="min", criterion=Magnitude(),
        path=folder / "scores.json", progress=False,
    )  # fmt: skip
    (DATA / "scores.json").write_text((folder / "scores.json").read_text())


def print_config(name: str) -> str:
    """Return what LightningCLI prints as the configuration of a callback."""
    argument = {"GuardedPruning": ["monitor=score"], "PruningReport": [], "SET": ["sparsity=0.8"]}
    told = argument.get(name, ["sparsity=0.7"])
    arguments = [f"--trainer.callbacks+=lightning_prune.{name}", *(f"--trainer.callbacks.{one}" for one in told)]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        LightningCLI(Model, args=["fit", *arguments, "--print_config=skip_null"])
    return printed.getvalue()


def paths() -> list[str]:
    """Return the path at which each public class and function is, and each function that YAML may name."""
    found = [getattr(lightning_prune, name) for name in lightning_prune.__all__]
    found += [schedules.linear, schedules.cubic, schedules.cosine, schedules.exponential, schedules.one_shot]
    found += [scopes.global_, scopes.local, scopes.erk, scopes.lamp]
    return sorted({f"{value.__module__}.{value.__qualname__}" for value in found})


def main(writers: tuple[Callable[[Path], None], ...]) -> None:
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        for writer in writers:
            writer(Path(folder))
        for name in CALLBACKS:
            (DATA / f"{name}.yaml").write_text(print_config(name))
    (DATA / "paths.txt").write_text("\n".join([*paths(), ""]))


if __name__ == "__main__":
    main((write_runs, write_shrunk, write_compressed, write_analysis))
