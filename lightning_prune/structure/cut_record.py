"""The cut record: which parts of its former tensors a shrunk model has kept, and how a checkpoint stores that."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.structure.block_names import is_inside, name_after, name_before
from lightning_prune.tensors.packing import pack_all, unpack_all
from lightning_prune.validation.states import MASKS, TEXT, every, items, one, optional, record, row, table, whole

_ATTRIBUTE = "_kept_channels"  # of a shrunk model; pickled models and users rely on it
_KEY = one("names of a dimension and a tensor", lambda value: all(map(re.compile(r"\d+:").match, value)))
_HEADS = one("at least one head, and no more than there were", lambda value: 1 <= value[1] <= value[0])
_VECTOR = one("a mask of one dimension", lambda value: len(value) == 1)
_NAMES = items(TEXT)
_WIDTH = optional(row(whole(1), whole(1)))
_STATE = record(
    places=every(MASKS, record(shapes=every(_KEY, table(_VECTOR)))),
    heads=table(every(row(whole(), whole()), _HEADS)),
)
_QUERIES = table(every(row(whole(), whole()), _HEADS))


@dataclass(frozen=True)
class CutRecord:
    """What is kept of a model when units are cut out of it.

    Args:
        places: Which indices are kept, by name and dimension of a tensor: bool, of the length before the cut.
        heads: The number of heads before and after the cut, by name of the attention.
        removed: The names of the blocks that are taken out as a whole, after that.
        hidden: The hidden width before and after the cut, if the config of the model says so.
        queries: The number of queries of each head of keys and values before and after the cut, likewise by attention.
    """

    places: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)
    heads: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    hidden: tuple[int, int] | None = None
    queries: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def then(self, later: "CutRecord") -> "CutRecord":
        """Return the record of both cuts, this one and a later one.

        >>> first = CutRecord({("weight", 0): torch.tensor([True, False, True])})
        >>> first.then(CutRecord({("weight", 0): torch.tensor([False, True])})).places
        {('weight', 0): tensor([False, False,  True])}
        """
        places = dict(self.places)
        for (name, dim), kept in later.places.items():
            place = name_before(name, self.removed), dim  # blocks have other numbers since some were taken out
            earlier = self.places.get(place, torch.ones_like(kept))
            places[place] = torch.zeros_like(earlier).masked_scatter(earlier, kept)
        removed = (*self.removed, *(name_before(name, self.removed) for name in later.removed))
        places = {(name, dim): kept for (name, dim), kept in places.items() if not is_inside(name, removed)}
        heads, queries = (
            self._counts(earlier, after, removed)
            for earlier, after in ((self.heads, later.heads), (self.queries, later.queries))
        )
        hidden = self.hidden and later.hidden and (self.hidden[0], later.hidden[1])
        return CutRecord(places, heads, removed, hidden or later.hidden or self.hidden, queries)

    def _counts(
        self, earlier: Mapping[str, tuple[int, int]], later: Mapping[str, tuple[int, int]], removed: tuple[str, ...]
    ) -> dict[str, tuple[int, int]]:
        """Return the numbers before and after both cuts, by attention, without those that are removed."""
        after = {name_before(name, self.removed): counts for name, counts in later.items()}
        both = {name: (earlier.get(name, counts)[0], counts[1]) for name, counts in after.items()}
        return {name: counts for name, counts in {**earlier, **both}.items() if not is_inside(name, removed)}

    def of_masks(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parts of masks that are kept, by the names that parameters have after the cut.

        >>> masks = {f"blocks.{number}.weight": torch.tensor([number == 1]) for number in range(2)}
        >>> CutRecord(removed=("blocks.0",)).of_masks(masks)
        {'blocks.0.weight': tensor([True])}
        """
        kept = {name: mask for name, mask in masks.items() if not is_inside(name, self.removed)}
        return {name_after(name, self.removed): self.of_mask(name, mask) for name, mask in kept.items()}

    def of_mask(self, name: str, mask: Tensor) -> Tensor:
        """Return the part of a parameter's mask that is kept; blocks are not looked at."""
        for (part, dim), kept in self.places.items():
            if part == name:
                mask = select(mask, dim, kept)
        return mask

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise if the record does not fit these tensors.

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
        for block in self.removed:
            if not any(is_inside(name, [block]) for name in tensors):
                raise ValueError(f"the model must have the block {block!r}, as the one had that was shrunk, got none")

    def state_dict(self) -> dict[str, Any]:
        """Return plain tensors and numbers, one bit an index."""
        places = pack_all({f"{dim}:{name}": kept for (name, dim), kept in self.places.items()})
        heads = {name: list(counts) for name, counts in self.heads.items()}
        removed = {"removed": list(self.removed)} if self.removed else {}
        hidden = {} if self.hidden is None else {"hidden": list(self.hidden)}
        queries = {"queries": {n: list(counts) for n, counts in self.queries.items()}} if self.queries else {}
        return {"version": 1, "places": places, "heads": heads, **removed, **hidden, **queries}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "CutRecord":
        """Return the record that ``state_dict`` wrote.

        Raises:
            ValueError: If something is missing or damaged; the message names it.

        >>> kept = CutRecord({("weight", 0): torch.tensor([True, False])}, {"attention": (4, 2)})
        >>> CutRecord.from_state_dict(kept.state_dict()).heads
        {'attention': (4, 2)}
        """
        complete = isinstance(state, Mapping) and {"version", "places", "heads"} <= state.keys()
        if not complete or state["version"] != 1:
            raise ValueError(
                f"'lightning_prune' of a checkpoint, the kept channels, must be of version 1, with places and heads, "
                f"got {state!r:.80}"
            )
        try:
            _STATE("lightning_prune", state)
            _NAMES("lightning_prune.removed", state.get("removed", ()))
            _WIDTH("lightning_prune.hidden", state.get("hidden"))
            _QUERIES("lightning_prune.queries", state.get("queries", {}))
        except ValueError as error:
            raise ValueError(f"the kept channels must have {error}") from error
        places = {}
        for name, kept in unpack_all(state["places"]).items():
            dim, _, plain = name.partition(":")
            places[plain, int(dim)] = kept
        heads, queries = (
            {name: (before, now) for name, (before, now) in state.get(key, {}).items()} for key in ("heads", "queries")
        )
        hidden = None if state.get("hidden") is None else (state["hidden"][0], state["hidden"][1])
        return cls(places, heads, tuple(state.get("removed", ())), hidden, queries)


Kept = CutRecord  # the name in models that version 0.1 pickled


def select(tensor: Tensor, dim: int, kept: Tensor) -> Tensor:
    """Return the slices of a tensor along a dimension that are kept (bool).

    >>> select(torch.tensor([[1, 2, 3]]), 1, torch.tensor([True, False, True]))
    tensor([[1, 3]])
    """
    return tensor.index_select(dim, kept.nonzero().squeeze(1).to(tensor.device))


def record_cut(model: nn.Module, kept: CutRecord) -> None:
    """Store on a model what a cut has kept, relative to the model before its first cut."""
    earlier = cut_record_of(model)
    setattr(model, _ATTRIBUTE, kept if earlier is None else earlier.then(kept))


def cut_record_of(model: nn.Module) -> CutRecord | None:
    """Return the cut record of a model; None if it has never been shrunk."""
    found: CutRecord | None = getattr(model, _ATTRIBUTE, None)
    return found
