"""Packing: masks as one bit an element."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def pack(mask: Tensor) -> dict[str, Any]:
    """Return a mask as one bit an element: ``{"shape": [...], "bits": uint8 tensor on the CPU}``.

    >>> pack(torch.tensor([True, False, True]))
    {'shape': [3], 'bits': tensor([160], dtype=torch.uint8)}
    """
    flat = mask.reshape(-1).to("cpu", torch.uint8)
    flat = nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    bit = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)
    return {"shape": list(mask.shape), "bits": (flat * bit).sum(1, dtype=torch.uint8)}


def unpack(packed: Mapping[str, Any]) -> Tensor:
    """Return the mask that ``pack`` packed.

    Raises:
        ValueError: If there are not exactly as many bits as the shape needs.

    >>> unpack(pack(torch.tensor([True, False, True])))
    tensor([ True, False,  True])
    """
    shape, bits = torch.Size(packed["shape"]), packed["bits"]
    size = -(-shape.numel() // 8)
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.shape != (size,) or min(shape, default=0) < 0:
        found = f"{bits.dtype} {tuple(bits.shape)}" if isinstance(bits, Tensor) else type(bits).__name__
        raise ValueError(f"a packed mask of shape {tuple(shape)} must have {size} bytes, got {found}")
    shift = torch.tensor([7, 6, 5, 4, 3, 2, 1, 0], dtype=torch.uint8)
    flat: Tensor = (bits[:, None] >> shift).bitwise_and_(1).bool().view(-1)
    return flat[: shape.numel()].view(shape)


def pack_all(masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return masks by name as ``{"shapes": {name: [...]}, "bits": uint8 tensor}``: one tensor is the fastest to save.

    >>> pack_all({"weight": torch.tensor([True, False, True])})
    {'shapes': {'weight': [3]}, 'bits': tensor([160], dtype=torch.uint8)}
    """
    packed = {name: pack(mask) for name, mask in masks.items()}
    bits = [part["bits"] for part in packed.values()]
    return {
        "shapes": {name: part["shape"] for name, part in packed.items()},
        "bits": torch.cat(bits) if bits else torch.empty(0, dtype=torch.uint8),
    }


def unpack_all(packed: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the masks that ``pack_all`` packed.

    Raises:
        ValueError: If bits are missing, for the parameter that the message names, or left over.

    >>> unpack_all(pack_all({"weight": torch.tensor([True, False, True])}))
    {'weight': tensor([ True, False,  True])}
    """
    masks: dict[str, Tensor] = {}
    begin = 0
    for name, shape in packed["shapes"].items():
        end = begin + -(-math.prod(shape) // 8)
        try:
            masks[name] = unpack({"shape": shape, "bits": packed["bits"][begin:end]})
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"the state must hold a complete mask of {name!r}, got: {error}") from error
        begin = end
    if begin != len(packed["bits"]):
        raise ValueError(f"the state must hold {begin} bytes of masks for {list(masks)}, got {len(packed['bits'])}")
    return masks
