"""Moments of layers: the second moments of the inputs of each target, from one pass over the data."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from lightning_prune.models.layer_inputs import input_of, is_readable, windows
from lightning_prune.posttraining.calibration import Stage
from lightning_prune.posttraining.reconstruction import second_moments
from lightning_prune.tensors.distributed import is_sharded


class Layer(Protocol):
    """A target, or the units of one."""

    @property
    def name(self) -> str:
        """The name of the parameter."""

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself."""

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules that own it."""


def check_layers(found: Sequence[Layer]) -> None:
    """Reject targets whose inputs cannot be read.

    Raises:
        ValueError: If one is not of a linear layer or convolution, or is sharded.
    """
    for target in found:
        kinds = [type(module).__name__ for module in target.modules if not is_readable(module)]
        if kinds:
            raise ValueError(
                f"targets must belong to linear layers and convolutions, got {target.name!r} of {kinds[0]}"
            )
        if is_sharded(target.parameter):
            raise ValueError(f"targets must not be sharded over ranks, got {target.name!r}")


def moments_of(found: Sequence[Layer], stage: Stage) -> dict[str, Tensor]:
    """Run the stage and return, by name, the sums of x x^T over each target's inputs: (groups, columns, columns)."""
    moments: dict[str, Tensor] = {}

    def add(target: Layer, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        seen = windows(module, input_of(inputs, target.name))
        moments[target.name] = second_moments(seen, target.parameter.ndim, moments.get(target.name))

    handles = [module.register_forward_hook(partial(add, target)) for target in found for module in target.modules]
    try:
        for _ in stage.passes() if found else ():
            pass
    finally:
        for handle in handles:
            handle.remove()
    for target in found:
        if target.name not in moments:
            raise ValueError(
                f"data must reach the layer of {target.name!r}, got no forward pass through it: ignore the parameter"
            )
        if not bool(moments[target.name].isfinite().all()):
            raise ValueError(f"inputs must be finite, got NaN or infinity at the layer of {target.name!r}")
    return moments
