"""Criteria for networks before training, which differentiate something else than the loss, in passes of their own."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.calling import inputs_of
from lightning_prune.criteria.criterion import Criterion, Loss
from lightning_prune.criteria.gradients import GradientMean
from lightning_prune.gates import weight_times_gradient
from lightning_prune.units import Units


@dataclass(frozen=True)
class GraSP(GradientMean):
    """Gradient signal preservation: ``sum w * Hg``, over the unit; what holds back the gradient's norm goes first.

    g is the gradient and H the Hessian of the loss on a batch, by all trainable parameters. Needs gradients, of passes
    of its own: it is for ``PruningAtInit`` and ``prune``, before training.

    Args:
        window: Number of batches; the mean of what each one gives. The paper takes one, of ten samples a class.

    Raises:
        ValueError: If the window is shorter than one batch.

    Reference: Wang et al., 2020, "Picking Winning Tickets Before Training by Preserving Gradient Flow",
        arXiv:2002.07376.
    """

    batch_statistics: ClassVar[bool] = True

    window: int = 1

    @override
    def backward(self, model: nn.Module, batch: Any, loss: Loss) -> None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found = torch.autograd.grad(loss(model, batch), parameters, create_graph=True, allow_unused=True)
        gradients = [gradient for gradient in found if gradient is not None]
        # half of the square of the gradient's norm, of which H g is the gradient
        torch.stack([gradient.square().sum() for gradient in gradients]).sum().div(2).backward()

    @override
    def term(self, units: Units) -> Tensor:
        return units.contribution()


@dataclass(frozen=True)
class SynFlow(Criterion):
    """Synaptic flow: ``sum w * dR/dw``, over the unit, R what all paths through the network sum to. Needs no data.

    R is the sum of the outputs of the network with the absolute values of its parameters and buffers, for an input of
    ones of the shape of the first batch. Its logarithm is differentiated: the same order, in range for any depth. Meant
    for ``PruningAtInit(sparsity, SynFlow(), rounds=100)`` or ``prune(..., criterion=SynFlow(), rounds=100)`` before
    training: in few rounds, whole layers can be lost.

    Reference: Tanaka et al., 2020, "Pruning neural networks without any data by iteratively conserving synaptic flow",
        arXiv:2006.05467.
    """

    needs: ClassVar[Literal["weights", "gradients", "forwards"]] = "gradients"
    entrywise: ClassVar[bool] = True

    window = 1

    @override
    def backward(self, model: nn.Module, batch: Any, loss: Loss) -> None:
        inputs = inputs_of(batch)
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            found = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
            raise ValueError(f"data must give one floating-point input, which SynFlow fills with ones, got {found}")
        state = {name: _positive(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        flow = torch.func.functional_call(model, state, (torch.ones_like(inputs[:1], dtype=torch.float64),)).sum()
        if not 0.0 < flow.item() < float("inf"):
            raise ValueError(f"the model must let a positive, finite flow through, got {flow.item()}")
        flow.log().backward()

    @override
    def observe(self, units: Units, inputs: tuple[Any, ...] = (), output: Any = None) -> Tensor:
        return units.add(units.sum(weight_times_gradient))

    @override
    def scores(self, units: Units) -> Tensor:
        assert units.statistic is not None
        return units.statistic


def _positive(tensor: Tensor) -> Tensor:
    return tensor.double().abs() if tensor.is_floating_point() else tensor
