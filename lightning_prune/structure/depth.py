"""Depth: takes blocks out of their containers, and tells the model how many are left and which number each has."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_prune.models.parameters import plain_name

# what configs and modules call the number of blocks; a model of two stacks has other names for that of the decoder
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth", "encoder_layers", "num_encoder_layers")
_OF_DECODER = ("decoder_layers", "num_decoder_layers")
_INDICES = ("layer_idx", "layer_id", "layer_index", "layer_number")


def remove_blocks(model: nn.Module, removed: Iterable[str], optimizers: Iterable[Optimizer] = ()) -> None:
    """Take blocks out of a model, in place, by their qualified names; those behind them move up.

    Configs of Hugging Face models are replaced by copies, since other models may share them.

    >>> model = nn.Sequential(nn.ReLU(), nn.Tanh(), nn.Sigmoid())
    >>> remove_blocks(model, ["1"])
    >>> model
    Sequential(
      (0): ReLU()
      (1): Sigmoid()
    )
    """
    modules = {plain_name(name): module for name, module in model.named_modules()}
    gone: dict[str, set[str]] = {}
    for block in removed:
        container, _, child = block.rpartition(".")
        gone.setdefault(container, set()).add(child)
    own_configs(model)
    whole = set(model.parameters())
    for container, children in gone.items():
        kept = [name not in children for name in modules[container]._modules]
        _take_out(modules[container], kept)
        for owner in _owners(container):
            _tell(modules[owner], container, kept)
    for optimizer in optimizers:
        _forget(optimizer, whole.difference(model.parameters()))


def own_configs(model: nn.Module) -> None:
    """Give a model copies of its configs, which it may have in common with other models."""
    memo: dict[int, Any] = {}  # what its modules share, they share afterwards, too
    for module in model.modules():
        if hasattr(vars(module).get("config"), "to_dict"):
            module.config = copy.deepcopy(module.config, memo)


def _take_out(container: nn.Module, kept: Sequence[bool]) -> None:
    children = container._modules
    numbered = list(children) == [str(number) for number in range(len(children))]
    left = [(name, child) for (name, child), stays in zip(children.items(), kept, strict=True) if stays]
    children.clear()
    for number, (name, child) in enumerate(left):
        children[str(number) if numbered else name] = child
        if numbered and child is not None:
            _number(child, int(name), number)


def _number(block: nn.Module, before: int, now: int) -> None:
    """Set the number that a block and its attention state, which finds their entries in a cache of keys and values."""
    for module in block.modules():
        for name in _INDICES:
            if type(found := vars(module).get(name)) is int and found == before:
                setattr(module, name, now)


def _owners(container: str) -> Iterator[str]:
    """Yield the names of the modules around a container, from the outside in, and its own.

    >>> list(_owners("model.layers"))
    ['', 'model', 'model.layers']
    """
    parts = container.split(".") if container else []
    yield from (".".join(parts[:end]) for end in range(len(parts) + 1))


def _tell(owner: nn.Module, container: str, kept: Sequence[bool]) -> None:
    """Let a module around a container, and its config, state how many blocks are left, and what holds for each."""
    config = vars(owner).get("config")
    for stating in (owner, config):
        if stating is None or isinstance(stating, dict):
            continue
        decodes = "decoder" in container and any(hasattr(stating, name) for name in _OF_DECODER)
        for name in _OF_DECODER if decodes else _DEPTHS:
            if type(found := getattr(stating, name, None)) is int and found == len(kept):
                setattr(stating, name, sum(kept))
    for name, value in list(vars(config).items()) if hasattr(config, "to_dict") else []:
        if "layer" in name and isinstance(value, list) and len(value) == len(kept):
            setattr(config, name, [item for item, stays in zip(value, kept, strict=True) if stays])


def _forget(optimizer: Optimizer, gone: set[nn.Parameter]) -> None:
    """Take parameters that a model has no longer out of its optimizer."""
    for parameter in gone:
        optimizer.state.pop(parameter, None)
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter not in gone]
