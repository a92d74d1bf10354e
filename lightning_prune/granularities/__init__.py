"""Granularities: which weights form a unit, so that they are scored and pruned together."""

from lightning_prune.granularities.base import Granularity
from lightning_prune.granularities.blocks import Block
from lightning_prune.granularities.channels import Channel, Head, InputChannel
from lightning_prune.granularities.experts import Expert
from lightning_prune.granularities.layers import Layer
from lightning_prune.granularities.residual import ResidualChannel
from lightning_prune.granularities.shared_fan_in import SharedFanIn
from lightning_prune.granularities.shrinkable import shrinkable
from lightning_prune.granularities.weights import NM, Weight

__all__ = [
    "NM",
    "Block",
    "Channel",
    "Expert",
    "Granularity",
    "Head",
    "InputChannel",
    "Layer",
    "ResidualChannel",
    "SharedFanIn",
    "Weight",
    "shrinkable",
]
