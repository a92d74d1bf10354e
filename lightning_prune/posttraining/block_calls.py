"""Calls of blocks: how each block of a model is called on every batch, so that it can be run again on its own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[Any], Any]


@dataclass(frozen=True)
class Call:
    """The arguments of a call of a block, except the first one, which is passed again."""

    name: str | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, stream: Any) -> Any:
        """Call a block with that first argument, and return the first of its outputs."""
        if self.name is None:
            return _first(block(stream, *self.args, **self.kwargs))
        return _first(block(**{self.name: stream}, **self.kwargs))


class _Recorder:
    """Records how each block is called by hooks, which raise if the blocks do not feed into each other."""

    def __init__(self, sequential: str, count: int) -> None:
        self.sequential = sequential
        self.calls: list[list[Call]] = [[] for _ in range(count)]
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
        self.calls[number].append(Call(name, args[1:], rest))

    def after(self, output: Any) -> None:
        self._last = _first(output)
        if self.output is None:
            self.output = self._last


@torch.no_grad()
def record(
    blocks: list[nn.Module], batches: list[Any], run: Run, sequential: str
) -> tuple[list[Any], list[list[Call]]]:
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


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output


def _same(one: Any, other: Any) -> bool:
    return isinstance(one, Tensor) and one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-5)
