"""ONNX export: writes a model once ONNX Runtime returns the same outputs as torch."""

import os
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_prune.export.shared_fan_in import GROUPS, SharedFanInLinear, part_read, time_in_onnx
from lightning_prune.export.sparse_layers import CSRLinear, replaced
from lightning_prune.models.copying import copied
from lightning_prune.models.forward import Inputs, difference, fitting, needed_example_of, run, tensors
from lightning_prune.models.preserving import eager, evaluating
from lightning_prune.validation.arguments import integer
from lightning_prune.validation.instances import instance
from lightning_prune.validation.instances import path as as_path
from lightning_prune.validation.values import install, optional, shown

_INLINE = 2**31 - 2**24  # bytes of weights: from 2 GiB on, ONNX requires a separate file

Sizes = Mapping[Tensor, Mapping[int, torch.export.Dim]]  # the dynamic axes of the example inputs


def export_onnx(
    model: nn.Module, example_inputs: Inputs, path: str | os.PathLike[str], *, batch_axis: int | None = 0
) -> None:
    """Write a model, in eval mode, to an ONNX file; pruned and shrunk models like any other.

    ONNX Runtime runs the file on the example and on a batch of another size. The file is written only if the outputs
    agree with the model's, to half of the digits of their dtype, relative to the largest value. ONNX has no product for
    compressed sparse rows (``to_fast``, ``to_sparse_csr``): such layers are written as groups of rows that read the
    same inputs, where these are few, or else as dense ones.

    Args:
        model: Any module that ``torch.export`` can trace, including a ``LightningModule``; it is left as it was.
        example_inputs: A tensor, a tuple of arguments or a dict of keyword arguments; None takes the
            ``example_input_array`` of a ``LightningModule``.
        path: The file, usually ``*.onnx``. From 2 GiB on, weights go to a separate file ``*.onnx.data``.
        batch_axis: The dynamic axis, for all inputs of the same size along it as the first one; None fixes all sizes.

    Raises:
        ValueError: If the model cannot be traced, or the file does not run or returns different outputs.
        ImportError: If onnx, onnxscript or onnxruntime is not installed.

    >>> with TemporaryDirectory() as folder:
    ...     export_onnx(nn.Linear(4, 2), torch.randn(1, 4), f"{folder}/model.onnx")
    ...     [file.name for file in Path(folder).iterdir()]
    ['model.onnx']
    """
    _check_installed()
    instance("model", model, nn.Module)
    path, batch_axis = as_path("path", path), optional(integer, "batch_axis", batch_axis)
    inputs = fitting(needed_example_of(model, example_inputs), model)
    sizes = {} if batch_axis is None else _batch(inputs, batch_axis)
    model = getattr(model, "_orig_mod", model)
    with TemporaryDirectory(dir=path.parent, prefix=path.name) as folder:
        file = Path(folder) / path.name
        _write(_without_sparse_rows(model), inputs, file, sizes)
        _verify(model, inputs, file)
        if sizes:
            _verify(model, _one_more(inputs, sizes), file)
        for part in Path(folder).iterdir():
            part.replace(path.parent / part.name)


def _check_installed() -> None:
    try:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            import_module(package)
    except ImportError as error:
        raise ImportError(f"export_onnx needs {package}: {install('export')}") from error


def _without_sparse_rows(model: nn.Module) -> nn.Module:
    layers = {name: known_to_onnx(module) for name, module in model.named_modules() if isinstance(module, CSRLinear)}
    return replaced(copied(model), layers) if layers else model


def known_to_onnx(layer: CSRLinear) -> nn.Linear | SharedFanInLinear:
    """Return a layer that computes the same: groups of rows that read few inputs, or a dense one."""
    dense = layer.dense()
    possible = [rows for rows in GROUPS if rows <= layer.out_features]
    time, rows = min(((time_in_onnx(part_read(dense.weight, rows), rows), rows) for rows in possible), default=(1.0, 0))
    return SharedFanInLinear.of(dense, rows, by_column=True) if time < 1 else dense


def _batch(inputs: Inputs, axis: int) -> Sizes:
    """Return the inputs of the same size along the axis as the first one, each with that axis."""
    if not any(True for _ in tensors(inputs)):
        raise TypeError(f"example_inputs must contain a tensor, got {shown(inputs)}")
    found = [tensor for tensor in tensors(inputs) if tensor.ndim > axis]
    if axis < 0 or not found:
        raise ValueError(
            f"batch_axis must be an axis of an example input, or None, got {axis} for {shown(inputs)} in example_inputs"
        )
    size = torch.export.Dim("batch")
    return {tensor: {axis: size} for tensor in found if tensor.shape[axis] == found[0].shape[axis]}


def _one_more(inputs: Inputs, sizes: Sizes) -> Inputs:
    """Return inputs with one more sample in the batch: the first one again."""
    grown = {
        tensor: torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis) for tensor, axes in sizes.items() for axis in axes
    }
    return tree_map_only(Tensor, lambda tensor: grown.get(tensor, tensor), inputs)


def _write(model: nn.Module, inputs: Inputs, file: Path, sizes: Sizes) -> None:
    keywords = dict(inputs) if isinstance(inputs, Mapping) else {}
    arguments = () if keywords else tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    shapes = torch.export.ShapesCollection()
    for tensor, size in sizes.items():
        shapes[tensor] = size
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    with warnings.catch_warnings(), evaluating(model), torch.random.fork_rng(devices=[]), eager():
        warnings.simplefilter("ignore")  # torch.onnx warns about its own internals
        try:
            torch.onnx.export(
                model,
                arguments,
                file,
                kwargs=keywords,
                dynamic_shapes=shapes.dynamic_shapes(model, arguments, keywords) if sizes else None,
                external_data=weights >= _INLINE,
                verbose=False,
            )
        except Exception as error:  # tracing runs the user's forward on proxies
            raise ValueError(f"the model must be one that torch.export can trace, got {error}") from error


def _verify(model: nn.Module, inputs: Inputs, file: Path) -> None:
    """Raise if a file does not run on these inputs, or returns other outputs than the model."""
    import onnxruntime

    expected = [tensor.cpu() for tensor in tensors(run(model, inputs))]
    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]
        arrays = [tensor.detach().cpu().numpy() for tensor in tensors(inputs)]
        found = [torch.from_numpy(array) for array in session.run(None, dict(zip(names, arrays, strict=True)))]
    except Exception as error:  # from the runtime, or for a dtype that it does not support
        raise ValueError(
            f"ONNX Runtime must run the exported model, also with another batch size unless batch_axis is None "
            f"(len(x) in a forward fixes the size, x.shape[0] does not), got {error!r}"
        ) from error
    apart, tolerance = difference(expected, found), max(map(_tolerance, expected))
    if not apart <= tolerance:
        raise ValueError(
            f"the exported model must return the outputs of the model, got a relative difference of {apart:.2g}, more "
            f"than {tolerance:.2g}"
        )


def _tolerance(output: Tensor) -> float:
    return max(1e-4, torch.finfo(output.dtype).eps ** 0.5) if output.is_floating_point() else 1e-4
