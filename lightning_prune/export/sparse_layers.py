"""Sparse layers: linear layers that skip zeros where that is faster."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.validation.arguments import integer, number
from lightning_prune.validation.instances import instance

Model = TypeVar("Model", bound=nn.Module)

# Measured by examples/benchmarks/csr.py: from these on, CSR is faster at every batch size.
CSR_SPARSITY = 0.9
CSR_WEIGHTS = 2**20

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class CSRLinear(nn.Module):
    """A linear layer that multiplies by compressed sparse rows: for inference, on the CPU.

    Args:
        linear: The layer to replace; its weight is float32 or float64.
    """

    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    bias: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sparse CSR tensors are in beta
            weight = linear.weight.detach().to_sparse_csr()
        # three plain buffers, since a sparse tensor can be neither deep-copied nor moved with its module;
        # int32, which MKL takes without a conversion
        self.register_buffer("crow_indices", weight.crow_indices().int())
        self.register_buffer("col_indices", weight.col_indices().int())
        self.register_buffer("values", weight.values())
        bias = linear.bias.detach() if linear.bias is not None else self.values.new_zeros(self.out_features)
        self.register_buffer("bias", bias.clone())

    def dense(self) -> nn.Linear:
        """Return the linear layer that computes the same, zeros included."""
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight = nn.Parameter(self._weight().to_dense(), requires_grad=False)
        linear.bias = nn.Parameter(self.bias, requires_grad=False)
        return linear

    def _weight(self) -> Tensor:
        shape = (self.out_features, self.in_features)
        return torch.sparse_csr_tensor(self.crow_indices, self.col_indices, self.values, shape, check_invariants=False)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        weight = self._weight()
        rows = inputs.reshape(-1, self.in_features)
        if len(rows) == 1:  # a matrix-vector product is twice as fast as one with a single-column matrix
            out = torch.addmv(self.bias, weight, rows[0])[None]
        else:
            out = torch.addmm(self.bias[:, None], weight, rows.t()).t()
        # attention is slow with strides other than those of a contiguous tensor
        return out if inputs.ndim == 2 else out.contiguous().view(*inputs.shape[:-1], self.out_features)


def to_sparse_csr(model: nn.Module, *, min_sparsity: float = CSR_SPARSITY, min_weights: int = CSR_WEIGHTS) -> nn.Module:
    """Return a copy of the model whose linear layers with enough zeros are ``CSRLinear``: faster on a CPU.

    Measured on one core with batch sizes 1 to 128, against torch's own dense layers: layers of 1024 x 1024 weights or
    more are faster from 85 % zeros on, layers of 512 x 512 from 95 % on, smaller ones never at batch size 1. ONNX
    Runtime runs dense layers up to twice as fast as torch. ``to_fast`` measures instead, and knows faster forms. Only
    plain ``nn.Linear`` layers are converted, except inside other modules of torch, which read their weights directly.

    Args:
        model: Any module, on the CPU; for inference.
        min_sparsity: The minimum fraction of zeros, 0 to 1, for a layer to be converted.
        min_weights: The minimum number of weights, zeros included, for a layer to be converted.

    Raises:
        ValueError: If no layer has enough zeros and weights, or an argument is out of range.

    >>> model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    >>> _ = nn.init.eye_(model[0].weight)
    >>> [type(layer).__name__ for layer in to_sparse_csr(model)]
    ['CSRLinear', 'ReLU', 'Linear']
    """
    instance("model", model, nn.Module)
    min_sparsity = number("min_sparsity", min_sparsity, "[0, 1]")
    min_weights = integer("min_weights", min_weights, 0)
    layers = dict(linear_layers(model))
    zeros = {name: int((layer.weight == 0).sum()) for name, layer in layers.items()}

    def qualifies(name: str, layer: nn.Linear) -> bool:
        count = layer.weight.numel()
        fits = layer.weight.device.type == "cpu" and layer.weight.dtype in (torch.float32, torch.float64)
        return fits and count >= min_weights and zeros[name] >= int(min_sparsity * count)

    if not any(qualifies(name, layer) for name, layer in layers.items()):
        least, asked = f"{min_weights:,}", f"min_sparsity={min_sparsity} and min_weights={min_weights}"
        seen = [f"{name} {zeros[name]:,} of {layer.weight.numel():,}" for name, layer in layers.items()]
        raise ValueError(
            f"model must have a linear layer on the CPU with at least {min_sparsity:.0%} zeros among at least {least} "
            f"float32 or float64 weights to be faster as CSR, got {seen[:8]} for {asked}"
        )
    return _replace(model, qualifies, CSRLinear)


def to_sparse_semi_structured(model: nn.Module) -> nn.Module:
    """Return a copy of the model whose 2:4 sparse linear layers run on the sparse tensor cores of a GPU.

    ``torch.sparse.to_sparse_semi_structured`` converts their weights. Layers that are not 2:4 sparse, or whose shape is
    not a multiple of 32 x 64, stay dense. The conversion is not yet tested on a GPU.

    Args:
        model: Any module in float16 or bfloat16, on a CUDA device of compute capability 8.0 (Ampere) or higher.

    Raises:
        ValueError: If the device or dtype has no such kernels, or no layer is 2:4 sparse.

    Reference: Mishra et al., 2021, "Accelerating Sparse Deep Neural Networks", arXiv:2104.08378.
    """
    instance("model", model, nn.Module)
    layers = dict(linear_layers(model))
    for name, layer in layers.items():
        _check_kernels(name, layer.weight)

    def qualifies(name: str, layer: nn.Linear) -> bool:
        rows, columns = layer.weight.shape
        return rows % 32 == 0 and columns % 64 == 0 and is_two_of_four(layer.weight)

    if not any(qualifies(name, layer) for name, layer in layers.items()):
        shapes = [f"{name} {tuple(layer.weight.shape)}" for name, layer in layers.items()]
        raise ValueError(
            f"the model must have a layer with a multiple of 32 x 64 weights pruned by NM(2, 4), got {shapes[:8]}"
        )
    return _replace(model, qualifies, _semi_structured)


def is_two_of_four(weight: Tensor) -> bool:
    """Return whether at most two of every four consecutive weights in a row are nonzero.

    >>> is_two_of_four(torch.tensor([[1.0, 0.0, 2.0, 0.0]])), is_two_of_four(torch.tensor([[1.0, 2.0, 3.0, 0.0]]))
    (True, False)
    """
    return weight.shape[1] % 4 == 0 and bool((weight.unflatten(1, (-1, 4)) != 0).sum(2).le(2).all())


def _check_kernels(name: str, weight: Tensor) -> None:
    capability = torch.cuda.get_device_capability(weight.device) if weight.device.type == "cuda" else (0, 0)
    if capability < (8, 0):
        raise ValueError(
            f"2:4 sparsity needs the model on a CUDA device of compute capability 8.0 or higher, got {name!r} on "
            f"{weight.device}" + (f" with {capability[0]}.{capability[1]}" if weight.is_cuda else "")
        )
    if weight.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"2:4 sparsity needs weights in float16 or bfloat16, got {weight.dtype} for {name!r}")


def _semi_structured(linear: nn.Linear) -> nn.Linear:
    sparse = torch.sparse.to_sparse_semi_structured(linear.weight.detach())
    linear.weight = nn.Parameter(sparse, requires_grad=False)
    return linear


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield plain linear layers, except those whose weights another module of torch reads directly."""
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    for name, module in model.named_modules():
        parent = parents.get(module)
        inside = parent is not None and type(parent).__module__.startswith("torch.") and type(parent) not in _CONTAINERS
        if type(module) is nn.Linear and not inside:
            yield name, module


def _replace(
    model: nn.Module, qualifies: Callable[[str, nn.Linear], bool], convert: Callable[[nn.Linear], nn.Module]
) -> nn.Module:
    """Return a copy of the model in which the layers that qualify are converted."""
    model = deepcopy(model)
    return replaced(model, {name: convert(layer) for name, layer in linear_layers(model) if qualifies(name, layer)})


def replaced(model: Model, layers: Mapping[str, nn.Module]) -> Model:
    """Return the model with other layers in place of those of these names, wherever else it holds them, too."""
    others = {model.get_submodule(name): layer for name, layer in layers.items()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in others:
                setattr(parent, name, others[child])
    return cast(Model, others.get(model, model))
