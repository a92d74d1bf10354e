"""Prune from YAML or the command line, without writing pruning code.

python examples/cli.py fit --config examples/cli.yaml
python examples/cli.py fit --config examples/cli.yaml --trainer.callbacks.sparsity=0.8
python examples/cli.py fit --trainer.max_epochs=9 --trainer.callbacks+=MagnitudePruning --trainer.callbacks.sparsity=0.9
"""

from lightning.pytorch.cli import LightningCLI
from mnist5k import LeNet, MNIST5k

from lightning_prune import (  # importing the package makes its short names available in YAML
    MagnitudePruning,
    sparsity,
    summary,
)


def main() -> None:
    """Run the command line, then show each layer and check the sparsity."""
    cli = LightningCLI(LeNet, MNIST5k, seed_everything_default=0, save_config_callback=None)
    summary(cli.model)
    for callback in cli.trainer.callbacks:
        if isinstance(callback, MagnitudePruning):
            assert round(sparsity(cli.model), 4) == callback.sparsity


if __name__ == "__main__":
    main()
