"""Prune in your own training loop, without a Trainer: `python examples/without_trainer.py`."""

import torch
from mnist5k import LeNet, MNIST5k
from rich.progress import track
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_prune import Channel, Masks, Sensitivity, prune, sparsity, summary


def train(model: nn.Module, loader: DataLoader, epochs: int, masks: Masks | None = None) -> None:
    """Train the model; with masks, pruned weights stay zero."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in track(range(epochs), description="training" if masks is None else "fine-tuning"):
        for images, labels in loader:
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
            if masks is not None:
                masks.apply(model)


def main() -> None:
    """Train, prune half of the neurons of each hidden layer by their effect on the loss, and fine-tune."""
    torch.manual_seed(0)
    model, data = LeNet(), MNIST5k()
    data.setup("fit")
    loader = data.train_dataloader()

    train(model, loader, epochs=5)
    hidden = ("hidden1.weight", "hidden2.weight")
    masks = prune(
        model, 0.5, criterion=Sensitivity(), granularity=Channel(), scope="local", targets=hidden, data=loader
    )
    train(model, loader, epochs=5, masks=masks)

    summary(model)
    assert sparsity(model, targets=hidden) == 0.5
    images, labels = next(iter(data.val_dataloader()))
    accuracy = (model(images).argmax(1) == labels).float().mean().item()
    print(f"accuracy: {accuracy:.1%}")


if __name__ == "__main__":
    main()
