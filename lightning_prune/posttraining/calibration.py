"""Calibration: runs a model over batches of data, as a whole or block by block, and leaves it as it was."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.models.forward import convert, device_of, feed, inputs_of
from lightning_prune.models.preserving import cacheless, evaluating, keeping_gradients, keeping_values
from lightning_prune.posttraining.block_calls import Call, Run, record
from lightning_prune.validation.values import shown

# anything else may be an input of the model
_NOT_INPUTS = (type(None), int, float, str, bytes, set, type, nn.Module)


@contextmanager
def undisturbed(model: nn.Module, batch_statistics: bool = False) -> Iterator[None]:
    """Put a model in eval mode, and restore its modes and gradients and the random state on exit.

    Args:
        model: Any module.
        batch_statistics: Whether batch norms run in training mode; their buffers are restored as well.
    """
    cuda = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    norms = batch_norms(model) if batch_statistics else []
    kept = keeping_values(buffer for norm in norms for buffer in norm.buffers())
    with evaluating(model, norms), cacheless(model), keeping_gradients(model), kept, torch.random.fork_rng(list(cuda)):
        yield


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms of a model.

    >>> [type(norm).__name__ for norm in batch_norms(nn.Sequential(nn.BatchNorm1d(2), nn.LayerNorm(2)))]
    ['BatchNorm1d']
    """
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def take(data: Iterable[Any] | None, count: int | None, model: nn.Module) -> Iterable[Any]:
    """Return the first ``count`` batches of the data, lazily, on the device of the model; None takes all.

    >>> list(take([1, 2, 3], 2, nn.Linear(1, 1)))
    [1, 2]
    """
    device = device_of(model)
    return (convert(batch, device) for batch in islice(data, count)) if data is not None and count != 0 else ()


def forward(model: nn.Module, batch: Any) -> Any:
    """Run a model on the inputs of a batch: its first item if it is a list or tuple, otherwise the batch itself.

    Inputs that are a mapping, as tokenizers return them, are the keyword arguments of the model.
    """
    inputs = inputs_of(batch)
    if isinstance(inputs, _NOT_INPUTS) or type(inputs).__module__ == "numpy":
        raise TypeError(f"batches of data, samples or a loader must contain tensors, got {shown(inputs)}")
    return feed(model, inputs)


@dataclass(frozen=True)
class Stage:
    """A part of a model that is calibrated and then pruned in one go.

    Args:
        part: The part: a block, or the whole model.
        passes: Runs the part over the data, without gradients, and yields its output once a batch.
        runs: Functions that return the output of the part for one batch each, with gradients where these are enabled.
        dense: What the part of the dense model outputs for each batch, behind the dense parts before it.
    """

    part: nn.Module
    passes: Callable[[], Iterator[Any]]
    runs: Sequence[Callable[[], Any]] = ()
    dense: Sequence[Any] = ()


def stages(
    model: nn.Module,
    batches: Iterable[Any],
    run: Run,
    sequential: str | None = None,
    fitted: Collection[nn.Parameter] = (),
) -> Iterator[Stage]:
    """Yield the parts of a model in the order in which to prune them; the last one is the whole model.

    With ``sequential`` every block is a stage, and its inputs are the outputs of the previous blocks as pruned by then.
    Only these inputs, the blocks' other arguments and, if parameters are to be fitted, the outputs of one dense block
    are held in memory; those of the dense model, too, if one of them lies outside of the blocks.

    Args:
        model: The model, in eval mode.
        batches: The data.
        run: Runs the model on a batch.
        sequential: Name of the container whose blocks run one after another.
        fitted: Parameters that are to be fitted to the outputs of the dense model.

    Raises:
        ValueError: If there is no such container, or its blocks do not feed into each other.
    """
    blocks = [] if sequential is None else blocks_of(model, sequential)
    batches = batches if sequential is None and not fitted else list(batches)
    runs = [partial(_outputs_of, model, run, batch) for batch in batches] if fitted else []
    inside = {parameter for block in blocks for parameter in block.parameters()}
    dense = [torch.no_grad()(again)() for again in runs] if any(found not in inside for found in fitted) else []
    if sequential is not None:
        yield from _blocks(blocks, list(batches), run, sequential, bool(fitted))
    quiet = torch.no_grad()(run)
    yield Stage(model, lambda: (quiet(batch) for batch in batches), runs, dense)


def _outputs_of(model: nn.Module, run: Run, batch: Any) -> list[Any]:
    """Return what a model outputs, at every call, while it is run on a batch."""
    found: list[Any] = []
    handle = model.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        run(batch)
    finally:
        handle.remove()
    return found


def blocks_of(model: nn.Module, sequential: str) -> list[nn.Module]:
    """Return the blocks in the container of that name.

    Raises:
        ValueError: If there is no such container.

    >>> blocks_of(nn.Sequential(nn.Sequential(nn.ReLU()), nn.ReLU()), "0")
    [ReLU()]
    """
    containers = {
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential) and name
    }
    if sequential not in containers:
        raise ValueError(
            f"sequential must name a ModuleList or Sequential of the model, got {sequential!r}; "
            f"there are: {sorted(containers)[:5]}"
        )
    return list(model.get_submodule(sequential).children())


def _blocks(blocks: list[nn.Module], batches: list[Any], run: Run, sequential: str, fitted: bool) -> Iterator[Stage]:
    streams, recorded = record(blocks, batches, run, sequential)
    dense = list(streams) if fitted else []
    for block, calls in zip(blocks, recorded, strict=True):
        if fitted:  # while the block is as it was
            _advance(block, calls, dense)
        runs = [partial(call, block, stream) for call, stream in zip(calls, streams, strict=True)] if fitted else []
        yield Stage(block, partial(_outputs, block, calls, streams), runs, dense)
        runs.clear()  # which hold the inputs
        _advance(block, calls, streams)
        calls.clear()


def _advance(block: nn.Module, calls: list[Call], streams: list[Any]) -> None:
    """Replace the inputs of a block by its outputs, one after another."""
    for number, output in enumerate(_outputs(block, calls, streams)):
        streams[number] = output


def _outputs(block: nn.Module, calls: list[Call], streams: list[Any]) -> Iterator[Any]:
    return (torch.no_grad()(call)(block, stream) for call, stream in zip(calls, streams, strict=True))
