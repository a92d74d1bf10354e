"""Orientation: along which dimension of its weight a layer has its inputs, where it is not that of a linear one."""

from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def is_transposed(module: nn.Module) -> bool:
    """Return whether a layer multiplies its input by a matrix ``weight`` that it holds as (inputs, outputs).

    That is the ``Conv1D`` of transformers, and every layer that says so by ``fan_in_fan_out = True``, the word that
    peft and loralib have for it.

    >>> layer = nn.Linear(3, 2)
    >>> layer.fan_in_fan_out = True
    >>> is_transposed(layer), is_transposed(nn.Linear(3, 2))
    (True, False)
    """
    weight = module._parameters.get("weight")
    if weight is None or is_lazy(weight) or weight.ndim != 2:
        return False
    # by its name and its attribute: copies of it are in many repositories
    named = hasattr(module, "nf") and any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)
    return named or getattr(module, "fan_in_fan_out", False) is True


def experts_are_transposed(module: nn.Module) -> bool:
    """Return whether experts hold their matrices as (inputs, outputs), which transformers calls ``is_transposed``.

    Where a module does not say so, its two matrices do: what the first one takes is what the second one gives.

    >>> class TinyExperts(nn.Module):
    ...     def __init__(self) -> None:
    ...         super().__init__()
    ...         self.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 2 * 6))
    ...         self.down_proj = nn.Parameter(torch.zeros(4, 6, 8))
    >>> import torch
    >>> experts_are_transposed(TinyExperts())
    True
    """
    told = getattr(module, "is_transposed", None)
    if isinstance(told, bool):
        return told
    first, second = module._parameters.get("gate_up_proj"), module._parameters.get("down_proj")
    if first is None or second is None or first.ndim != 3 or second.ndim != 3:
        return False
    return first.shape[1] == second.shape[2] and first.shape[2] != second.shape[1]


def is_linear(module: nn.Module) -> bool:
    """Return whether a layer multiplies the last dimension of its input by a matrix, whichever way it holds that.

    >>> is_linear(nn.Linear(2, 2)), is_linear(nn.Conv1d(2, 2, 1))
    (True, False)
    """
    return isinstance(module, nn.Linear) or is_transposed(module)


def as_rows(weight: Tensor, module: nn.Module) -> Tensor:
    """Return the weight of a layer with the output channels first; a view.

    >>> layer = nn.Linear(3, 2)
    >>> layer.fan_in_fan_out = True
    >>> import torch
    >>> as_rows(torch.zeros(3, 2), layer).shape
    torch.Size([2, 3])
    """
    return weight.mT if is_transposed(module) else weight


class UntransposedLinear(nn.Linear):
    """A linear layer in the place of one that holds the same weight transposed."""


def untransposed(model: nn.Module) -> nn.Module:
    """Return a model whose layers hold no weight transposed, in place: linear layers stand in for those that do.

    >>> layer = nn.Linear(3, 2)
    >>> import torch
    >>> layer.fan_in_fan_out, layer.weight = True, nn.Parameter(torch.zeros(3, 2))
    >>> untransposed(nn.Sequential(layer))
    Sequential(
      (0): UntransposedLinear(in_features=3, out_features=2, bias=True)
    )
    """
    weights: dict[Tensor, nn.Parameter] = {}
    layers: dict[nn.Module, nn.Module] = {}

    def standing_in(module: nn.Module) -> nn.Module:
        if module not in layers:
            held = module.get_parameter("weight")
            inputs, outputs = held.shape
            layer = UntransposedLinear(inputs, outputs, bias=False, device="meta")
            layer.weight = weights.setdefault(held, nn.Parameter(held.detach().T.contiguous()))
            layer.register_parameter("bias", module._parameters.get("bias"))
            layers[module] = layer.train(module.training)
        return layers[module]

    if is_transposed(model):
        return standing_in(model)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and is_transposed(child):
                module._modules[name] = standing_in(child)
    return model


def tell_transposed(module: nn.Module) -> None:
    """Set the sizes that such a layer states to those that its weight has."""
    sizes = module.get_parameter("weight").shape
    for names in (("nx", "nf"), ("in_features", "out_features")):
        if hasattr(module, names[1]):  # some versions of Conv1D state their outputs alone
            for name, size in zip(names, sizes, strict=True):
                setattr(module, name, size)
