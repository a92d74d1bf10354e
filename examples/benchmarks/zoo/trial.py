"""One model: pruned by weights, channels and heads, and shrunk, and what came of it."""

import logging
import sys
import time
import traceback
import warnings
from copy import deepcopy
from typing import Any

import torch
from models import build
from torch import nn

from lightning_prune import Channel, Granularity, Head, prune, shrink, sparsity


def size(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def outputs(model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the floating-point outputs of a model."""
    with torch.no_grad():
        found = model(**inputs)
    values = found.values() if isinstance(found, dict) else found
    return [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]


def weights(model: nn.Module) -> bool:
    """Return whether half of the single weights are zero, to the weight."""
    masks = prune(model, 0.5)
    total = sum(mask.numel() for mask in masks.values())
    return sum(int(mask.sum()) for mask in masks.values()) == total - round(0.5 * total) and sparsity(model) > 0.0


def units(model: nn.Module, inputs: dict[str, Any], granularity: Granularity) -> dict[str, Any]:
    """Return what is left of a model after half of its units, and how far outputs of it and the masked one differ."""
    before, begin = size(model), time.perf_counter()
    masks = prune(model, 0.5, granularity=granularity, example_inputs=inputs, scope="local")
    small = shrink(model, inputs, masks=masks)
    difference = max(
        float((a - b).abs().max()) for a, b in zip(outputs(model, inputs), outputs(small, inputs), strict=True)
    )
    seconds = time.perf_counter() - begin
    return {"left": size(small) / before, "difference": difference, "seconds": seconds}


def attempt(function: Any, *arguments: Any) -> Any:
    """Return what a function returns, or its error as text."""
    try:
        return function(*arguments)
    except Exception as error:
        if "-v" in sys.argv:
            traceback.print_exc()
        return f"{type(error).__name__}: {error}"


def run(name: str, pipe: Any) -> None:
    """Try a model, and send what is known of it after every part."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    built = attempt(build, name)
    if isinstance(built, str):
        pipe.send({"built": built})
        return
    model, inputs = built
    result: dict[str, Any] = {"weights": attempt(weights, deepcopy(model))}
    pipe.send(result)
    for word, granularity in {"channels": Channel(coupled=True), "heads": Head()}.items():
        result[word] = attempt(units, deepcopy(model), inputs, granularity)
        pipe.send(result)
