"""Files: the tensors and the pruning state of a checkpoint of any kind, loaded without running code from it."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prune.export.compressed import load_compressed
from lightning_prune.models.parameters import plain_name
from lightning_prune.tensors.packing import unpack_all
from lightning_prune.validation.values import install

_WEIGHTS = ("state_dict", "model_state_dict", "model")  # keys under which checkpoints have the weights
_COMPRESSED = "lightning_prune"  # a key in the metadata of compressed files


@dataclass(frozen=True)
class Method:
    """The state of one pruning callback in a checkpoint.

    Args:
        name: The name of its class.
        masks: Bool masks by parameter name.
        state: All of its state.
    """

    name: str
    masks: Mapping[str, Tensor]
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Args:
        kind: What kind of file it is, in words.
        tensors: The tensors by name, without the prefixes of wrappers.
        methods: The pruning callbacks in it.
        where: The epoch and the optimizer step of a Lightning checkpoint.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    methods: tuple[Method, ...] = ()
    where: Mapping[str, int] = field(default_factory=dict)

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks of all callbacks, by parameter name."""
        return {name: mask for method in self.methods for name, mask in method.masks.items()}

    def weights(self) -> dict[str, Tensor]:
        """Return the weights: floating-point tensors of two or more dimensions, tied ones once, and all with a mask.

        >>> Contents("a state_dict", {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}).weights()
        {'weight': tensor([[0., 0.],
                [0., 0.]])}
        """
        found: dict[str, Tensor] = {}
        seen: set[Any] = set()
        for name, tensor in self.tensors.items():
            place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.layout is torch.strided else name
            is_weight = tensor.is_floating_point() and tensor.ndim >= 2 and "bias" not in name.rpartition(".")[2]
            if name in self.masks or (is_weight and place not in seen):
                found[name] = tensor
                seen.add(place)
        return found

    def kept(self) -> dict[str, Tensor]:
        """Return what is kept of every weight: its mask or, without one, where it is not zero."""
        masks = self.masks
        return {name: masks.get(name, weight != 0) for name, weight in self.weights().items()}


def read(path: str) -> Contents:
    """Return what a file holds: a Lightning checkpoint, a ``state_dict``, a safetensors or a compressed file.

    Raises:
        ValueError: If it is none of these, damaged, or more than safe loading takes.
        OSError: If it cannot be read.
        ImportError: If it is a safetensors file, and safetensors is not installed.
    """
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"{path} must be a file, got a folder: name a checkpoint in it")
    if is_safetensors(file):
        return _safetensors(path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if foreign := re.search(r"Unsupported (?:global|class): (?:GLOBAL )?([\w.]+)", str(error)):
            raise ValueError(_more_than_safe(path, foreign[1])) from error
        raise ValueError(f"{path} {_RULE}, got another file or a damaged one") from error
    except (EOFError, RuntimeError, KeyError, IndexError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} {_RULE}, got another file or a damaged one") from error
    return _contents(path, saved)


_RULE = "must be a Lightning checkpoint, a state_dict, a safetensors file or a compressed one"


def _more_than_safe(path: str, name: str) -> str:
    return (
        f"{path} must load with weights_only=True, got one with an object of {name}, which could run code: if you "
        f"trust the file, load it in Python with torch.load(path, weights_only=False), and save its state_dict alone"
    )


def is_safetensors(file: Path) -> bool:
    """Return whether a file begins as safetensors files do: the size of a JSON header, and the header."""
    with file.open("rb") as opened:
        start = opened.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= file.stat().st_size - 8


def _safetensors(path: str) -> Contents:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(f"{path} needs safetensors: {install('export')}") from error
    try:
        with safe_open(path, framework="pt") as opened:
            compressed = _COMPRESSED in (opened.metadata() or {})
            tensors = {} if compressed else {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:  # of a type of its own
        raise ValueError(f"{path} {_RULE}, got a damaged safetensors file: {error}") from error
    if compressed:
        return Contents("a compressed file", load_compressed(path))
    return Contents("a safetensors file", tensors)


def _contents(path: str, saved: Any) -> Contents:
    if not isinstance(saved, Mapping):
        raise ValueError(f"{path} {_RULE}, got a file with a {type(saved).__name__}")
    key = next((key for key in _WEIGHTS if isinstance(saved.get(key), Mapping)), None)
    state = saved if key is None else saved[key]
    tensors = {plain_name(str(name)): value.detach() for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path} {_RULE}, got the entries {[str(name) for name in saved][:5]} and no weights")
    if key is None:
        return Contents("a state_dict", tensors)
    shrunk = " of a shrunk model" if "lightning_prune" in saved else ""
    is_lightning = "pytorch-lightning_version" in saved
    callbacks = saved.get("callbacks")
    methods = _methods(path, callbacks) if isinstance(callbacks, Mapping) else ()
    where = {name: saved[name] for name in ("epoch", "global_step") if isinstance(saved.get(name), int)}
    return Contents(f"a {'Lightning ' * is_lightning}checkpoint{shrunk}", tensors, methods, where)


def _methods(path: str, callbacks: Mapping[Any, Any]) -> tuple[Method, ...]:
    found = []
    for key, state in callbacks.items():
        masks = state.get("masks") if isinstance(state, Mapping) else None
        if isinstance(masks, Mapping) and masks.keys() >= {"shapes", "bits"}:
            name = str(key).partition("{")[0]
            try:
                found.append(Method(name, unpack_all(masks), state))
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} must have complete masks of {name}, got: {error}") from error
    return tuple(found)
