"""Shards: the piece of a parameter that this rank holds, whether it is a plain tensor or a DTensor."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

Operation = Literal["sum", "min", "max"]


def is_sharded(tensor: Tensor) -> bool:
    """Return whether ranks hold pieces of the tensor; a rank's piece may be empty, or the whole.

    >>> is_sharded(torch.zeros(2))
    False
    """
    return isinstance(tensor, DTensor)


def is_split(tensor: Tensor, dims: Sequence[int]) -> bool:
    """Return whether ranks hold different parts of one of these dimensions.

    >>> is_split(torch.zeros(2, 2), [0, 1])
    False
    """
    return isinstance(tensor, DTensor) and any(getattr(place, "dim", None) in dims for place in tensor.placements)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's piece, detached and sharing its storage; a plain tensor is its own piece.

    >>> weight = torch.nn.Linear(2, 2).weight
    >>> local(weight).data_ptr() == weight.data_ptr()
    True
    """
    piece = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return (piece.wait() if isinstance(piece, AsyncCollectiveTensor) else piece).detach()


def offsets(tensor: Tensor) -> tuple[int, ...]:
    """Return where this rank's piece begins in the whole, per dimension.

    >>> offsets(torch.zeros(2, 3))
    (0, 0)
    """
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim
    return tuple(compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1])


def output_rows(tensor: Tensor, dim: int) -> slice:
    """Return which output channels the module of this weight puts out on this rank, ``dim`` being their dimension.

    Tensor parallelism leaves it a part of them. What FSDP2 cuts off such a part is marked, and put back for a forward.

    >>> output_rows(torch.zeros(2, 3), 0)
    slice(0, 2, None)
    """
    if not isinstance(tensor, DTensor):
        return slice(0, tensor.shape[dim])
    placements = [Replicate() if isinstance(place, _StridedShard) else place for place in tensor.placements]
    length, begin = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, placements)
    return slice(begin[dim], begin[dim] + length[dim])


def counts_here(tensor: Tensor) -> bool:
    """Return whether this rank counts its piece; of several ranks with the same piece one does.

    >>> counts_here(torch.zeros(2, 3))
    True
    """
    if not isinstance(tensor, DTensor):
        return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None or 0 not in tensor.device_mesh.mesh:  # of several meshes with copies, that of rank 0 counts
        return False
    replicated = [
        c for c, placement in zip(coordinate, tensor.placements, strict=True) if isinstance(placement, Replicate)
    ]
    return not any(replicated)


def flat_index(tensor: Tensor) -> Tensor:
    """Return the flat position in the whole (int64) of every entry of this rank's piece.

    >>> flat_index(torch.zeros(2, 3)).tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    piece = local(tensor)
    index = torch.zeros(piece.shape, dtype=torch.int64, device=piece.device)
    stride = 1
    for dim in reversed(range(piece.ndim)):
        place = torch.arange(piece.shape[dim], device=piece.device).add_(offsets(tensor)[dim]).mul_(stride)
        index += place.view([-1 if d == dim else 1 for d in range(piece.ndim)])
        stride *= tensor.shape[dim]
    return index


def over_ranks(values: Tensor, operation: Operation = "sum") -> Tensor:
    """Return the sum, minimum or maximum of a tensor over all ranks; the tensor itself is left as it is."""
    total = values.clone()
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and torch.distributed.get_backend() not in ("gloo", "mpi"):
        total = total.to(accelerator)  # the others take no tensors on the CPU
    torch.distributed.all_reduce(total, getattr(torch.distributed.ReduceOp, operation.upper()))
    return total.to(values.device)


def average_gradients(model: torch.nn.Module) -> None:
    """Give all ranks the mean of their gradients, where nothing else has; all ranks must call it.

    A parameter without a gradient on some ranks counts as zero there.
    """
    parameters = [p for p in model.parameters() if p.requires_grad and not is_sharded(p)]
    seen = over_ranks(torch.tensor([int(p.grad is not None) for p in parameters]))
    for parameter, ranks in zip(parameters, seen.tolist(), strict=True):
        if ranks:
            mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = over_ranks(mine).div_(torch.distributed.get_world_size())


def gather(tensor: Tensor | None) -> list[Tensor | None]:
    """Return the tensors of all ranks, in their order, on the CPU; shapes may differ."""
    found: list[Tensor | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, None if tensor is None else tensor.to("cpu", copy=True))
    return found


def piece(whole: Tensor, like: Tensor) -> Tensor:
    """Return the part of a tensor of the whole shape that lies on this rank, as ``like`` does; a view.

    >>> piece(torch.ones(2, 3), torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """
    for dim, (begin, length) in enumerate(zip(offsets(like), local(like).shape, strict=True)):
        whole = whole.narrow(dim, begin if length else 0, length)
    return whole


def whole(piece: Tensor, like: Tensor) -> Tensor:
    """Return the whole of which every rank holds a piece, as ``like`` does; all ranks must call it.

    >>> whole(torch.ones(2, 3), torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """
    if not isinstance(like, DTensor):
        return piece
    mesh = like.device_mesh
    spread = DTensor.from_local(
        piece.to(mesh.device_type), mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return spread.full_tensor().to(piece.device)


def reshard(model: torch.nn.Module) -> None:
    """Put FSDP2 parameters back in pieces.

    A forward without a backward (validation) leaves those of the root whole, and an edit of them would be lost.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
