"""Quantization: a pruned model goes through torchao and ONNX Runtime, and its zeros stay zeros."""

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import fit
from modes import ADAM, Probe, Regression, assert_pruned
from torch import Tensor, nn

from lightning_prune import Channel, Entropy, Pruning, Sensitivity, prune, sparsity, summary

GRADUAL: dict[str, Any] = {"schedule": "linear", "start": 0, "end": 10, "frequency": 2}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))


def pruned() -> nn.Sequential:
    """A model with 70 % zeros and weights of several sizes."""
    model = net()
    with torch.no_grad():
        model[2].weight.mul_(3)
    prune(model, 0.7, scope="local")
    return model


def zeros_stay(found: Tensor, weight: Tensor) -> bool:
    """Whether every zero of the weight is a zero of what it was quantized to, and most of the rest is not."""
    kept = weight != 0
    return not found[~kept].any() and float((found[kept] != 0).float().mean()) > 0.9


@pytest.fixture
def torchao() -> Any:
    logging.getLogger("torchao").setLevel(logging.CRITICAL)  # of the kernels that this machine has no use for
    return pytest.importorskip("torchao.quantization")


@pytest.mark.parametrize("scheme", ["weights", "dynamic", "asymmetric"])
def test_zeros_stay_zeros_in_torchao(torchao: Any, scheme: str) -> None:
    model, inputs = pruned(), torch.randn(64, 6)
    config = {
        "weights": torchao.Int8WeightOnlyConfig,
        "dynamic": torchao.Int8DynamicActivationInt8WeightConfig,
        "asymmetric": lambda: torchao.IntxWeightOnlyConfig(
            torch.int8, torchao.PerAxis(0), mapping_type=torchao.MappingType.ASYMMETRIC
        ),
    }[scheme]()
    quantized = copy.deepcopy(model)
    torchao.quantize_(quantized, config)
    for found, layer in zip(quantized[::2], model[::2], strict=True):
        assert type(found.weight) is not nn.Parameter
        assert zeros_stay(found.weight.dequantize(), layer.weight)
    torch.testing.assert_close(quantized(inputs), model(inputs), rtol=0.1, atol=0.1)
    assert 0.69 < sparsity(quantized) < 0.75  # a small weight may be rounded to zero
    assert [row.name for row in summary(quantized).rows] == ["0.weight", "2.weight", "4.weight"]


AXES: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "entropy": {"criterion": Entropy("low", window=2), "granularity": Channel(), "ignore": ("net.4.*",)},
    "sensitivity": {"criterion": Sensitivity(window=2), "granularity": Channel(), "ignore": ("net.4.*",)},
}


def with_fake_quantizers() -> Regression:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    model = Regression(net(), optimizer=ADAM)
    activations = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int8, "per_channel")
    quantize_(model, QATConfig(activation_config=activations, weight_config=weights, step="prepare"))
    return model


@pytest.mark.parametrize("kind", AXES)
def test_pruning_and_quantization_aware_training_go_together(torchao: Any, kind: str) -> None:
    from torchao.quantization.qat import FakeQuantizedLinear, QATConfig

    model = with_fake_quantizers()
    callback = Pruning(0.5, **AXES[kind], **GRADUAL)
    seen: list[bool] = []
    fake = model.net[0].weight_fake_quantizer
    fake.register_forward_hook(lambda module, inputs, output: seen.append(zeros_stay(output, inputs[0])))
    with Probe(model, callback) as probe:
        fit(model, callback)
    probe.assert_sparse()
    assert_pruned(model, callback)
    assert all(isinstance(layer, FakeQuantizedLinear) for layer in model.net[::2])
    assert len(seen) > 12
    assert all(seen), "the fake quantizer has put out weights where zeros are"

    torchao.quantize_(model, QATConfig(step="convert"))
    assert [type(layer) for layer in model.net[::2]] == [nn.Linear] * 3
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
    parameters = dict(model.named_parameters())
    for name, mask in callback.masks.items():
        if mask.ndim == 2:
            assert zeros_stay(parameters[name].dequantize(), weights[name])
            assert not parameters[name].dequantize()[~mask].any()


def test_fake_quantizers_may_come_after_pruning(torchao: Any) -> None:
    from lightning_prune import ConstantSparsity

    model = with_fake_quantizers()
    prune(model, 0.5)
    fit(model, ConstantSparsity())
    assert sparsity(model) == 0.5


# ------------------------------------------------------------------------------------------- ONNX Runtime


def exported(model: nn.Module, path: Path) -> Path:
    pytest.importorskip("onnxscript")
    batch = {"input": {0: torch.export.Dim("batch")}}
    arguments: dict[str, Any] = {"dynamic_shapes": batch, "external_data": False, "verbose": False}
    torch.onnx.export(model.eval(), (torch.randn(4, 6),), path, input_names=["x"], output_names=["y"], **arguments)
    return path


def batches(data: Tensor) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Batches(CalibrationDataReader):
        def __init__(self) -> None:
            self.left: Iterator[Tensor] = iter(data.split(16))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            return None if batch is None else {"x": batch.numpy()}

    return Batches()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*lower_symbol.*")
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zeros_in_static_quantization(symmetric: bool, per_channel: bool, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static

    model, data = pruned(), torch.randn(128, 6)
    plain, target = exported(model, tmp_path / "plain.onnx"), tmp_path / "int8.onnx"
    quantize_static(
        plain,
        target,
        batches(data),
        per_channel=per_channel,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
    )
    arrays = {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(target).graph.initializer}
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            found, scale, zero = (
                torch.tensor(arrays[f"{name}_{part}"]).float() for part in ("quantized", "scale", "zero_point")
            )
            assert bool(zero.any()) is not symmetric
            column = (-1, 1) if per_channel else ()
            assert zeros_stay((found - zero.view(column)) * scale.view(column), weight)
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": data.numpy()})
    expected = model(data).detach()
    assert (torch.tensor(found) - expected).abs().mean() < 0.1 * expected.std()
