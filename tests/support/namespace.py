"""Prunes under the namespace that is named on the command line, in a Trainer and through LightningCLI.

A process of its own, since what this package inherits from is settled when it is imported. Whether it loads a shrunk
model is asked here, too: ``python namespace.py NAMESPACE FOLDER``.
"""

import importlib
import sys
from pathlib import Path

namespace = importlib.import_module(sys.argv[1])

import torch  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from yaml import safe_dump  # noqa: E402

import lightning_prune as lp  # noqa: E402 - after the namespace that it is to serve

boring = importlib.import_module(f"{sys.argv[1]}.demos.boring_classes").BoringModel
cli = importlib.import_module(f"{sys.argv[1]}.cli").LightningCLI

RUN = {
    **{"accelerator": "cpu", "devices": 1, "max_epochs": 5, "limit_train_batches": 3, "limit_val_batches": 1},
    **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0},
}


class Worsening(boring):
    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", float(self.current_epoch))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.randn(6, 32), batch_size=2)

    val_dataloader = train_dataloader


def check_classes() -> None:
    callbacks = [item for item in vars(lp).values() if isinstance(item, type) and hasattr(item, "on_train_start")]
    assert len(callbacks) >= 8
    assert all(issubclass(callback, namespace.Callback) for callback in callbacks)
    assert issubclass(lp.SparseModelCheckpoint, namespace.callbacks.ModelCheckpoint)
    assert issubclass(lp.SparseEarlyStopping, namespace.callbacks.EarlyStopping)


def check_trainer(folder: Path) -> None:
    pruning = lp.MagnitudePruning(0.9, start=0, end=2, interval="epoch")
    checkpoint = lp.SparseModelCheckpoint(dirpath=folder, monitor="val_loss", filename="{epoch}")
    stopping = lp.SparseEarlyStopping("val_loss", patience=1)
    trainer = namespace.Trainer(**RUN, callbacks=[pruning, checkpoint, stopping])
    model = Worsening()
    trainer.fit(model)
    assert int((model.layer.weight == 0).sum()) == round(0.9 * 64)
    assert [path.name for path in folder.iterdir()] == ["epoch=2.ckpt"]  # the first epoch at the target is the best
    assert trainer.current_epoch == 4  # patience 1 counts from there: epochs 2, 3 and no more
    saved = torch.load(folder / "epoch=2.ckpt", weights_only=True)
    assert int((saved["state_dict"]["layer.weight"] == 0).sum()) == round(0.9 * 64)
    assert sum("Checkpoint" in type(callback).__name__ for callback in trainer.callbacks) == 1


def check_at_init() -> None:
    model = Worsening()
    namespace.Trainer(**RUN, enable_checkpointing=False, callbacks=[lp.PruningAtInit(0.9)]).fit(model)
    assert int((model.layer.weight == 0).sum()) == round(0.9 * 64)


def check_command_line(file: Path) -> None:
    callbacks = [
        {"class_path": "lightning_prune.MagnitudePruning", "init_args": {"sparsity": 0.75, "start": 0, "end": 4}},
        {"class_path": "lightning_prune.SparseEarlyStopping", "init_args": {"monitor": "val_loss"}},
    ]
    file.write_text(safe_dump({"trainer": {**RUN, "callbacks": callbacks, "enable_checkpointing": False}}))
    done = cli(Worsening, args=["--config", str(file)], run=False, save_config_callback=None)  # one parser of five
    done.trainer.fit(done.model)
    assert int((done.model.layer.weight == 0).sum()) == 48
    # short names of Lightning's own callbacks are still theirs
    more = ["--config", str(file), "--trainer.callbacks+=ModelCheckpoint", "--trainer.enable_checkpointing=true"]
    done = cli(Worsening, args=more, run=False, save_config_callback=None)
    assert type(done.trainer.callbacks[-1]) is namespace.callbacks.ModelCheckpoint


def load_shrunk_model(folder: Path) -> None:
    """Load the checkpoint of a shrunk model by the user's own class, in whose file nothing knows of pruning."""
    sys.path.insert(0, str(folder))
    network = importlib.import_module("nets").Net
    model = network.load_from_checkpoint(folder / "small.ckpt").eval()
    assert type(model) is network
    torch.save({"out": model(torch.ones(1, 2, 6, 6)), "width": model.net[0].out_channels}, folder / "out.pt")


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    check_classes()
    check_at_init()
    check_trainer(folder / "checkpoints")
    check_command_line(folder / "run.yaml")
    load_shrunk_model(folder)
