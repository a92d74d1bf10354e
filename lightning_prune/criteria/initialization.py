"""Criteria for untrained networks, which differentiate something other than the loss, in passes of their own."""

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
    """Gradient signal preservation: ``sum w * Hg`` over the unit; weights that reduce gradient flow go first.

    g and H are the gradient and the Hessian of the loss, averaged over all batches, with respect to all trainable
    weights that are prunable by default (no biases, norms or embeddings). Needs gradients, from two passes of its own
    over the batches: it is for ``PruningAtInit`` and ``prune`` before training.

    Args:
        window: Number of batches. The paper takes one, with ten samples a class.
        temperature: Divides the logits of a cross-entropy or log-softmax loss, so that no class outweighs the others.

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
    """Return the product of a loss gradient with a direction g; its gradient is H g."""
    weights, steps = zip(*direction, strict=True)
    found = torch.autograd.grad(loss(model, batch), weights, create_graph=True, allow_unused=True)
    pairs = zip(found, steps, strict=True)
    return torch.stack([(slope * step).sum() for slope, step in pairs if slope is not None]).sum()


def _tempered(temperature: float, loss: Loss, model: nn.Module, batch: Any) -> Tensor:
    """Return a loss whose logits are divided by a temperature, also inside a training step."""
    with _Tempered(temperature):
        return loss(model, batch)


class _Tempered(TorchFunctionMode):
    """Divides the inputs of log-softmax and cross-entropy functions by a temperature."""

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
    """Synaptic flow: ``sum w * dR/dw`` over the unit, R the sum over all paths through the network. Needs no data.

    R is the sum of the network's outputs with the absolute values of its parameters and buffers, for an input of ones
    in the shape of the first batch. The logarithm is differentiated, which gives the same order without overflow in
    deep networks. Use it as ``PruningAtInit(sparsity, SynFlow(), rounds=100)`` or
    ``prune(..., criterion=SynFlow(), rounds=100)`` before training: with few rounds, whole layers may be lost.

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
            raise ValueError(f"data must have one floating-point input, which SynFlow fills with ones, got {found}")
        state = {name: _positive(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        flow = torch.func.functional_call(model, state, (torch.ones_like(inputs[:1], dtype=torch.float64),)).sum()
        if not 0.0 < flow.item() < float("inf"):
            raise ValueError(f"the synaptic flow of the model must be positive and finite, got {flow.item()}")
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
