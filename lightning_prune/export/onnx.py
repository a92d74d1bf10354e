"""Export: writes a model as ONNX once ONNX Runtime puts out for it what torch does."""

import os
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_prune.models.forward import Inputs, difference, fitting, needed_example_of, run, tensors
from lightning_prune.models.preserving import eager, evaluating
from lightning_prune.validation.arguments import integer
from lightning_prune.validation.instances import instance
from lightning_prune.validation.instances import path as as_path
from lightning_prune.validation.values import optional, shown

_INLINE = 2**31 - 2**24  # bytes of weights: from 2 GiB on, ONNX wants them in a file beside

Sizes = Mapping[Tensor, Mapping[int, torch.export.Dim]]  # of the example inputs: axes that may have any size


def export_onnx(
    model: nn.Module, example_inputs: Inputs, path: str | os.PathLike[str], *, batch_axis: int | None = 0
) -> None:
    """Write a model, in eval mode, as an ONNX file; pruned and shrunk models as any other.

    The file is run by ONNX Runtime, on the example and on a batch of another size, and is put in its place only if it
    puts out what the model does, to half of the digits of their type, relative to the largest.

    Args:
        model: Any module that ``torch.export`` can trace, a ``LightningModule`` too; it is left as it was.
        example_inputs: A tensor, a tuple of arguments or a dict of keyword arguments; None takes the
            ``example_input_array`` of a ``LightningModule``.
        path: The file, by custom ``*.onnx``. From 2 GiB on, weights go to ``*.onnx.data`` beside it.
        batch_axis: Along it, tensors that have there the size of the first one may have any size; None fixes all sizes.

    Raises:
        ValueError: If the model cannot be traced, or the file does not run or puts out something else.
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
        _write(model, inputs, file, sizes)
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
        raise ImportError(f"export_onnx needs {package}: pip install 'lightning-prune[export]'") from error


def _batch(inputs: Inputs, axis: int) -> Sizes:
    """Return the tensors that have the size of the first one along an axis, each with that axis."""
    if not any(True for _ in tensors(inputs)):
        raise TypeError(f"example_inputs must hold a tensor, got {shown(inputs)}")
    found = [tensor for tensor in tensors(inputs) if tensor.ndim > axis]
    if axis < 0 or not found:
        raise ValueError(
            f"batch_axis must be an axis of an example input, or None, got {axis} for {shown(inputs)} in example_inputs"
        )
    size = torch.export.Dim("batch")
    return {tensor: {axis: size} for tensor in found if tensor.shape[axis] == found[0].shape[axis]}


def _one_more(inputs: Inputs, sizes: Sizes) -> Inputs:
    """Return inputs whose batch is longer by one: the first of it once more."""
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
        warnings.simplefilter("ignore")  # of torch.onnx about its own parts
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
        except Exception as error:  # it runs the user's forward on stand-ins
            raise ValueError(f"the model must be one that torch.export can trace, got {error}") from error


def _verify(model: nn.Module, inputs: Inputs, file: Path) -> None:
    """Refuse a file that does not run on these inputs, or puts out something else than the model."""
    import onnxruntime

    expected = [tensor.cpu() for tensor in tensors(run(model, inputs))]
    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]
        arrays = [tensor.detach().cpu().numpy() for tensor in tensors(inputs)]
        found = [torch.from_numpy(array) for array in session.run(None, dict(zip(names, arrays, strict=True)))]
    except Exception as error:  # of the runtime, or a type that it does not know
        raise ValueError(
            f"ONNX Runtime must run the exported model, with a batch of another size too unless batch_axis is None "
            f"(len(x) in a forward fixes the size, x.shape[0] does not), got {error!r}"
        ) from error
    apart, most = difference(expected, found), max(map(_tolerance, expected))
    if not apart <= most:
        raise ValueError(
            f"the exported model must put out what the model does, got a relative difference of {apart:.2g}, more than "
            f"{most:.2g}"
        )


def _tolerance(output: Tensor) -> float:
    return max(1e-4, torch.finfo(output.dtype).eps ** 0.5) if output.is_floating_point() else 1e-4
