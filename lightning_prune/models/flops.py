"""FLOPs of a forward pass by parameter, dense and without products with zeros."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import cudnn, mkldnn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from typing_extensions import override

from lightning_prune.models.forward import call, device_of
from lightning_prune.models.parameters import named_parameters
from lightning_prune.models.preserving import evaluating
from lightning_prune.tensors.distributed import local

NO_PARAMETER = ""  # the name for products of activations, such as attention scores


def dense_flops(model: nn.Module, inputs: Any) -> dict[str, int]:
    """Return the FLOPs of one forward pass by parameter name; a multiply-add counts as two.

    It counts the operations that torch's ``flop_counter`` knows: matrix products, convolutions, attention. Those
    without a parameter have the name "". The model runs in eval mode and is left as it was.

    Args:
        model: Any module.
        inputs: A tuple or list of positional arguments, a dict of keyword arguments, or the only argument.

    >>> dense_flops(nn.Linear(4, 3), torch.zeros(2, 4))
    {'weight': 48}
    """
    mode = _ByParameter(lambda: named_parameters(model))
    device = device_of(model)
    rng = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with evaluating(model), _unfused(), rng, torch.no_grad(), mode:
        call(model, tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs))
    return dict(mode.found)


def sparse_flops(dense: Mapping[str, int], density: Mapping[str, float]) -> float:
    """Return the FLOPs that remain if every product with a pruned weight is skipped.

    Args:
        dense: FLOPs by parameter name.
        density: The fraction of nonzero elements, 0 to 1, by parameter name; missing names count as 1.

    >>> sparse_flops({"weight": 48, "": 10}, {"weight": 0.25})
    22.0
    """
    return float(sum(flops * density.get(name, 1.0) for name, flops in dense.items()))


class _ByParameter(TorchDispatchMode):
    """Counts the FLOPs of every operation, by the parameter among its arguments."""

    def __init__(self, parameters: Callable[[], Mapping[str, nn.Parameter]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()
        self._parameters = parameters

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.found[self._owner(args)] += count(*args, **kwargs, out_val=out)
        return out

    def _owner(self, args: tuple[Any, ...]) -> str:
        # looked up each time: FSDP2 replaces shards by full parameters during a forward pass
        names = {_storage(parameter): name for name, parameter in self._parameters().items() if parameter.ndim >= 2}
        storages = [_storage(leaf) for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        return next((names[storage] for storage in storages if storage in names), NO_PARAMETER)


@contextmanager
def _unfused() -> Iterator[None]:
    """Run attention and recurrent layers as matrix products: fused kernels are not counted on every device."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about flags that this device does not have
        with mkldnn.flags(enabled=False), cudnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                yield
            finally:
                torch.backends.mha.set_fastpath_enabled(fast)


def _storage(tensor: Tensor) -> int:
    return local(tensor).untyped_storage().data_ptr()  # shared with a transposed view
