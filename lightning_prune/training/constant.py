"""Constant sparsity: the zeros that a model already has stay zeros."""

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_prune.masks import Masks
from lightning_prune.models.parameters import find, left_out
from lightning_prune.tensors.distributed import local
from lightning_prune.training.masked import MaskedTraining
from lightning_prune.training.plan_text import listing
from lightning_prune.training.sparsity_log import log_info


class ConstantSparsity(MaskedTraining):
    """Keep every zero that the targets have when training starts, while the rest is fine-tuned.

    Args:
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out, in the same form.
        log_layers: Whether to log the sparsity of every target beside the total ``pruning/sparsity``.

    Raises:
        ValueError: When training starts, if a pattern matches nothing or no parameter is prunable.

    >>> ConstantSparsity(ignore=("head.*",)).ignore
    ('head.*',)
    """

    def __init__(
        self, targets: Sequence[str] = (), ignore: Sequence[str] = (), log_layers: bool = False
    ) -> None:  # its own, so that an error names this class
        super().__init__(targets, ignore, log_layers)

    @override
    def explain(self) -> str:
        last = "the zeros that are there when training starts stay zeros"
        return listing(f"{type(self).__name__} to keep all zeros", self.masks, last, self.state.left_out)

    @override
    def on_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.masks:
            # frozen ones, too: they may be trained later on
            found = find(pl_module, self.targets, self.ignore, frozen=True)
            self.state.masks = Masks({target.name: local(target.parameter) != 0 for target in found})
        self.state.left_out = left_out(pl_module, self.targets, self.ignore)
        log_info(self.explain())
