"""Sparse layers: converted layers put out what they did, and what gains nothing is refused."""

import io
from copy import deepcopy
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from lightning_prune import NM, SharedFanIn, export_onnx, prune, to_sparse_csr, to_sparse_semi_structured
from lightning_prune.export import sparse_layers
from lightning_prune.export.sparse_layers import CSRLinear
from lightning_prune.models.forward import difference, run


def convert(model: nn.Module) -> nn.Module:
    """Convert layers that are smaller than those that gain from it, for the sake of a short test."""
    return to_sparse_csr(model, min_weights=2**18)


def net(level: float = 0.9, bias: bool = True) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(512, 520, bias), nn.ReLU(), nn.Linear(520, 512, bias), nn.Linear(512, 10))
    prune(model, level, scope="local", ignore=["3.*"])
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(512,), (1, 512), (7, 512), (0, 512), (2, 3, 512), (1, 1, 512)])
def test_sparse_rows_put_out_what_dense_ones_do(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    model = net(bias=bias).to(dtype)
    state, inputs = deepcopy(model.state_dict()), torch.randn(shape, dtype=dtype)
    fast = convert(model)
    assert [type(layer) for layer in fast] == [CSRLinear, nn.ReLU, CSRLinear, nn.Linear]
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.Linear]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for layer, before in ((fast[0], model[0]), (fast[2], model[2])):
        assert layer.values.numel() == int((before.weight != 0).sum())
    found, expected = run(fast, inputs), run(model, inputs)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert difference(expected, found) < 1e-5
    inputs.requires_grad_()
    gradients = [torch.autograd.grad(each(inputs).square().sum(), inputs)[0] for each in (model, fast)]
    assert difference(gradients[0], gradients[1]) < 1e-5


def test_sparse_rows_are_copied_saved_and_loaded_as_other_layers() -> None:
    fast, inputs = convert(net()), torch.randn(3, 512)
    file = io.BytesIO()
    torch.save(fast.state_dict(), file)
    file.seek(0)
    again = deepcopy(fast)
    with torch.no_grad():
        again[0].values.zero_()
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(run(again, inputs), run(fast, inputs))
    assert len(file.getvalue()) < 0.3 * sum(weight.nbytes for weight in net().parameters())


def test_sparse_rows_are_dense_in_an_onnx_file(tmp_path: Path) -> None:
    model = net(bias=False)
    fast, inputs = convert(model), torch.randn(3, 512)
    export_onnx(fast, inputs, tmp_path / "fast.onnx")
    assert type(fast[0]) is CSRLinear
    weights = {tuple(tensor.dims) for tensor in onnx.load(tmp_path / "fast.onnx").graph.initializer}
    assert {(520, 512), (512, 520)} <= weights | {shape[::-1] for shape in weights}


def test_sparse_rows_that_share_inputs_are_groups_in_an_onnx_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU())
    prune(model, 0.95, granularity=SharedFanIn(16))
    export_onnx(convert(model), torch.randn(3, 512), tmp_path / "fast.onnx")
    graph = onnx.load(tmp_path / "fast.onnx").graph
    assert "Gather" in {node.op_type for node in graph.node}
    assert (512, 512) not in {tuple(tensor.dims) for tensor in graph.initializer}


def test_an_onnx_file_is_compared_with_the_model_in_sparse_rows(tmp_path: Path) -> None:
    fast = convert(net())
    fast[0].register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ValueError, match="the exported model must return the outputs of the model"):
        export_onnx(fast, torch.randn(3, 512), tmp_path / "fast.onnx")
    assert not (tmp_path / "fast.onnx").exists()


def test_a_layer_in_several_places_stays_one() -> None:
    layer = nn.Linear(512, 512)
    prune(layer, 0.95)
    fast = convert(nn.ModuleDict({"a": layer, "b": nn.Sequential(layer, layer)}))
    assert fast["a"] is fast["b"][0] is fast["b"][1]
    assert type(fast["a"]) is CSRLinear
    assert type(convert(layer)) is CSRLinear


@pytest.mark.parametrize("level", [0.5, 0.89])
def test_below_the_measured_sparsity_it_says_no(level: float) -> None:
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU())
    prune(model, level)
    count = round(level * 2**20)
    with pytest.raises(ValueError, match=rf"at least 90% zeros among at least 1,048,576 .*'0 {count:,} of 1,048,576'"):
        to_sparse_csr(model)
    assert type(to_sparse_csr(model, min_sparsity=level)[0]) is CSRLinear
    prune(model, 0.9)
    assert type(to_sparse_csr(model)[0]) is CSRLinear


def test_small_layers_and_types_without_a_kernel_are_refused_and_enough_zeros_converted() -> None:
    small = nn.Linear(100, 100)
    prune(small, 0.99)
    with pytest.raises(ValueError, match=r"got .* 9,900 of 10,000"):
        to_sparse_csr(small)
    assert type(to_sparse_csr(small, min_weights=10_000)) is CSRLinear
    with pytest.raises(ValueError, match="float32 or float64"):
        convert(net().bfloat16())
    with pytest.raises(ValueError, match=r"min_sparsity must be in \[0, 1\], got 90"):
        to_sparse_csr(net(), min_sparsity=90)
    mixed = net()
    nn.init.ones_(mixed[0].weight)
    assert [type(layer) for layer in convert(mixed)] == [nn.Linear, nn.ReLU, CSRLinear, nn.Linear]


def test_layers_that_torch_reads_itself_stay_dense() -> None:
    inner = nn.TransformerEncoderLayer(512, 8, 512, batch_first=True)
    model = nn.Sequential(inner, nn.Linear(512, 512))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[1:] = 0.0
    fast = convert(model)
    assert [name for name, module in fast.named_modules() if type(module) is CSRLinear] == ["1"]
    inputs = torch.randn(2, 5, 512)
    assert difference(run(model, inputs), run(fast, inputs)) < 1e-5


# ------------------------------------------------------------------------------------------- 2:4


def half() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 64), nn.Linear(64, 10))
    prune(model, 0.5, granularity=NM(2, 4), ignore=["1.*"])
    return model.half()


def test_without_such_a_device_it_says_what_is_needed() -> None:
    with pytest.raises(ValueError, match=r"CUDA device of compute capability 8.0 or higher, got '0' on cpu"):
        to_sparse_semi_structured(half())


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_the_devices_capability_decides(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    class Weight:
        device, dtype, is_cuda = torch.device("cuda:0"), torch.float16, True

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if capability < (8, 0):
        with pytest.raises(ValueError, match=r"got 'fc' on cuda:0 with 7.5"):
            sparse_layers._check_kernels("fc", Weight())
    else:
        sparse_layers._check_kernels("fc", Weight())
        Weight.dtype = torch.float32
        with pytest.raises(ValueError, match=r"float16 or bfloat16, got torch.float32 for 'fc'"):
            sparse_layers._check_kernels("fc", Weight())


def test_layers_that_are_two_of_four_and_of_a_fitting_shape_are_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def record(weight: Tensor) -> Tensor:
        seen.append(tuple(weight.shape))
        return weight

    monkeypatch.setattr(sparse_layers, "_check_kernels", lambda name, weight: None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", record)
    model = half()
    fast = to_sparse_semi_structured(model)
    assert seen == [(64, 128)]  # the second is dense, the third has ten rows
    assert not fast[0].weight.requires_grad
    assert model[0].weight.requires_grad
    with pytest.raises(ValueError, match=r"pruned by NM\(2, 4\), got \['0 \(64, 128\)'"):
        to_sparse_semi_structured(nn.Sequential(nn.Linear(128, 64)))
