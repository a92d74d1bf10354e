"""Run state: what a callback knows of a run, declared once. Reset, copy, save and load follow from the fields.

A method with state of its own declares it as a subclass of the state of its base class, and names that in ``State``.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from lightning_prune.masks import Masks
from lightning_prune.models.parameters import named_parameters
from lightning_prune.tensors.boolean import count
from lightning_prune.tensors.distributed import full_tensor, reshard
from lightning_prune.tensors.packing import pack_all, unpack_all
from lightning_prune.training.consistency import fitting
from lightning_prune.validation import states
from lightning_prune.validation.states import FRACTION, MASKS, TEXT, Rule, optional, table
from lightning_prune.validation.states import whole as whole_number

TRANSIENT = {"transient": True}  # metadata of a field of this process or of the model: copies start with its default


def saved(
    rule: Rule,
    *,
    save: Callable[[Any], Any] | None = None,
    load: Callable[[Any], Any] | None = None,
    copied: Callable[[Any], Any] | None = None,
    absent: Any = MISSING,
) -> dict[str, Any]:
    """Return the metadata of a field that is part of checkpoints, under its own name.

    Args:
        rule: What a saved value has to look like.
        save: From the state to what is saved; None saves the value of the field.
        load: From what was saved to the value of the field; None takes it as it is.
        copied: From the state to the value in a copy of it; None copies the value of the field.
        absent: What stands for the saved value where the state of an earlier release lacks the key; without it, the
            key is required.

    >>> @dataclass
    ... class Counting(RunState):
    ...     updates: int = field(default=0, metadata=saved(whole_number()))
    >>> Counting(updates=3).saved()["updates"]
    3
    """
    return {"rule": rule, "save": save, "load": load, "copied": copied, "absent": absent}


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return plain copies, which a checkpoint can hold."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


@dataclass(eq=False)
class RunState:
    """What every callback that trains under masks knows of its run.

    Attributes:
        steps: Optimizer steps so far.
        levels: Sparsity of the targets that have a mask, by name.
        masks: Bool masks by parameter name; of a sharded parameter, this rank's shard.
        arguments: Those that the masks follow from, as text; None where a checkpoint does not have them.
        sparsity: The fraction of zeros among all targets.
        restored: Whether the masks come from a checkpoint, as full tensors, and have not been placed on a model yet.
        logged: The epoch and the levels of the last log entry.
        metric: The name by which the sparsity is logged in the run.
        model: The model whose masks these are.
        left_out: Why targets are left out, by name.
    """

    steps: int = field(default=0, metadata=saved(whole_number()))
    levels: dict[str, float] = field(
        default_factory=dict, metadata=saved(table(FRACTION), save=lambda state: state.held_levels())
    )
    masks: Masks = field(
        default_factory=Masks,
        metadata=saved(MASKS, save=lambda state: state.packed_masks(), load=lambda packed: Masks(unpack_all(packed))),
    )
    arguments: dict[str, str] | None = field(default=None, metadata=saved(optional(table(TEXT)), absent=None))
    sparsity: float = 0.0
    restored: bool = False
    logged: tuple[int, dict[str, float]] | None = None
    metric: str = "pruning/sparsity"
    model: "weakref.ref[nn.Module] | None" = field(default=None, metadata=TRANSIENT)
    left_out: dict[str, str] = field(default_factory=dict)

    def concerns(self, model: nn.Module) -> bool:
        """Return whether it is the state of this model, or of none yet, and not what another run has left behind.

        >>> RunState().concerns(nn.Linear(4, 2))
        True
        """
        return self.model is None or self.model() is model

    def saved(self) -> dict[str, Any]:
        """Return what checkpoints have of it: plain numbers and full tensors; all ranks must call it."""
        values = {}
        for known in fields(self):
            if "rule" in known.metadata:
                save = known.metadata["save"]
                values[known.name] = getattr(self, known.name) if save is None else save(self)
        return {"version": states.VERSION, **values}

    @classmethod
    def load(cls, owner: str, values: Any) -> Self:
        """Return the state that was saved; nothing is changed where it is damaged.

        Args:
            owner: The name of the callback.
            values: What the checkpoint has of it.

        Raises:
            ValueError: If it is damaged, or of a later release; the message names the key.
        """
        known = {found.name: found.metadata for found in fields(cls) if "rule" in found.metadata}
        required = [name for name, marks in known.items() if marks["absent"] is MISSING]
        states.check(owner, values, {name: marks["rule"] for name, marks in known.items()}, required)
        cls.check(owner, values)
        loaded = {}
        for name, marks in known.items():
            value = values.get(name, marks["absent"])
            loaded[name] = value if marks["load"] is None else marks["load"](value)
        state = cls(**loaded)
        state.restored = True
        state.count_restored()
        return state

    @classmethod
    def check(cls, owner: str, values: Mapping[str, Any]) -> None:
        """Reject saved values that do not fit each other; each of them fits its own rule by then."""
        shapes = values["masks"]["shapes"]
        for name in values["levels"]:
            if name not in shapes:
                raise ValueError(f"the state of {owner} must have a mask of {name!r} in 'masks', got {list(shapes)}")

    def __getstate__(self) -> dict[str, Any]:
        values = {}
        for known in fields(self):
            copied = known.metadata.get("copied")
            if known.metadata.get("transient"):
                values[known.name] = known.default if known.default_factory is MISSING else known.default_factory()
            else:
                values[known.name] = getattr(self, known.name) if copied is None else copied(self)
        return values

    @property
    def settled(self) -> bool:
        """Whether what the masks prune is zero at this moment, as it is outside of straight-through steps."""
        return True

    def release(self) -> None:
        """Remove what the run has attached to the model; idempotent."""

    def placed_model(self) -> nn.Module | None:
        """Return the model that the masks are placed on, with its parameters in shards if they are sharded."""
        model = self.model() if self.model is not None and not self.restored else None
        if model is not None:
            reshard(model)
        return model

    def held_masks(self) -> Masks:
        """Return the masks of the parameters that the model still has."""
        model = self.placed_model()
        return self.masks if model is None else fitting(self.masks, named_parameters(model))

    def held_levels(self) -> dict[str, float]:
        """Return the sparsity of the targets that the model still has."""
        held = self.held_masks()
        return {name: level for name, level in self.levels.items() if name in held}

    def packed_masks(self) -> dict[str, Any]:
        """Return the masks of the parameters that the model still has, as full tensors of one bit an element."""
        return pack_all(self.full_tensors(self.held_masks()))

    def full_tensors(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the full tensors, by parameter name, of which every rank has a shard; all ranks must call it."""
        model = self.placed_model()
        if model is None:
            return dict(shards)
        parameters = named_parameters(model)
        return {name: full_tensor(shard, parameters[name]) for name, shard in shards.items()}

    def count_restored(self) -> None:
        """Count the sparsity from restored masks: it is theirs whatever the checkpoint says."""
        kept = {name: count(self.masks[name]) for name in self.levels}
        self.levels = {name: 1.0 - kept[name] / max(1, self.masks[name].numel()) for name in kept}
        total = sum(self.masks[name].numel() for name in kept)
        self.sparsity = (total - sum(kept.values())) / max(1, total)
