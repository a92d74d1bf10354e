"""Calibration: runs a model over batches of data, as a whole or block by block, and leaves it as it was."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.models.forward import convert, device_of, feed, inputs_of
from lightning_prune.models.preserving import cacheless, evaluating, keeping_gradients, keeping_values
from lightning_prune.validation.values import shown

Run = Callable[[Any], Any]

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
    with torch.no_grad():
        return feed(model, inputs)


@dataclass(frozen=True)
class Stage:
    """A part of a model that is calibrated and then pruned in one go.

    Args:
        part: The part: a block, or the whole model.
        passes: Runs the part over the data and yields once a batch.
    """

    part: nn.Module
    passes: Callable[[], Iterator[Any]]


def stages(model: nn.Module, batches: Iterable[Any], run: Run, sequential: str | None = None) -> Iterator[Stage]:
    """Yield the parts of a model in the order in which to prune them; the last one is the whole model.

    With ``sequential`` every block is a stage, and its inputs are the outputs of the previous blocks as pruned by then.
    Only these inputs and the blocks' other arguments are held in memory.

    Args:
        model: The model, in eval mode.
        batches: The data.
        run: Runs the model on a batch.
        sequential: Name of the container whose blocks run one after another.

    Raises:
        ValueError: If there is no such container, or its blocks do not feed into each other.
    """
    if sequential is not None:
        batches = list(batches)
        yield from _blocks(blocks_of(model, sequential), batches, run, sequential)
    yield Stage(model, lambda: (run(batch) for batch in batches))


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


@dataclass(frozen=True)
class _Call:
    """The arguments of a call of a block, except the first one, which is passed again."""

    name: str | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @torch.no_grad()
    def __call__(self, block: nn.Module, stream: Any) -> Any:
        if self.name is None:
            return _first(block(stream, *self.args, **self.kwargs))
        return _first(block(**{self.name: stream}, **self.kwargs))


class _Recorder:
    """Records how each block is called by hooks, which raise if the blocks do not feed into each other."""

    def __init__(self, sequential: str, count: int) -> None:
        self.sequential = sequential
        self.calls: list[list[_Call]] = [[] for _ in range(count)]
        self.inputs: list[Any] = []  # of the first block
        self.output: Any = None  # of the first block, for the first batch
        self._last: Any = None

    def before(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = None if args else next(iter(kwargs), None)
        stream = args[0] if args else kwargs.get(name or "")
        rest = {key: value for key, value in kwargs.items() if key != name}
        if number == 0:
            self.inputs.append(stream)
        elif not (isinstance(stream, Tensor) and isinstance(self._last, Tensor) and stream.equal(self._last)):
            raise ValueError(
                f"sequential must name blocks that each take the output of the previous one, got "
                f"{self.sequential!r}, where block {number} does not"
            )
        self.calls[number].append(_Call(name, args[1:], rest))

    def after(self, output: Any) -> None:
        self._last = _first(output)
        if self.output is None:
            self.output = self._last


def _record(
    blocks: list[nn.Module], batches: list[Any], run: Run, sequential: str
) -> tuple[list[Any], list[list[_Call]]]:
    """Return the inputs of the first block, one a batch, and the calls of each block, one a batch."""
    recorder = _Recorder(sequential, len(blocks))
    handles = []
    for number, block in enumerate(blocks):
        handles.append(
            block.register_forward_pre_hook(
                lambda _, args, kwargs, number=number: recorder.before(number, args, kwargs), with_kwargs=True
            )
        )
        handles.append(block.register_forward_hook(lambda _, args, output: recorder.after(output)))
    try:
        for batch in batches:
            run(batch)
    finally:
        for handle in handles:
            handle.remove()
    for number, calls in enumerate(recorder.calls):
        if len(calls) != len(batches):
            raise ValueError(
                f"sequential must name blocks that run once a batch, got {sequential!r}, where block {number} ran "
                f"{len(calls)} times for {len(batches)} batches"
            )
    if blocks and batches and not _same(recorder.calls[0][0](blocks[0], recorder.inputs[0]), recorder.output):
        raise ValueError(
            f"sequential must name blocks that can be run again, got {sequential!r}, where block 0 then returns a "
            f"different output: disable its state, such as a key-value cache (config.use_cache = False)"
        )
    return recorder.inputs, recorder.calls


def _blocks(blocks: list[nn.Module], batches: list[Any], run: Run, sequential: str) -> Iterator[Stage]:
    streams, recorded = _record(blocks, batches, run, sequential)
    for block, calls in zip(blocks, recorded, strict=True):
        yield Stage(block, partial(_outputs, block, calls, streams))
        for number, output in enumerate(_outputs(block, calls, streams)):
            streams[number] = output
        calls.clear()


def _outputs(block: nn.Module, calls: list[_Call], streams: list[Any]) -> Iterator[Any]:
    return (call(block, stream) for call, stream in zip(calls, streams, strict=True))


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output


def _same(one: Any, other: Any) -> bool:
    return isinstance(one, Tensor) and one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-5)
