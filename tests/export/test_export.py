"""Export: what ONNX Runtime, torch.export and the sparse layers compute is what the model computes."""

import sys
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
from architectures import CASES, build
from models import MLP, fit
from test_shrink import kill
from torch import Tensor, nn

from lightning_prune import MagnitudePruning, export_onnx, shrink
from lightning_prune.export import onnx as export
from lightning_prune.models.forward import difference, run, tensors
from lightning_prune.structure.tracing import trace


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def outputs(path: Path, *inputs: Tensor) -> list[Tensor]:
    runner = session(path)
    names = [entry.name for entry in runner.get_inputs()]
    found = runner.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
    return [torch.from_numpy(np.asarray(array)) for array in found]


@pytest.mark.parametrize("name", ["resnet_basic", "gpt"])
def test_a_shrunk_model_goes_to_onnx_and_torch_export_with_any_batch(name: str, tmp_path: Path) -> None:
    model, inputs = build(CASES[name])
    kill(model, trace(model, inputs))
    small = shrink(model, inputs)
    state = deepcopy(small.state_dict())
    export_onnx(small, inputs, tmp_path / "small.onnx")
    if name == "gpt":  # that a file is smaller, for one of the two
        export_onnx(model, inputs, tmp_path / "dense.onnx")
        assert (tmp_path / "small.onnx").stat().st_size < (tmp_path / "dense.onnx").stat().st_size - 2000
    assert small.training
    assert all(torch.equal(tensor, state[key]) for key, tensor in small.state_dict().items())
    program = torch.export.export(
        deepcopy(small).eval(), (inputs,), dynamic_shapes=({0: torch.export.Dim("batch")},)
    ).module()
    for count in (1, 2, 5):
        batch = torch.cat([inputs] * count)[:count]
        expected = run(model, batch)
        assert difference(expected, outputs(tmp_path / "small.onnx", batch)) < 1e-4
        assert difference(expected, program(batch)) < 1e-4


class Pair(NamedTuple):
    mean: Tensor
    rest: list[Tensor]


class Many(nn.Module):
    """Inputs of every kind, some optional, one without a batch; outputs in a nest."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, places: Tensor, *, more: dict[str, Tensor] | None = None, scale: float = 2.0) -> Any:
        out = self.layer(x) * scale + places
        return Pair(out.mean(1), [out, out.argmax(1)]) if more is None else {"out": out + more["a"]}


def test_arguments_by_position_and_by_name_in_any_order(tmp_path: Path) -> None:
    model, x, places = Many(), torch.randn(4, 3), torch.randn(3)
    export_onnx(model, (x, places), tmp_path / "a.onnx")
    expected = list(tensors(run(model, (x[:2], places))))
    assert len(expected) == 3
    assert difference(expected, outputs(tmp_path / "a.onnx", x[:2], places)) < 1e-5
    named = {"more": {"a": torch.randn(4, 3)}, "places": places, "x": x}
    export_onnx(model, named, tmp_path / "b.onnx")
    entries = {entry.name: entry.shape for entry in session(tmp_path / "b.onnx").get_inputs()}
    assert entries == {"more_a": ["batch", 3], "places": [3], "x": ["batch", 3]}
    found = outputs(tmp_path / "b.onnx", named["more"]["a"], places, x)
    assert difference(run(model, named), found) < 1e-5


def test_a_pruned_lightning_module_is_exported_by_its_own_example(tmp_path: Path) -> None:
    model = MLP()
    fit(model, MagnitudePruning(0.8, start=0, end=3))
    with pytest.raises(
        ValueError, match="example_inputs must be given unless a LightningModule has an example_input_array"
    ):
        export_onnx(model, None, tmp_path / "a.onnx")
    model.example_input_array = torch.randn(1, 6)
    export_onnx(torch.compile(model, backend="eager"), None, tmp_path / "a.onnx")
    inputs = torch.randn(7, 6)
    assert difference(run(model, inputs), outputs(tmp_path / "a.onnx", inputs)) < 1e-5
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.onnx"]


def test_sizes_may_be_fixed_and_types_other_than_float32(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    for dtype in (torch.float64, torch.float16):  # twice, over the older file
        inputs = torch.randn(2, 4, dtype=dtype)
        export_onnx(model.to(dtype), inputs, tmp_path / "a.onnx", batch_axis=None)
        assert session(tmp_path / "a.onnx").get_inputs()[0].shape == [2, 4]
        (found,) = outputs(tmp_path / "a.onnx", inputs)
        assert found.dtype == dtype
        assert difference(run(model, inputs), found) < 1e-2
    export_onnx(nn.LSTM(3, 4), torch.randn(5, 2, 3), tmp_path / "a.onnx", batch_axis=1)
    assert session(tmp_path / "a.onnx").get_inputs()[0].shape == [5, "batch", 3]


def test_large_weights_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_INLINE", 1000)
    model, inputs = nn.Linear(64, 64), torch.randn(2, 64)
    export_onnx(model, inputs, tmp_path / "a.onnx")
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.onnx", "a.onnx.data"}
    assert difference(run(model, inputs), outputs(tmp_path / "a.onnx", inputs)) < 1e-5


class Lists(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2.0 if x.sum().item() > 0 else x * x.numpy().max()


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(1, 2).expand(len(x), -1)


class Drawn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Lists(), "the model must be one that torch.export can trace"),
        (Fixed(), r"also with another batch size unless .* fixes the size.* Got: 4 Expected: 3"),
        (Drawn(), "must return the outputs of the model, got a relative difference of"),
        (nn.Linear(2, 2, dtype=torch.bfloat16), r"ONNX Runtime must run the exported model, .*NOT_IMPLEMENTED"),
    ],
    ids=["data", "batch", "random", "type"],
)
def test_what_cannot_be_exported_is_told_and_the_old_file_stays(model: nn.Module, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_text("old")
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        export_onnx(model, torch.ones(3, 2, dtype=dtype), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("axis", [-1, 2])
def test_the_batch_axis_has_to_be_one(axis: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"batch_axis must be an axis of an example input, or None, got {axis}"):
        export_onnx(nn.Linear(2, 2), torch.ones(3, 2), tmp_path / "a.onnx", batch_axis=axis)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_without_a_package_the_extra_is_named(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs {package}: pip install '\.\[export\]' in the repository"):
        export_onnx(nn.Linear(2, 2), torch.ones(3, 2), tmp_path / "a.onnx")
