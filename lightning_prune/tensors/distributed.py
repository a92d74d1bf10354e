"""Distributed tensors: the local shard of a parameter, whether it is a plain tensor or a DTensor, and collectives."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

Operation = Literal["sum", "min", "max"]
Made = TypeVar("Made")


def is_sharded(tensor: Tensor) -> bool:
    """Return whether the tensor is a DTensor; the shard of a rank may be empty, or the full tensor.

    >>> is_sharded(torch.zeros(2))
    False
    """
    return isinstance(tensor, DTensor)


def is_split(tensor: Tensor, dims: Sequence[int]) -> bool:
    """Return whether the tensor is sharded along one of these dimensions.

    >>> is_split(torch.zeros(2, 2), [0, 1])
    False
    """
    return isinstance(tensor, DTensor) and any(getattr(place, "dim", None) in dims for place in tensor.placements)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard, detached but sharing its storage; a plain tensor is its own shard.

    >>> weight = torch.nn.Linear(2, 2).weight
    >>> local(weight).data_ptr() == weight.data_ptr()
    True
    """
    shard = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return (shard.wait() if isinstance(shard, AsyncCollectiveTensor) else shard).detach()


def offsets(tensor: Tensor) -> tuple[int, ...]:
    """Return the offset of this rank's shard in the full tensor, per dimension.

    >>> offsets(torch.zeros(2, 3))
    (0, 0)
    """
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim
    return tuple(compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1])


def output_rows(tensor: Tensor, dim: int) -> slice:
    """Return the output channels that the module of this weight computes on this rank.

    Under tensor parallelism these are a part of all channels. FSDP2 shards that part further (``_StridedShard``), but
    gathers it again for a forward pass.

    Args:
        tensor: The weight.
        dim: Its dimension of output channels.

    >>> output_rows(torch.zeros(2, 3), 0)
    slice(0, 2, None)
    """
    if not isinstance(tensor, DTensor):
        return slice(0, tensor.shape[dim])
    placements = [Replicate() if isinstance(place, _StridedShard) else place for place in tensor.placements]
    length, begin = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, placements)
    return slice(begin[dim], begin[dim] + length[dim])


def counts_here(tensor: Tensor) -> bool:
    """Return whether this rank counts its shard; of the ranks that hold the same shard exactly one does.

    >>> counts_here(torch.zeros(2, 3))
    True
    """
    if not isinstance(tensor, DTensor):
        return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None or 0 not in tensor.device_mesh.mesh:  # with one mesh a replica, only that of rank 0 counts
        return False
    replicated = [
        c for c, placement in zip(coordinate, tensor.placements, strict=True) if isinstance(placement, Replicate)
    ]
    return not any(replicated)


def flat_index(tensor: Tensor) -> Tensor:
    """Return the flat index into the full tensor (int64) of every element of this rank's shard.

    >>> flat_index(torch.zeros(2, 3)).tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    shard = local(tensor)
    index = torch.zeros(shard.shape, dtype=torch.int64, device=shard.device)
    stride = 1
    for dim in reversed(range(shard.ndim)):
        position = torch.arange(shard.shape[dim], device=shard.device).add_(offsets(tensor)[dim]).mul_(stride)
        index += position.view([-1 if d == dim else 1 for d in range(shard.ndim)])
        stride *= tensor.shape[dim]
    return index


def over_ranks(values: Tensor, operation: Operation = "sum") -> Tensor:
    """Return the sum, minimum or maximum of a tensor over all ranks, as a new tensor."""
    total = values.clone()
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and torch.distributed.get_backend() not in ("gloo", "mpi"):
        total = total.to(accelerator)  # NCCL and the like do not reduce CPU tensors
    torch.distributed.all_reduce(total, getattr(torch.distributed.ReduceOp, operation.upper()))
    return total.to(values.device)


def from_first_rank(make: Callable[[], Made]) -> Made:
    """Return what the first rank makes, on all ranks; a collective. An error is raised on all of them."""
    found: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            found[0] = make()
        except Exception as error:  # the others wait
            found[1] = error
    torch.distributed.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return cast(Made, found[0])


def average_gradients(model: torch.nn.Module) -> None:
    """Average the gradients over the ranks where no wrapper has done so; a collective.

    A rank without a gradient for a parameter contributes zeros.
    """
    parameters = [p for p in model.parameters() if p.requires_grad and not is_sharded(p)]
    seen = over_ranks(torch.tensor([int(p.grad is not None) for p in parameters]))
    for parameter, ranks in zip(parameters, seen.tolist(), strict=True):
        if ranks:
            mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = over_ranks(mine).div_(torch.distributed.get_world_size())


def gather(tensor: Tensor | None) -> list[Tensor | None]:
    """Return the tensors of all ranks in rank order, on the CPU; shapes may differ."""
    found: list[Tensor | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, None if tensor is None else tensor.to("cpu", copy=True))
    return found


def local_shard(full: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of a full tensor, sharded as ``like`` is; a view.

    >>> local_shard(torch.ones(2, 3), torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """
    for dim, (begin, length) in enumerate(zip(offsets(like), local(like).shape, strict=True)):
        full = full.narrow(dim, begin if length else 0, length)
    return full


def full_tensor(shard: Tensor, like: Tensor) -> Tensor:
    """Return the full tensor, given each rank's shard, sharded as ``like`` is; a collective.

    >>> full_tensor(torch.ones(2, 3), torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """
    if not isinstance(like, DTensor):
        return shard
    mesh = like.device_mesh
    distributed = DTensor.from_local(
        shard.to(mesh.device_type), mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return distributed.full_tensor().to(shard.device)


def reshard(model: torch.nn.Module) -> None:
    """Reshard the parameters of FSDP2 modules.

    A forward without a backward (validation) leaves those of the root module unsharded, and an edit would be lost.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
