"""Recovery: what is done for a part of a model once its masks are chosen, before the next part is looked at."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_prune.masks import Masks
from lightning_prune.models.parameters import named_parameters
from lightning_prune.posttraining.calibration import Stage
from lightning_prune.posttraining.fitting import Reconstruction, fit
from lightning_prune.tensors.distributed import is_sharded
from lightning_prune.units.units import Units


@dataclass
class Recovery:
    """Fits what is left of each part of a model to the outputs of the dense part.

    Args:
        model: The model, whose masks are chosen.
        units: The units of all targets.
        masks: The masks, which are complete for a part once it is pruned.
        reconstruct: How to fit.
        done: Parameters of parts that are finished.
    """

    model: nn.Module
    units: Sequence[Units]
    masks: Masks
    reconstruct: Reconstruction
    done: set[nn.Parameter] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Reject targets that cannot be fitted."""
        for unit in self.units:
            if is_sharded(unit.parameter):
                raise ValueError(f"targets must not be sharded over ranks to be reconstructed, got {unit.name!r}")
            if unit.parameter.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"targets must be of float32 or float64 to be reconstructed, got {unit.parameter.dtype} of "
                    f"{unit.name!r}: call model.float() first"
                )

    @cached_property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """All parameters of the model, by name."""
        return named_parameters(self.model)

    @property
    def fitted(self) -> list[nn.Parameter]:
        """The parameters that are to be fitted."""
        return [unit.parameter for unit in self.units]

    def around(self, stages: Iterable[Stage]) -> Iterator[Stage]:
        """Yield parts of the model, dense, and recover each after it is pruned."""
        for stage in stages:
            inside = set(stage.part.parameters()) - self.done
            yield stage
            if any(unit.parameter in inside for unit in self.units):
                fit(stage, self._free(inside), self.reconstruct)
            self.done |= inside

    def copies(self) -> dict[str, Tensor]:
        """Return what the parameters are before they are pruned, by name."""
        return {name: p.detach().clone() for name, p in self.parameters.items() if p.requires_grad}

    def afterwards(self, stages: Iterable[Stage], dense: Mapping[str, Tensor]) -> None:
        """Recover a model whose masks are complete: its parts are dense again until it is their turn."""
        for name in self.masks:
            self.parameters[name].detach().copy_(dense[name])
        for stage in self.around(stages):
            inside = set(stage.part.parameters()) - self.done
            for name, mask in self.masks.items():
                if self.parameters[name] in inside:
                    self.parameters[name].detach().masked_fill_(~mask, 0.0)

    def _free(self, inside: set[nn.Parameter]) -> dict[nn.Parameter, Tensor | None]:
        """Return what is fitted of some parameters, and which of its elements: targets, biases and norms."""
        found: dict[nn.Parameter, Tensor | None] = {}
        for name, parameter in self.parameters.items():
            if parameter not in inside or not (parameter.requires_grad and parameter.is_floating_point()):
                continue
            if parameter.ndim < 2:
                found[parameter] = self.masks.get(name)
            elif name in self.masks:
                found[parameter] = parameter.detach() != 0  # zeros from before the mask stay, too
        return found
