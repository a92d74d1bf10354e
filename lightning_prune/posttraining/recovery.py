"""Recovery: what is done for a part of a model once its masks are chosen, before the next part is looked at."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.granularities import Granularity, SharedFanIn
from lightning_prune.masks import Masks
from lightning_prune.models.kept_norms import follow_masks, kept_channels
from lightning_prune.models.orientation import as_rows
from lightning_prune.models.parameters import named_parameters
from lightning_prune.posttraining.batch_norms import with_statistics
from lightning_prune.posttraining.calibration import Stage
from lightning_prune.posttraining.fitting import Reconstruction, fit, reconstruction_of
from lightning_prune.posttraining.layer_moments import check_layers, moments_of
from lightning_prune.posttraining.swaps import refined
from lightning_prune.tensors.distributed import is_sharded
from lightning_prune.units.units import Units


@dataclass(frozen=True)
class Recipe:
    """What is done: masks are refined by so many swaps at most, and the weights that are left are fitted."""

    granularity: Granularity
    refine: int
    reconstruct: Reconstruction | None

    def check(self, units: Sequence[Units]) -> None:
        """Reject targets that this cannot be done for."""
        if self.refine:
            check_layers(units)
            self._check_groups(units)
        for unit in units if self.reconstruct is not None else ():
            if is_sharded(unit.parameter):
                raise ValueError(f"targets must not be sharded over ranks to be reconstructed, got {unit.name!r}")
            if unit.parameter.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"targets must be of float32 or float64 to be reconstructed, got {unit.parameter.dtype} of "
                    f"{unit.name!r}: call model.float() first"
                )

    def _check_groups(self, units: Sequence[Units]) -> None:
        """Reject rows that share their inputs although the groups of a convolution give them different ones."""
        height = self.granularity.rows if isinstance(self.granularity, SharedFanIn) else 1
        for unit in units:
            groups = getattr(unit.modules[0], "groups", 1)
            if groups > 1 and unit.parameter.shape[0] // groups % height:
                raise ValueError(
                    f"rows of SharedFanIn must divide the output channels of each group of a convolution for masks to "
                    f"be refined, got {height} for {unit.parameter.shape[0] // groups} of {unit.name!r}"
                )


def recipe_of(granularity: Granularity, refine: int, reconstruct: Any) -> Recipe | None:
    """Return what is to be done after pruning; None for nothing.

    Raises:
        ValueError: If masks of that granularity cannot be refined.
        TypeError: If ``reconstruct`` is neither a bool nor settings.
    """
    settings = reconstruction_of(reconstruct)
    if refine and not (granularity.single or isinstance(granularity, SharedFanIn)):
        raise ValueError(
            f"granularity must be Weight(), NM(n, m) or SharedFanIn(rows) for masks to be refined, got {granularity}"
        )
    return Recipe(granularity, refine, settings) if refine or settings is not None else None


@dataclass
class Recovery:
    """Refines the masks of each part of a model, and fits what is left of it to the outputs of the dense part.

    Args:
        model: The model, whose masks are chosen.
        units: The units of all targets.
        masks: The masks, which are complete for a part once it is pruned.
        recipe: What is done.
        done: Parameters of parts that are finished.
        finished: Modules of these parts.
    """

    model: nn.Module
    units: Sequence[Units]
    masks: Masks
    recipe: Recipe
    done: set[nn.Parameter] = field(default_factory=set)
    finished: set[nn.Module] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Check the targets, and remember which channels norms take their statistics over."""
        self.recipe.check(self.units)
        self.channels = kept_channels(self.model) if self.recipe.granularity.normalized else {}

    @cached_property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """All parameters of the model, by name."""
        return named_parameters(self.model)

    @property
    def fitted(self) -> list[nn.Parameter]:
        """The parameters that are to be fitted."""
        return [] if self.recipe.reconstruct is None else [unit.parameter for unit in self.units]

    def around(self, stages: Iterable[Stage]) -> Iterator[Stage]:
        """Yield parts of the model, dense, and recover each after it is pruned."""
        for stage in stages:
            inside = set(stage.part.parameters()) - self.done
            now = [unit for unit in self.units if unit.parameter in inside]
            moments = moments_of(now, stage) if self.recipe.refine else {}
            dense = {unit.name: unit.parameter.detach().clone() for unit in now if self.recipe.refine}
            yield stage
            for unit in now if self.recipe.refine else ():
                self._refine(unit, dense.pop(unit.name), moments.pop(unit.name))
            if now and self.recipe.reconstruct is not None:
                norms = [norm for norm in with_statistics(stage.part) if norm not in self.finished]
                fit(stage, self._free(inside), norms, self.recipe.reconstruct)
            self.done |= inside
            self.finished.update(stage.part.modules())

    def _refine(self, unit: Units, dense: Tensor, moments: Tensor) -> None:
        """Swap pruned weights of one target with kept ones."""
        module, mask = unit.modules[0], self.masks[unit.name]
        rows = as_rows(mask, module)
        new = refined(as_rows(dense, module), rows, moments, self.recipe.granularity, self.recipe.refine)
        mask = as_rows(new, module).contiguous()
        self.masks[unit.name] = mask
        unit.parameter.detach().copy_(dense.masked_fill(~mask, 0.0))

    def copies(self) -> dict[str, Tensor]:
        """Return what the parameters are before they are pruned, by name."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def afterwards(self, stages: Iterable[Stage], dense: Mapping[str, Tensor]) -> None:
        """Recover a model whose masks are complete: its parts are dense again until it is their turn."""
        for name in self.masks:
            self.parameters[name].detach().copy_(dense[name])
        self._follow({name: self.channels.get(name, torch.ones_like(mask)) for name, mask in self.masks.items()})
        for stage in self.around(stages):
            inside = set(stage.part.parameters()) - self.done
            due = {name: mask for name, mask in self.masks.items() if self.parameters[name] in inside}
            for name, mask in due.items():
                self.parameters[name].detach().masked_fill_(~mask, 0.0)
            self._follow(due)

    def _follow(self, masks: Mapping[str, Tensor]) -> None:
        """Let norms take their statistics over the channels that masks keep, where the granularity wants that."""
        if self.recipe.granularity.normalized:
            follow_masks(self.model, masks)

    def _free(self, inside: set[nn.Parameter]) -> dict[nn.Parameter, Tensor | None]:
        """Return what is fitted of some parameters, and which of its elements: targets, biases and norms."""
        found: dict[nn.Parameter, Tensor | None] = {}
        for name, parameter in self.parameters.items():
            if parameter not in inside or not (parameter.requires_grad and parameter.is_floating_point()):
                continue
            mask = self.masks.get(name)
            if mask is not None and parameter.ndim >= 2:
                mask = parameter.detach() != 0  # zeros from before the mask stay, too
            if mask is not None or parameter.ndim < 2:
                found[parameter] = None if mask is None else mask.to(parameter.dtype)
        return found
