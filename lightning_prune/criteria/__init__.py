"""Criteria, by what they need: the weights alone, gradients, or activations."""

from lightning_prune.criteria.criterion import Criterion, OverRanks
from lightning_prune.criteria.entropy import Entropy
from lightning_prune.criteria.gradients import Sensitivity
from lightning_prune.criteria.weights import Magnitude, Random

__all__ = ["Criterion", "Entropy", "Magnitude", "OverRanks", "Random", "Sensitivity"]
