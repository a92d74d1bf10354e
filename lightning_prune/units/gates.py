"""Gates: the parameters that scale a channel last, which say by their gradients what the loss would be without it."""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def affine_of(norm: nn.Module, trainable: Collection[nn.Parameter], name: str) -> list[nn.Parameter]:
    """Return the factor and shift of a norm, as far as they are trainable; none without a trainable factor.

    Args:
        norm: The norm.
        trainable: Parameters that have gradients.
        name: Name of the weight of the layer in front of it, for the error.

    Raises:
        ValueError: If it has no trainable factor, and normalises by the batch.

    >>> norm = nn.BatchNorm1d(3)
    >>> [tuple(own.shape) for own in affine_of(norm, list(norm.parameters()), "0.weight")]
    [(3,), (3,)]
    """
    own = [norm.weight, getattr(norm, "bias", None)]
    affine = [found for found in own if isinstance(found, nn.Parameter) and among(found, trainable)]
    if affine and affine[0] is norm.weight:
        return affine
    if isinstance(norm, _NormBase) and (norm.training or not norm.track_running_stats):
        raise ValueError(
            f"the norm that follows the layer of {name!r} must have trainable factors to score its channels by "
            f"gradients, since the loss does not depend on the scale of what it normalises, got {norm}: "
            f"ignore the parameter, or put the norm in eval mode"
        )
    return []


def among(parameter: nn.Parameter, others: Collection[nn.Parameter]) -> bool:
    """Return whether a parameter is one of others."""
    return any(parameter is other for other in others)


def weight_times_gradient(weight: Tensor) -> Tensor:
    """Return ``w * dL/dw``: minus the first-order change of the loss when the weight becomes zero."""
    return torch.zeros_like(weight) if weight.grad is None else weight * weight.grad
