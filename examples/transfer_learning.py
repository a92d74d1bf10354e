"""Prune a pretrained network with a frozen head while it learns a new task: `python examples/transfer_learning.py`.

The network learns the digits 0 to 4, then 5 to 9. Frozen weights are never pruned: there is nothing to configure.
"""

from typing import Any

import torch
from lightning import Trainer, seed_everything
from mnist5k import LeNet, MNIST5k

from lightning_prune import MagnitudePruning, sparsity, summary


def main() -> None:
    """Pretrain, freeze the head, then fine-tune and prune the rest."""
    seed_everything(0, verbose=False)
    model = LeNet()
    plain: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    Trainer(max_epochs=5, **plain).fit(model, datamodule=MNIST5k(digits=(0, 1, 2, 3, 4)))

    model.head.requires_grad_(False)
    before = model.head.weight.clone()
    trainer = Trainer(max_epochs=15, callbacks=[MagnitudePruning(0.9)], **plain)
    trainer.fit(model, datamodule=MNIST5k(digits=(5, 6, 7, 8, 9)))

    summary(model)  # of the trainable weights
    assert sparsity(model) == 0.9
    assert torch.equal(model.head.weight, before)


if __name__ == "__main__":
    main()
