"""Prune 95 % of the weights gradually while the network trains: `python examples/gradual.py`."""

from lightning import Trainer, seed_everything
from mnist5k import LeNet, MNIST5k

from lightning_prune import MagnitudePruning, sparsity, summary


def main() -> None:
    """Train from scratch; the masks change at the start of epochs 3, 4, ... 9, fast at first and slowly at the end."""
    seed_everything(0, verbose=False)
    model = LeNet()
    pruning = MagnitudePruning(0.95, schedule="cubic", start=2, end=9, interval="epoch")
    trainer = Trainer(max_epochs=15, callbacks=[pruning], logger=False, enable_checkpointing=False)
    trainer.fit(model, datamodule=MNIST5k())

    summary(model)
    assert sparsity(model) == 0.95
    LeNet().load_state_dict(model.state_dict())  # still the plain model: nothing is wrapped or renamed


if __name__ == "__main__":
    main()
