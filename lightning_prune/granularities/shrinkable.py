"""Granularities whose units can be taken out of a model."""

from dataclasses import replace

from lightning_prune.granularities.base import Granularity
from lightning_prune.granularities.channels import Channel, Head
from lightning_prune.granularities.experts import Expert
from lightning_prune.granularities.layers import Layer
from lightning_prune.granularities.residual import ResidualChannel
from lightning_prune.validation.instances import instance

Shrinkable = Channel | Expert | Head | Layer | ResidualChannel


def shrinkable(granularity: Granularity, where: str = "shrink_at_end=True") -> Shrinkable:
    """Return a granularity whose units can be taken out of a model: channels are coupled.

    Args:
        granularity: The granularity.
        where: Why it has to be one, for the message.

    Raises:
        ValueError: If its units are no channels, experts, heads or layers, or channels that must not be coupled.

    >>> shrinkable(Channel()).coupled
    True
    """
    instance("granularity", granularity, Granularity)
    if not isinstance(granularity, Shrinkable) or granularity.coupled is False:
        raise ValueError(
            f"granularity must be Channel(), Head(), Layer() or ResidualChannel() to shrink the model, got "
            f"{granularity} with {where}"
        )
    return replace(granularity, coupled=True) if isinstance(granularity, Channel) else granularity
