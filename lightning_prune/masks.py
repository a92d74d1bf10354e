"""Masks: bool tensors by parameter name, True = kept."""

import glob
from collections.abc import Mapping

from torch import Tensor, nn

from lightning_prune.models.parameters import named_parameters
from lightning_prune.tensors.boolean import count
from lightning_prune.tensors.distributed import local
from lightning_prune.tensors.masking import zero_pruned
from lightning_prune.validation.instances import instance


class Masks(dict[str, Tensor]):
    """Masks by qualified parameter name: bool, of the parameter's shape, True = kept.

    >>> import torch
    >>> model = nn.Linear(2, 1)
    >>> masks = Masks(weight=torch.tensor([[True, False]]))
    >>> masks.apply(model)
    >>> int((model.weight == 0).sum()), masks.sparsity
    (1, 0.5)
    """

    @property
    def sparsity(self) -> float:
        """The fraction of pruned elements among all masked ones."""
        total = sum(mask.numel() for mask in self.values())
        return 1.0 - sum(count(mask) for mask in self.values()) / total if total else 0.0

    def sparsities(self) -> dict[str, float]:
        """Return ``{pattern: sparsity}`` of the masked weights, for ``Pruning(sparsity=...)`` or ``prune``.

        >>> import torch
        >>> Masks({"0.weight": torch.tensor([[True, False]]), "0.bias": torch.tensor([True])}).sparsities()
        {'0.weight': 0.5}
        """
        weights = {name: mask for name, mask in self.items() if mask.ndim >= 2}
        return {glob.escape(name): 1.0 - count(mask) / mask.numel() for name, mask in weights.items()}

    def apply(self, model: nn.Module) -> None:
        """Zero the pruned elements of a model's parameters, in place.

        Raises:
            ValueError: If the model lacks a parameter, or it has another shape.
        """
        parameters = named_parameters(instance("model", model, nn.Module))
        self.check(parameters)
        zero_pruned((local(parameters[name]), mask) for name, mask in self.items())

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        """Raise if the masks do not fit these parameters.

        Raises:
            ValueError: If a name is missing or a shape differs.
        """
        for name, mask in self.items():
            if name not in parameters:
                raise ValueError(f"the model must have the masked parameter {name!r}, got none of that name")
            if local(parameters[name]).shape != mask.shape:
                shapes = f"{tuple(local(parameters[name]).shape)} for a mask of {tuple(mask.shape)}"
                raise ValueError(f"the parameter {name!r} must have the shape of its mask, got {shapes}")
