"""Replacing state: what methods know of a run whose optimizers step other parameters in the place of weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning.pytorch import Trainer
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.models.parameters import named_parameters
from lightning_prune.models.small_parameters import of_kind_or_name
from lightning_prune.training.checks import reject_running
from lightning_prune.training.enforcement import parameter_ids
from lightning_prune.training.state import TRANSIENT, RunState


@dataclass(eq=False)
class ReplacingState(RunState):
    """What a method knows of a run whose optimizers step other parameters in the place of weights.

    Attributes:
        held: The parameters that no optimizer may step, by name.
        others: How many weights are trained beside those of the method.
        stepping: The optimizers that are in a step, by id.
    """

    held: dict[str, nn.Parameter] = field(default_factory=dict, metadata=TRANSIENT)
    others: int = field(default=0, metadata=TRANSIENT)
    stepping: set[int] = field(default_factory=set, metadata=TRANSIENT)

    def hold(self, model: nn.Module, train: Sequence[str]) -> None:
        """Hold all parameters but those of these kinds or names."""
        others, parameters = set(of_kind_or_name(model, "train", train)), named_parameters(model)
        self.held = {name: parameter for name, parameter in parameters.items() if name not in others}
        self.others = sum(parameters[name].numel() for name in others if parameters[name].requires_grad)

    def held_by(self, optimizer: Optimizer) -> list[str]:
        """Return the names of the parameters of an optimizer that it must not step."""
        mine = parameter_ids(optimizer)
        return [name for name, parameter in self.held.items() if id(parameter) in mine]

    def begin_step(self, owner: str, trainer: Trainer, optimizer: Optimizer) -> None:
        """Begin a step of an optimizer, which must not be in one already.

        Raises:
            ValueError: If it is, since it has run the model inside it.
        """
        # a gradient scaler may have skipped the last step
        if id(optimizer) in self.stepping and getattr(trainer.precision_plugin, "scaler", None) is None:
            reject_running(owner, type(optimizer).__name__)
        self.stepping.add(id(optimizer))

    @override
    def release(self) -> None:
        self.held, self.stepping = {}, set()
