"""Your own criterion in under ten lines: `python examples/custom_criterion.py`.

A criterion that reads only the weights needs nothing but `scores`. This one observes gradients during training.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lightning import Trainer, seed_everything
from mnist5k import LeNet, MNIST5k
from torch import Tensor

from lightning_prune import Criterion, Pruning, Units, sparsity, summary


@dataclass(frozen=True)
class Fisher(Criterion):
    """The mean of `(w * dL/dw)**2`: the rise of the loss without the weight (Theis et al., 2018, arXiv:1801.05787)."""

    needs: ClassVar[Literal["gradients"]] = "gradients"
    window: int = 16

    def observe(self, units: Units, *_: Any) -> Tensor:
        return units.add(units.mean(lambda weight: (weight * weight.grad).square()))

    def scores(self, units: Units) -> Tensor:
        return units.statistic / units.steps


def main() -> None:
    """Prune with it; it works with every granularity, scope and schedule, and in YAML by its import path."""
    seed_everything(0, verbose=False)
    model, pruning = LeNet(), Pruning(0.95, criterion=Fisher())
    trainer = Trainer(max_epochs=15, callbacks=[pruning], logger=False, enable_checkpointing=False)
    trainer.fit(model, datamodule=MNIST5k())

    summary(model)
    assert sparsity(model) == 0.95


if __name__ == "__main__":
    main()
