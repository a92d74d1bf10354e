"""One model: pruned by weights, channels, heads and FLOPs, and shrunk, beside Torch-Pruning; and what came of it."""

import logging
import signal
import sys
import time
import traceback
import warnings
from copy import deepcopy
from importlib.util import find_spec
from typing import Any

import torch
from models import build
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune import Channel, Granularity, Head, prune, shrink, sparsity
from lightning_prune.models.flops import dense_flops
from lightning_prune.models.forward import call

LIMIT = 120  # seconds of processor time for a part, whatever else the machine does


class OverLimit(BaseException):
    """A part has used up its time; no ``Exception``, which what it interrupts may catch."""


def size(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Return the floating-point outputs of a model."""
    found = call(model, deepcopy(inputs))
    leaves = tree_leaves(dict(found) if isinstance(found, dict) else found)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def difference(one: nn.Module, other: nn.Module, inputs: Any) -> float:
    """Return by how much the outputs of two models differ at most, relative to the largest."""
    pairs = list(zip(outputs(one, inputs), outputs(other, inputs), strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    found = [float((a - b).abs().max()) / max(1e-300, float(a.abs().max())) for a, b in pairs if a.numel()]
    return max(found, default=float("inf"))


def weights(model: nn.Module) -> bool:
    """Return whether half of the single weights are zero, to the weight."""
    masks = prune(model, 0.5)
    total = sum(mask.numel() for mask in masks.values())
    return sum(int(mask.sum()) for mask in masks.values()) == total - round(0.5 * total) and sparsity(model) > 0.0


def units(model: nn.Module, inputs: Any, granularity: Granularity, of: Any = "units") -> dict[str, Any]:
    """Return what is left of a model after half of its units, or 20 % of its FLOPs, and how far its outputs are off."""
    before, begin = size(model), time.process_time()
    flops = sum(dense_flops(model, inputs).values()) if of == "flops" else 0
    masks = prune(model, 0.2 if flops else 0.5, granularity=granularity, example_inputs=inputs, of=of)
    small = shrink(model, inputs, masks=masks)
    seconds = time.process_time() - begin
    found = {"left": size(small) / before, "difference": difference(model, small, inputs), "seconds": seconds}
    return {**found, "flops": sum(dense_flops(small, inputs).values()) / flops} if flops else found


def peer(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Return what Torch-Pruning's own pruner leaves of the channels, with the layer of the classes left out."""
    import torch_pruning

    shapes = [x.shape for x in outputs(model, inputs)]
    before, begin = size(model), time.process_time()
    classes = {shape[1] for shape in shapes if len(shape) > 1} | {shape[-1] for shape in shapes}
    ignored = [
        layer
        for layer in model.modules()
        if (isinstance(layer, nn.Linear) and layer.out_features in classes)
        or (isinstance(layer, nn.Conv2d) and layer.out_channels in classes)
    ]
    importance = torch_pruning.importance.MagnitudeImportance(p=2)
    given = inputs if isinstance(inputs, dict) else tuple(inputs)
    pruner = torch_pruning.pruner.BasePruner(
        model, given, importance=importance, pruning_ratio=0.5, ignored_layers=ignored[-1:]
    )
    pruner.step()
    seconds = time.process_time() - begin
    outputs(model, inputs)
    return {"left": size(model) / before, "seconds": seconds}


def attempt(function: Any, *arguments: Any) -> Any:
    """Return what a function returns, or its error as text; where the system can tell, within the limit."""
    limited = hasattr(signal, "setitimer")
    try:
        if limited:
            signal.setitimer(signal.ITIMER_PROF, LIMIT, 1)  # again each second, where that was in a finalizer
        try:
            return function(*arguments)
        finally:  # inside, as the limit may pass once more before the timer is off
            if limited:
                signal.setitimer(signal.ITIMER_PROF, 0)
    except (Exception, OverLimit) as error:
        if "-v" in sys.argv:
            traceback.print_exc()
        return f"{type(error).__name__}: {error}"


def stop(*_: Any) -> None:
    """End the part that has used up its time."""
    raise OverLimit(f"over {LIMIT} s")


def run(zoo: str, name: str, pipe: Any) -> None:
    """Try a model, and send what is known of it after every part."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if hasattr(signal, "SIGPROF"):
        signal.signal(signal.SIGPROF, stop)
    built = attempt(build, zoo, name)
    if isinstance(built, str):
        pipe.send({"built": built})
        return
    model, inputs = built
    parts: dict[str, Any] = {
        "weights": (weights, ()),
        "channels": (units, (inputs, Channel(coupled=True))),
        "heads": (units, (inputs, Head())),
        "flops": (units, (inputs, Channel(coupled=True), "flops")),
    }
    if find_spec("torch_pruning") is not None:
        parts["peer"] = (peer, (inputs,))
    result: dict[str, Any] = {"parameters": size(model)}
    for word, (function, arguments) in parts.items():
        result[word] = attempt(function, deepcopy(model), *deepcopy(arguments))
        pipe.send(result)
