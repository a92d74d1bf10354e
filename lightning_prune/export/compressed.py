"""Compressed files: a bitmask and the nonzero values of each tensor, in a safetensors container."""

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.models.kept_norms import check_weights_suffice
from lightning_prune.models.parameters import plain_name
from lightning_prune.tensors.masking import INTEGERS
from lightning_prune.tensors.packing import pack, unpack
from lightning_prune.validation.instances import path as as_path
from lightning_prune.validation.values import install, shown

VALUES, MASK = ".compressed", ".bitmask"  # suffixes of a tensor's name in the file
_INDEX = "lightning_prune"  # a key in the file's metadata
_CHECKSUM = "lightning_prune.crc32"  # a key: the checksum of the index and of all tensors; older files have none
_HALVES = {torch.complex128: torch.float64, torch.complex32: torch.float16}  # dtypes that safetensors lacks
_INTEGRAL = {
    *(torch.bool, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
}


def save_compressed(model_or_state: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write a state to a file in which a zero takes one bit, and any other value one bit more than its size.

    Tensors with too few zeros to gain from this are written as they are, tied ones once. Zero means that no bit is set,
    so minus zero and NaN are restored exactly. An existing file is replaced atomically.

    Args:
        model_or_state: A module or its ``state_dict``: dense tensors by name, of any dtype, on any device.
        path: The file, usually ``*.safetensors``.

    Raises:
        ValueError: If an entry is not a plain dense tensor, names clash, or the model has to be shrunk first.
        ImportError: If safetensors is not installed.

    Reference: a mask and values is what compressed-tensors by Neural Magic calls "sparse-bitmask".

    >>> with TemporaryDirectory() as folder:
    ...     save_compressed({"weight": torch.tensor([[0.0, 1.5], [0.0, -2.0]])}, f"{folder}/model.safetensors")
    ...     load_compressed(f"{folder}/model.safetensors")
    {'weight': tensor([[ 0.0000,  1.5000],
            [ 0.0000, -2.0000]])}
    """
    save_file = _safetensors().torch.save_file
    if not isinstance(model_or_state, nn.Module | Mapping):
        raise TypeError(f"model_or_state must be a module or a state_dict, got {shown(model_or_state)}")
    path = as_path("path", path)
    if isinstance(model_or_state, nn.Module):
        check_weights_suffice(model_or_state)
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    index: dict[str, dict[str, Any]] = {}  # by name: empty if stored as it is, or how it is compressed, or its alias
    stored: dict[str, Tensor] = {}
    first: dict[Any, str] = {}
    for name, tensor in {plain_name(str(name)): tensor for name, tensor in state.items()}.items():
        _check(name, tensor)
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj())
        if first.setdefault(place, name) != name:
            index[name] = {"alias": first[place]}
            continue
        parts, index[name] = _compress(name, tensor.detach().cpu().resolve_conj().resolve_neg())
        if clash := stored.keys() & parts.keys():
            raise ValueError(f"names must be unique after appending {VALUES} or {MASK}, got {clash.pop()!r} twice")
        stored |= parts
    serialized = json.dumps(index)
    checksum = _checksum(serialized, ((name, stored[name]) for parts in _parts(index).values() for name in parts))
    with TemporaryDirectory(dir=path.parent, prefix=path.name) as folder:
        complete = Path(folder) / path.name
        save_file(stored, complete, {"format": "pt", _INDEX: serialized, _CHECKSUM: checksum})
        complete.replace(path)


def load_compressed(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the state that ``save_compressed`` wrote, bit for bit, for ``load_state_dict``.

    The file is memory-mapped. Tensors are contiguous and on the CPU; tied ones are one tensor with more than one name.

    Args:
        path: The file.

    Raises:
        ValueError: If the file is of another kind, or damaged.
        FileNotFoundError: If there is no such file.
        ImportError: If safetensors is not installed.
    """
    safe_open = _safetensors().safe_open
    if not as_path("path", path).is_file():
        raise FileNotFoundError(f"path must be a file that save_compressed wrote, got {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            return _read(file)
    except Exception as error:  # from the container, its metadata or a mask
        raise ValueError(f"path must be a file that save_compressed wrote, got {str(path)!r}: {error!r}") from error


def _read(file: Any) -> dict[str, Tensor]:
    """Return the state in an open file; each tensor is read once."""
    serialized = file.metadata()[_INDEX]
    index = json.loads(serialized)
    state: dict[str, Tensor] = {}

    def parts() -> Iterator[tuple[str, Tensor]]:
        for name, names in _parts(index).items():
            found = [file.get_tensor(part) for part in names]
            yield from zip(names, found, strict=True)
            state[name] = _expand(*found, **index[name]) if index[name] else found[0]

    checksum = _checksum(serialized, parts())
    if file.metadata().get(_CHECKSUM, checksum) != checksum:
        raise ValueError("its content does not match its checksum")
    return {name: state[entry.get("alias", name)] for name, entry in index.items()}


def _parts(index: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Return the names of the stored parts of each tensor that is not an alias."""
    own = {name: entry for name, entry in index.items() if "alias" not in entry}
    return {name: (name + VALUES, name + MASK) if entry else (name,) for name, entry in own.items()}


def _checksum(index: str, parts: Iterable[tuple[str, Tensor]]) -> str:
    """Return the checksum of a serialized index and its parts, including their names, dtypes and shapes."""
    found = zlib.crc32(index.encode())
    for name, tensor in parts:
        found = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), found)
        found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"compressed files need safetensors: {install('export')}") from error
    return safetensors


def _check(name: str, tensor: Any) -> None:
    kind = type(tensor).__name__
    if isinstance(tensor, Tensor):
        known = tensor.is_floating_point() or tensor.is_complex() or tensor.dtype in _INTEGRAL
        if type(tensor.data) is Tensor and tensor.layout == torch.strided and known and not tensor.is_meta:
            return
        kind += f" of {tensor.dtype}, {tensor.layout} on {tensor.device}"
    raise ValueError(f"model_or_state must contain plain dense tensors by name, got {kind} for {name!r}")


def _compress(name: str, tensor: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the stored parts of a tensor by name, and its entry in the index."""
    flat = tensor.reshape(-1)
    words = _words(flat)
    kept = words.ne(0).any(1)
    if flat.dtype not in _HALVES and kept.sum() * flat.itemsize + -(-len(flat) // 8) >= flat.nbytes:
        return {name: tensor.clone(memory_format=torch.contiguous_format)}, {}  # safetensors rejects shared memory
    values = words[kept].view(-1).view(_HALVES.get(flat.dtype, flat.dtype))
    how = {"dtype": str(flat.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    return {name + VALUES: values, name + MASK: pack(kept)["bits"]}, how


def _expand(values: Tensor, bits: Tensor, dtype: str, shape: list[int]) -> Tensor:
    """Return the tensor with these values where the mask is set."""
    kept = unpack({"shape": [torch.Size(shape).numel()], "bits": bits})
    values = _words(values.view(getattr(torch, dtype)))
    if len(values) != kept.sum():  # a single value would be broadcast
        raise ValueError(f"a mask must have a bit set for each value, got {int(kept.sum())} for {len(values)}")
    if values.eq(0).all(1).any():  # detects some damage in files without a checksum
        raise ValueError("the values must be nonzero, got a zero")
    words = values.new_zeros(len(kept), values.shape[1])
    words[kept] = values
    return words.view(-1).view(getattr(torch, dtype)).view(shape)


def _words(flat: Tensor) -> Tensor:
    """Return the bits of a one-dimensional tensor as integers, a row an element."""
    size = min(flat.itemsize, 8)
    return flat.view(INTEGERS[size]).view(len(flat), flat.itemsize // size)
