"""Criteria for networks before training, which differentiate something else than the loss, in passes of their own."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_prune.criteria.criterion import Criterion, Loss
from lightning_prune.criteria.gradients import GradientMean
from lightning_prune.models.forward import inputs_of
from lightning_prune.models.parameters import weights_of
from lightning_prune.units.gates import weight_times_gradient
from lightning_prune.units.units import Units
from lightning_prune.validation.arguments import number
from lightning_prune.validation.instances import settle


@dataclass(frozen=True)
class GraSP(GradientMean):
    """Gradient signal preservation: ``sum w * Hg``, over the unit; what holds back the gradient's norm goes first.

    g is the gradient and H the Hessian of the loss, the mean over all batches, by all trainable weights: those that are
    pruned by default, no biases, norms and embeddings. Needs gradients, of two passes of its own over the batches: it
    is for ``PruningAtInit`` and ``prune``, before training.

    Args:
        window: Number of batches. The paper takes one, of ten samples a class.
        temperature: Divides the logits, where the loss is a cross-entropy or takes a log-softmax, so that no class
            outweighs the others.

    Raises:
        ValueError: If the window is shorter than one batch, or the temperature is not above 0 and finite.

    Reference: Wang et al., 2020, "Picking Winning Tickets Before Training by Preserving Gradient Flow",
        arXiv:2002.07376.
    """

    batch_statistics: ClassVar[bool] = True

    window: int = 1
    temperature: float = 200.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        settle(self, temperature=number("temperature", self.temperature, "(0, inf)"))

    @override
    @torch.enable_grad()
    def passes(
        self, model: nn.Module, batches: Iterable[Any], loss: Loss, average: Callable[[nn.Module], None]
    ) -> Iterator[None]:
        batches, loss = list(batches), partial(_tempered, self.temperature, loss)
        model.zero_grad(set_to_none=True)
        for batch in batches:
            loss(model, batch).backward()
        average(model)
        weights = [weight for weight in weights_of(model) if weight.grad is not None]
        direction = [(weight, weight.grad.div(len(batches))) for weight in weights if weight.grad is not None]
        yield from super().passes(model, batches, partial(_along, direction, loss), average)

    @override
    def term(self, units: Units) -> Tensor:
        return units.contribution()


def _along(direction: Sequence[tuple[nn.Parameter, Tensor]], loss: Loss, model: nn.Module, batch: Any) -> Tensor:
    """Return the product of the gradient of a loss and a direction g, of which H g is the gradient."""
    weights, steps = zip(*direction, strict=True)
    found = torch.autograd.grad(loss(model, batch), weights, create_graph=True, allow_unused=True)
    pairs = zip(found, steps, strict=True)
    return torch.stack([(slope * step).sum() for slope, step in pairs if slope is not None]).sum()


def _tempered(temperature: float, loss: Loss, model: nn.Module, batch: Any) -> Tensor:
    """Return a loss of logits that are divided by a temperature, wherever a training step has them from."""
    with _Tempered(temperature):
        return loss(model, batch)


class _Tempered(TorchFunctionMode):
    """Divides what goes into a log-softmax, on its own or as a part of a cross-entropy."""

    takes_logits = frozenset(
        {
            *(functional.log_softmax, torch.log_softmax, Tensor.log_softmax),
            *(functional.cross_entropy, functional.binary_cross_entropy_with_logits),
        }
    )

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.takes_logits and args:
            args = (args[0] / self.temperature, *args[1:])
        elif func in self.takes_logits:
            kwargs["input"] = kwargs["input"] / self.temperature
        return func(*args, **kwargs)


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
    elementwise: ClassVar[bool] = True

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
