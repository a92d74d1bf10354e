"""Small parameters: biases and norms, which are few, and other parameters by name."""

from collections.abc import Sequence

from torch import nn

from lightning_prune.models.layer_kinds import is_norm
from lightning_prune.models.parameters import named_parameters
from lightning_prune.models.patterns import check_match, matches

KINDS = ("bias", "norm")


def of_kind_or_name(model: nn.Module, argument: str, wanted: Sequence[str]) -> list[str]:
    """Return the names of all biases for "bias", of all parameters of norms for "norm", and those that patterns match.

    Args:
        model: The model.
        argument: What the patterns are called in an error.
        wanted: Kinds, and globs (or "re:" and a regular expression) on parameter names.

    Raises:
        ValueError: If a pattern matches nothing.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    >>> of_kind_or_name(model, "train", ["norm", "2.*"])
    ['1.weight', '1.bias', '2.weight', '2.bias']
    """
    parameters = named_parameters(model)
    patterns = [entry for entry in wanted if entry not in KINDS]
    check_match(argument, patterns, list(parameters))
    modules = [module for module in model.modules() if "norm" in wanted and is_norm(module)]
    norms = {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}
    return [
        name
        for name, parameter in parameters.items()
        if id(parameter) in norms
        or ("bias" in wanted and "bias" in name.rpartition(".")[2])
        or any(matches(pattern, [name]) for pattern in patterns)
    ]
