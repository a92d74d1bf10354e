"""Criteria: scores from the weights alone, from gradients, or from activations."""

from lightning_prune.criteria.activations import APoZ, Wanda
from lightning_prune.criteria.criterion import Criterion, Loss, OverRanks
from lightning_prune.criteria.depth import BlockInfluence
from lightning_prune.criteria.entropy import Entropy
from lightning_prune.criteria.experts import REAP
from lightning_prune.criteria.gradients import SNIP, Fisher, Movement, Sensitivity
from lightning_prune.criteria.hidden import ActivationNorm
from lightning_prune.criteria.initialization import GraSP, SynFlow
from lightning_prune.criteria.weights import FPGM, LAMP, BatchNormScale, Magnitude, Random

__all__ = [
    "FPGM",
    "LAMP",
    "REAP",
    "SNIP",
    "APoZ",
    "ActivationNorm",
    "BatchNormScale",
    "BlockInfluence",
    "Criterion",
    "Entropy",
    "Fisher",
    "GraSP",
    "Loss",
    "Magnitude",
    "Movement",
    "OverRanks",
    "Random",
    "Sensitivity",
    "SynFlow",
    "Wanda",
]
