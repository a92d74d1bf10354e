"""Consistency: whether masks fit the model, and whether the weights that they prune are zero in it."""

import warnings
from collections.abc import Mapping

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_prune.masks import Masks
from lightning_prune.models.parameters import named_parameters
from lightning_prune.tensors.distributed import is_sharded, local, local_shard, reshard
from lightning_prune.tensors.masking import zero_pruned


def fitting(masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Masks:
    """Return the masks whose parameters are still there, in the shape of the mask.

    >>> list(fitting({"weight": torch.ones(1, 2).bool(), "gone": torch.ones(1).bool()}, {"weight": torch.ones(1, 2)}))
    ['weight']
    """
    found = Masks()
    for name, mask in masks.items():
        if name in parameters and local(parameters[name]).shape == mask.shape:
            found[name] = mask
    return found


def drop_missing(owner: object, masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Masks:
    """Return the masks of parameters that the model still has, and warn of the others."""
    held = fitting(masks, parameters)
    if len(held) < len(masks):
        gone = [name for name in masks if name not in held]
        rank_zero_warn(
            f"{type(owner).__name__} drops the masks of {gone[:5]}: the model has no parameter of that name and shape "
            f"any more"
        )
    return held


def place(owner: object, masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor], full: bool) -> Masks:
    """Return masks on the devices of their parameters.

    Args:
        owner: The callback, for messages.
        masks: The masks.
        parameters: The parameters of the model, by name.
        full: Whether the masks are full tensors, as checkpoints have them, of which this rank takes its shard.

    Raises:
        ValueError: If a full mask does not fit the model.
    """
    if not full:
        held = drop_missing(owner, masks, parameters)
        return Masks({name: mask.to(parameters[name].device) for name, mask in held.items()})
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            found = tuple(parameters[name].shape) if name in parameters else "no parameter of that name"
            raise ValueError(
                f"the model must have a parameter {name!r} of shape {tuple(mask.shape)}, as the checkpoint of "
                f"{type(owner).__name__} has a mask for it, got {found}"
            )
    shards = {name: local_shard(mask, parameters[name]).contiguous() for name, mask in masks.items()}
    return Masks({name: shard.to(parameters[name].device) for name, shard in shards.items()})


@torch.no_grad()
def regrown(masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the parameters in which a pruned element is not zero; the host waits for the device once.

    >>> regrown({"weight": torch.tensor([True, False])}, {"weight": torch.tensor([0.0, 1.0])})
    ['weight']
    """
    found = [_regrows(local(parameters[name]), mask) for name, mask in masks.items()]
    flags = torch.stack([flag.to(found[0].device) for flag in found]).tolist() if found else []
    return [name for name, flag in zip(masks, flags, strict=True) if flag]


def _regrows(weight: Tensor, mask: Tensor) -> Tensor:
    return (weight != 0).logical_and_(~mask.to(weight.device)).any()


def restore(owner: object, model: nn.Module, masks: Mapping[str, Tensor], moment: str) -> None:
    """Zero what the masks prune and something else has changed, and warn of it."""
    reshard(model)
    parameters = named_parameters(model)
    held = fitting(masks, parameters)
    names = regrown(held, parameters)
    if not names:
        return
    zero_pruned((local(parameters[name]), held[name].to(local(parameters[name]).device)) for name in names)
    # of a sharded parameter another rank may know nothing
    warn = warnings.warn if any(is_sharded(parameters[name]) for name in names) else rank_zero_warn
    warn(
        f"{type(owner).__name__} found pruned weights that are not zero {moment}, in {names[:5]}, and has zeroed them "
        f"again: something other than an optimizer step has written to them, such as load_state_dict or a callback "
        f"that averages weights",
        stacklevel=2,
    )
