"""Kinds of layers: whose weights are pruned by default, and whose weights must not be pruned."""

import re
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

# names in torch and in libraries that follow it; torch.nn.utils.prune and spectral_norm add "_orig"
_WEIGHT = re.compile(r"weight(_orig|_(ih|hh|hr)(_l\d+)?(_reverse)?)?|(in|q|k|v)_proj_weight")
_NO_LAYER = re.compile(r"Embed|Norm")  # class names of embeddings and norms
_KEEPING_ZEROS = ("_SpectralNorm",)
_LOSING_ZEROS = {
    "_WeightNorm": "weight_norm divides its rows by their norms, so a row of zeros becomes NaN",
    "_Orthogonal": "an orthogonal parametrization turns its zeros into other weights",
}
STACKED = "it holds the matrices of several experts, so its rows are no output channels"
_GATED = (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell)


def unknown_kind(name: str, parameter: Tensor, modules: Sequence[nn.Module]) -> str | None:
    """Return why a parameter is not pruned unless it is named; None for weights of known kinds of layers.

    These are linear layers, convolutions, recurrent layers, attentions and experts, of torch or of any library that
    names weights as torch does.

    Args:
        name: Its qualified name.
        parameter: The parameter.
        modules: The modules that own it.

    >>> layer = nn.Linear(2, 2)
    >>> unknown_kind("0.weight", layer.weight, [layer])
    >>> unknown_kind("cls_token", layer.weight, [nn.Module()])
    'it is not the weight of a known kind of layer'
    """
    if "lora_" in name:
        return "it is a low-rank adapter"
    for module in modules:
        if isinstance(module, ParametrizationList) and not _names(module).issubset(_KEEPING_ZEROS):
            return "it is parametrized, so its zeros are not necessarily zeros of the weight"
    parts = name.split(".")
    own = parts[-2] if any(isinstance(module, ParametrizationList) for module in modules) else parts[-1]
    classes = [type(module).__name__ for module in modules]
    if holds_experts(parameter, modules) or (_WEIGHT.fullmatch(own) and not any(map(_NO_LAYER.search, classes))):
        return None
    return "it is not the weight of a known kind of layer"


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is called a norm; those of other libraries have names such as LlamaRMSNorm.

    >>> is_norm(nn.LayerNorm(2)), is_norm(nn.Linear(2, 2))
    (True, False)
    """
    return "norm" in type(module).__name__.lower()


def holds_experts(parameter: Tensor, modules: Sequence[nn.Module]) -> bool:
    """Return whether a parameter of three dimensions holds the matrices of several experts, one behind the other.

    >>> class TinyExperts(nn.Module): ...
    >>> holds_experts(nn.Parameter(nn.Linear(2, 6).weight.view(3, 2, 2)), [TinyExperts()])
    True
    """
    return parameter.ndim == 3 and any(type(module).__name__.endswith("Experts") for module in modules)


def loses_zeros(name: str, modules: Sequence[nn.Module]) -> str | None:
    """Return why a parameter must not be pruned even if it is named; None if it may be.

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    >>> loses_zeros("parametrizations.weight.original1", [layer.parametrizations.weight])
    'weight_norm divides its rows by their norms, so a row of zeros becomes NaN'
    """
    for module in modules:
        if isinstance(module, ParametrizationList):
            found = sorted(_names(module).intersection(_LOSING_ZEROS))
            if found:
                return _LOSING_ZEROS[found[0]]
        norms = [hook.name for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm)]
        if name.rpartition(".")[2] in [f"{own}_{part}" for own in norms for part in "gv"]:
            return _LOSING_ZEROS["_WeightNorm"]
    return None


def rows_are_gates(name: str, modules: Sequence[nn.Module]) -> bool:
    """Return whether the rows of a weight are gates of a recurrent layer, with several gates a neuron.

    >>> rows_are_gates("weight_ih_l0", [nn.LSTM(2, 2)]), rows_are_gates("weight_ih_l0", [nn.RNN(2, 2)])
    (True, False)
    """
    gate = name.rpartition(".")[2].startswith(("weight_ih", "weight_hh"))
    return gate and any(isinstance(module, _GATED) for module in modules)


def _names(parametrizations: ParametrizationList) -> set[str]:
    return {type(parametrization).__name__ for parametrization in parametrizations}
