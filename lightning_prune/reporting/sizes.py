"""Sizes: what a model costs in parameters, bytes and FLOPs, as it is and with its zeros left out."""

from torch import nn

from lightning_prune.models import summary as report
from lightning_prune.models.flops import dense_flops, sparse_flops
from lightning_prune.models.forward import example_of
from lightning_prune.models.parameters import named_parameters


def sizes(model: nn.Module) -> dict[str, float]:
    """Return the numbers of parameters, bytes and FLOPs of a model; with sharded parameters all ranks must call it.

    FLOPs are those of its ``example_input_array``, if it has one.

    >>> sizes(nn.Linear(4, 2, bias=False))
    {'parameters': 8, 'active_parameters': 8, 'bytes': 32, 'packed_bytes': 33.0}
    """
    parameters = named_parameters(model)
    kept = {name: parameter.numel() - report.zeros(parameter) for name, parameter in parameters.items()}
    found: dict[str, float] = {
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "active_parameters": sum(kept.values()),
        "bytes": sum(parameter.numel() * parameter.element_size() for parameter in parameters.values()),
        "packed_bytes": sum(kept[name] * p.element_size() + p.numel() / 8 for name, p in parameters.items()),
    }
    example = example_of(model, None)
    if example is not None:
        dense = dense_flops(model, example)
        found["flops"] = sum(dense.values())
        found["active_flops"] = sparse_flops(dense, {n: kept[n] / parameters[n].numel() for n in dense if n})
    return found
