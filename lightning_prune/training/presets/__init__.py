"""The named strategies: ``Pruning`` with a criterion of its own each.

Each spells out the arguments of ``Pruning``, so that editors, ``help`` and type checkers see them.
"""

from lightning_prune.training.presets.neurons import EntropyPruning, RandomPruning, SensitivityPruning
from lightning_prune.training.presets.weights import MagnitudePruning, MovementPruning, SNIPPruning, WandaPruning

__all__ = [
    "EntropyPruning",
    "MagnitudePruning",
    "MovementPruning",
    "RandomPruning",
    "SNIPPruning",
    "SensitivityPruning",
    "WandaPruning",
]
