"""Files of fast models: the state, and which layers have which form, so that the original class loads it."""

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_prune.export.shared_fan_in import SharedFanInConv2d, SharedFanInLinear
from lightning_prune.export.sparse_layers import CSRLinear, replaced
from lightning_prune.models.building import built, check_builds
from lightning_prune.models.copying import copied
from lightning_prune.models.kept_norms import check_weights_suffice
from lightning_prune.validation.instances import instance
from lightning_prune.validation.instances import path as as_path
from lightning_prune.validation.values import shown

Model = TypeVar("Model", bound=nn.Module)

KEY = "lightning_prune.fast"  # of a file: the class and the arguments of each layer that is not dense, by name
_KINDS: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in (SharedFanInLinear, SharedFanInConv2d, CSRLinear)}
_ARGUMENTS = ("in_features", "out_features", "out_channels", "stride", "by_column")


def save_fast(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a model that ``to_fast`` made: its state, with values and indices only, and the forms of its layers.

    Args:
        model: The model.
        path: The file.

    Raises:
        ValueError: If no layer of the model has another form than the dense one, or it has to be shrunk first.
    """
    check_weights_suffice(instance("model", model, nn.Module))
    layers = {
        name: (type(module).__name__, {key: vars(module)[key] for key in _ARGUMENTS if key in vars(module)})
        for name, module in model.named_modules()
        if type(module) in _KINDS.values()
    }
    if not layers:
        raise ValueError(f"model must have layers that to_fast converted, got a {type(model).__name__} without any")
    torch.save({"state_dict": model.state_dict(), KEY: layers}, as_path("path", path))


def load_fast(model: Model | Callable[..., Model], path: str | os.PathLike[str], **kwargs: Any) -> Model:
    """Return a model that ``save_fast`` saved, in eval mode: no pickled class, and nothing is measured again.

    Args:
        model: The class of the model, or a function that builds it dense, or such a model, which is left as it was.
        path: The file.
        kwargs: Arguments of the class.

    Raises:
        ValueError: If the file is of another kind, or does not fit the model.

    >>> from tempfile import TemporaryDirectory
    >>> from lightning_prune.export.sparse_layers import to_sparse_csr
    >>> def build():
    ...     return nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    >>> sparse = to_sparse_csr(build().requires_grad_(False), min_sparsity=0.0, min_weights=0)
    >>> with TemporaryDirectory() as folder:
    ...     save_fast(sparse, f"{folder}/fast.pt")
    ...     type(load_fast(build, f"{folder}/fast.pt")[0]).__name__
    'CSRLinear'
    """
    check_builds(model)
    state, layers = _read(path)
    dense = built(model, **kwargs)
    try:
        fast = replaced(copied(dense), {name: _layer(name, *form, state) for name, form in layers.items()})
        fast.load_state_dict(state)
    except Exception as error:  # torch and the user's hooks raise errors of any type
        raise ValueError(f"path must fit the model, got {str(path)!r} for {shown(dense)}: {error}") from error
    return fast.eval().requires_grad_(False)


def _layer(name: str, kind: str, arguments: dict[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """Return a layer with the tensors that a state has for it."""
    prefix = f"{name}." if name else ""
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if kind == "CSRLinear":
        layer = CSRLinear(nn.Linear(arguments["in_features"], arguments["out_features"], dtype=own["values"].dtype))
        for key, value in own.items():
            layer.register_buffer(key, value)
        return layer
    return _KINDS[kind](own["inputs"], own["values"], own.get("bias"), **arguments)


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, tuple[str, dict[str, Any]]]]:
    file = as_path("path", path)
    if not file.is_file():
        raise FileNotFoundError(f"path must be a file that save_fast wrote, got {str(path)!r}")
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        return saved["state_dict"], saved[KEY]
    except Exception as error:  # torch raises errors of many types for files of another kind
        raise ValueError(f"path must be a file that save_fast wrote, got {str(path)!r}: {error!r}") from error
