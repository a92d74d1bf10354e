"""Kept: what a smaller model has kept of the model that it was, and how that is written down."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.tensors.packing import pack_all, unpack_all
from lightning_prune.validation.states import MASKS, every, one, record, row, table, whole

_ATTRIBUTE = "_kept_channels"
_PLACE = one("names of a dimension and a tensor", lambda value: all(map(re.compile(r"\d+:").match, value)))
_HEADS = one("at least one head, and no more than there were", lambda value: 1 <= value[1] <= value[0])
_ROW = one("a mask of one dimension", lambda value: len(value) == 1)
_WRITTEN = record(
    places=every(MASKS, record(shapes=every(_PLACE, table(_ROW)))),
    heads=table(every(row(whole(), whole()), _HEADS)),
)


@dataclass(frozen=True)
class CutRecord:
    """What is kept of a model when units are cut out of it.

    Args:
        places: By name and dimension of a tensor: which places (bool, of the length that it had) are kept.
        heads: By name of an attention: the number of heads that it had and has.
    """

    places: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)
    heads: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def then(self, later: "CutRecord") -> "CutRecord":
        """Return what is kept after a later cut, of what was there before both.

        >>> first = CutRecord({("weight", 0): torch.tensor([True, False, True])})
        >>> first.then(CutRecord({("weight", 0): torch.tensor([False, True])})).places
        {('weight', 0): tensor([False, False,  True])}
        """
        places = dict(self.places)
        for place, kept in later.places.items():
            earlier = self.places.get(place, torch.ones_like(kept))
            places[place] = torch.zeros_like(earlier).masked_scatter(earlier, kept)
        heads = {name: (self.heads.get(name, counts)[0], counts[1]) for name, counts in later.heads.items()}
        return CutRecord(places, {**self.heads, **heads})

    def of_mask(self, name: str, mask: Tensor) -> Tensor:
        """Return what is left of the mask of a parameter."""
        for (part, dim), kept in self.places.items():
            if part == name:
                mask = select(mask, dim, kept)
        return mask

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse tensors that these places are not places of.

        Raises:
            ValueError: If a name is missing, or a dimension has another length.
        """
        for (name, dim), kept in self.places.items():
            shape = tuple(tensors[name].shape) if name in tensors else "no tensor of that name"
            if isinstance(shape, str) or len(shape) <= dim or shape[dim] != len(kept):
                raise ValueError(
                    f"the model must have {len(kept)} places in dimension {dim} of {name!r}, as the one had that was "
                    f"shrunk, got {shape}"
                )

    def state_dict(self) -> dict[str, Any]:
        """Return plain tensors and numbers, at a bit a place."""
        places = pack_all({f"{dim}:{name}": kept for (name, dim), kept in self.places.items()})
        return {"version": 1, "places": places, "heads": {name: list(counts) for name, counts in self.heads.items()}}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "CutRecord":
        """Return what ``state_dict`` wrote down.

        Raises:
            ValueError: If something is missing or damaged; the message names it.

        >>> kept = CutRecord({("weight", 0): torch.tensor([True, False])}, {"attention": (4, 2)})
        >>> CutRecord.from_state_dict(kept.state_dict()).heads
        {'attention': (4, 2)}
        """
        whole = isinstance(state, Mapping) and {"version", "places", "heads"} <= state.keys()
        if not whole or state["version"] != 1:
            raise ValueError(
                f"'lightning_prune' of a checkpoint, the kept channels, must be of version 1, with places and heads, "
                f"got {state!r:.80}"
            )
        try:
            _WRITTEN("lightning_prune", state)
        except ValueError as error:
            raise ValueError(f"the kept channels must have {error}") from error
        places = {}
        for name, kept in unpack_all(state["places"]).items():
            dim, _, plain = name.partition(":")
            places[plain, int(dim)] = kept
        return cls(places, {name: (before, now) for name, (before, now) in state["heads"].items()})


def select(tensor: Tensor, dim: int, kept: Tensor) -> Tensor:
    """Return the places of a dimension that are kept (bool).

    >>> select(torch.tensor([[1, 2, 3]]), 1, torch.tensor([True, False, True]))
    tensor([[1, 3]])
    """
    return tensor.index_select(dim, kept.nonzero().squeeze(1).to(tensor.device))


def record_cut(model: nn.Module, kept: CutRecord) -> None:
    """Let a model know what it has kept, of the model that it was before its first cut."""
    earlier = cut_record_of(model)
    setattr(model, _ATTRIBUTE, kept if earlier is None else earlier.then(kept))


def cut_record_of(model: nn.Module) -> CutRecord | None:
    """Return what a model has kept; None if it has never been shrunk."""
    found: CutRecord | None = getattr(model, _ATTRIBUTE, None)
    return found
