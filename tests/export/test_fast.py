"""Fast models: every form outputs what the dense layer does, and what is fastest is saved, loaded and exported."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Channel, SharedFanIn, Weight, export_onnx, load_fast, prune, save_fast, to_fast
from lightning_prune.export import fast
from lightning_prune.export.shared_fan_in import SharedFanInConv2d, SharedFanInLinear, packed
from lightning_prune.export.sparse_layers import CSRLinear
from lightning_prune.models.forward import difference, run


def build() -> nn.Module:
    """Layers whose sizes are no multiples of the rows in a group."""
    return nn.Sequential(
        *(nn.Conv2d(3, 20, 1), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 40, 1, stride=2, bias=False)),
        *(nn.Conv2d(40, 8, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 70), nn.ReLU()),
        *(nn.Linear(70, 70, bias=False), nn.Linear(70, 3)),
    )


def pruned(dtype: torch.dtype = torch.float64, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    model = build().to(dtype).eval()
    prune(model, 0.8, scope="local", **{"granularity": SharedFanIn(16), **kwargs})
    return model


def prefer(monkeypatch: pytest.MonkeyPatch, *best: str) -> None:
    """Let these forms be the fastest, as if they had been measured."""

    def times(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        for run_once in calls.values():
            run_once()
        return {name: 1.0 if name in best else 2.0 for name in calls}

    monkeypatch.setattr(fast, "_alternate", times)


@pytest.mark.parametrize("rows", [1, 7, 16, 40, 64])
@pytest.mark.parametrize("shape", [(70,), (1, 70), (5, 70), (0, 70), (2, 3, 70), (2, 4001, 70)])
@pytest.mark.parametrize("by_column", [False, True])
def test_groups_of_rows_output_what_the_linear_layer_does(rows: int, shape: tuple[int, ...], by_column: bool) -> None:
    layer, inputs = nn.Linear(70, 40, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    prune(layer, 0.7, granularity=SharedFanIn(16))
    found, expected = SharedFanInLinear.of(layer, rows, by_column)(inputs), layer(inputs)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("by_column", [False, True])
def test_gradients_pass_through_groups_of_rows(by_column: bool) -> None:
    layer, inputs = nn.Linear(70, 40, dtype=torch.float64), torch.randn(8002, 70, dtype=torch.float64)
    prune(layer, 0.7, granularity=SharedFanIn(16))
    form = SharedFanInLinear.of(layer, 16, by_column)
    found, expected = (torch.func.grad(lambda x, m=m: m(x).square().sum())(inputs) for m in (form, layer))
    assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_groups_of_rows_output_what_the_convolution_does(stride: int, batch: int) -> None:
    layer = nn.Conv2d(30, 41, 1, stride=stride, dtype=torch.float64)
    inputs = torch.randn(batch, 30, 5, 7, dtype=torch.float64)
    prune(layer, 0.7, granularity=SharedFanIn(8))
    found, expected = SharedFanInConv2d.of(layer, 8)(inputs), layer(inputs)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-12)


def test_a_group_stores_the_inputs_that_it_reads_and_no_others() -> None:
    layer = nn.Linear(50, 48)
    prune(layer, 0.9, granularity=SharedFanIn(16))
    inputs, values = packed(layer.weight.detach(), 16)
    assert inputs.shape == (3, 5)
    assert values.shape == (3, 5, 16)
    assert values.all()
    for group, read in enumerate(inputs.long()):
        assert torch.equal(layer.weight[16 * group : 16 * group + 16, read], values[group].T)


@pytest.mark.parametrize(
    ("best", "kinds"),
    [
        (("groups of 16",), [SharedFanInConv2d, SharedFanInConv2d, SharedFanInLinear, SharedFanInLinear, nn.Linear]),
        (("groups of 8 by column",), [nn.Conv2d, nn.Conv2d, SharedFanInLinear, SharedFanInLinear, nn.Linear]),
        (("CSR",), [nn.Conv2d, nn.Conv2d, CSRLinear, CSRLinear, CSRLinear]),
    ],
)
def test_the_fastest_form_replaces_each_layer_and_the_model_stays(
    best: tuple[str, ...], kinds: list[type], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prefer(monkeypatch, *best)
    model, inputs = pruned(), torch.randn(2, 3, 9, 9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = to_fast(model, inputs)
    assert [type(found[i]) for i in (0, 3, 7, 9, 10)] == kinds
    assert type(found[4]) is nn.Conv2d
    assert difference(run(model, inputs.double()), run(found, inputs.double())) < 1e-12
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in (*table[2:-2], table[-1])] == ["0", "3", "7", "9", "10", "whole"]


def test_what_is_not_faster_stays_dense_and_a_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, "dense")
    model, inputs = pruned(), torch.randn(2, 3, 9, 9)
    with pytest.warns(UserWarning, match="no layer is faster in another form"):
        found = to_fast(model, inputs)
    assert [type(layer) for layer in found] == [type(layer) for layer in build()]


@pytest.mark.parametrize("best", ["groups of 16", "groups of 16 by column", "CSR"])
def test_a_fast_model_is_saved_and_loaded_by_its_class(
    best: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer(monkeypatch, best)
    model, inputs = pruned(torch.float32), torch.randn(2, 3, 9, 9)
    found = to_fast(model, inputs)
    save_fast(found, tmp_path / "fast.pt")
    for again in (load_fast(build, tmp_path / "fast.pt"), load_fast(model, tmp_path / "fast.pt")):
        assert [type(layer) for layer in again] == [type(layer) for layer in found]
        assert torch.equal(run(again, inputs), run(found, inputs))
        assert not again.training
    assert type(model[7]) is nn.Linear


def test_the_file_of_a_fast_model_is_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, "groups of 16")
    model = nn.Sequential(nn.Linear(512, 512))
    prune(model, 0.9, granularity=SharedFanIn(16))
    save_fast(to_fast(model, torch.randn(1, 512)), tmp_path / "fast.pt")
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    assert (tmp_path / "fast.pt").stat().st_size < 0.13 * (tmp_path / "dense.pt").stat().st_size


@pytest.mark.parametrize("damage", [b"", b"text", "dense", "other"])
def test_a_file_that_does_not_fit_is_refused(
    damage: bytes | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer(monkeypatch, "groups of 16")
    path = tmp_path / "fast.pt"
    if damage == "dense":
        torch.save(pruned().state_dict(), path)
    elif damage == "other":
        save_fast(to_fast(pruned(torch.float32), torch.randn(1, 3, 9, 9)), path)
    else:
        path.write_bytes(damage)
    with pytest.raises(ValueError, match=r"path must (be a file that save_fast wrote|fit the model)"):
        load_fast(nn.Sequential(nn.Linear(2, 2)), path)


def test_what_cannot_be_fast_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model must have a linear layer or a 1 x 1 convolution with zeros, got none"):
        to_fast(build(), torch.randn(1, 3, 9, 9))
    half = pruned().to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"float32 or float64, got torch.bfloat16 on cpu for '0'"):
        to_fast(half, torch.randn(1, 3, 9, 9))
    with pytest.raises(ValueError, match="model must have layers that to_fast converted, got a Sequential without any"):
        save_fast(build(), tmp_path / "fast.pt")
    with pytest.raises(ValueError, match="example_inputs must be given"):
        to_fast(pruned())


def test_random_outputs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Noise(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs + torch.rand_like(inputs)

    prefer(monkeypatch, "groups of 16")
    model = nn.Sequential(nn.Linear(64, 64), Noise())
    prune(model, 0.9, granularity=SharedFanIn(16))
    with pytest.raises(ValueError, match="its outputs must not be random in eval mode"):
        to_fast(model, torch.randn(4, 64))


@pytest.mark.parametrize("granularity", [Weight(), Channel(coupled=False)], ids=str)
def test_masks_of_any_granularity_are_measured(granularity: object, capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs = pruned(torch.float32, granularity=granularity), torch.randn(2, 3, 9, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = to_fast(model, inputs)
    assert difference(run(model, inputs), run(found, inputs)) < 1e-4
    assert "whole model" in capsys.readouterr().out


def test_a_shared_layer_is_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, "groups of 16")
    layer = nn.Linear(64, 64)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    prune(model, 0.9, granularity=SharedFanIn(16))
    found = to_fast(model, torch.randn(4, 64))
    assert found[0] is found[2]
    assert isinstance(found[0], SharedFanInLinear)


@pytest.mark.parametrize("best", ["groups of 16", "groups of 16 by column"])
def test_a_fast_model_is_exported_with_any_batch_size(best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, best)
    model, inputs = pruned(torch.float32), torch.randn(2, 3, 9, 9)
    found = to_fast(model, inputs)
    program = torch.export.export(found, (inputs,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    more = torch.randn(5, 3, 9, 9)
    assert difference(run(model, more), program.module()(more)) < 1e-4


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64), (2, 2, 3, 64)])
@pytest.mark.parametrize("by_column", [False, True])
def test_onnx_runtime_selects_whole_rows(by_column: bool, shape: tuple[int, ...], tmp_path: Path) -> None:
    layer = nn.Linear(64, 40)
    prune(layer, 0.8, granularity=SharedFanIn(16))
    found = exported(SharedFanInLinear.of(layer, 16, by_column), torch.randn(shape), tmp_path)
    assert axes_of_gathers(found) == {-2}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "rows", "sparsity", "groups"),
    [
        ((64, 48), 16, 0.9, 3),
        ((64, 24), 16, 0.9, 3),  # of 8 rows, since the second group of 16 would have 8 too many
        ((80, 41), 16, 0.9, 3),  # of which 7 outputs are left out
        ((80, 41), 8, 0.9, 6),
        ((64, 48), 16, 0.5, 1),  # dense, since to select half of the inputs takes longer
        ((16, 48), 16, 0.9, 1),  # as well: 8 channels are kept together
    ],
)
def test_onnx_runtime_runs_groups_of_channels_as_one_convolution(
    shape: tuple[int, int], rows: int, sparsity: float, groups: int, bias: bool, tmp_path: Path
) -> None:
    layer = nn.Conv2d(*shape, 1, stride=2, bias=bias)
    prune(layer, sparsity, granularity=SharedFanIn(rows), targets=["weight"])
    found = exported(SharedFanInConv2d.of(layer, rows), torch.randn(2, shape[0], 5, 7), tmp_path)
    [convolution] = [node for node in found if node.op_type == "Conv"]
    assert {attribute.name: attribute for attribute in convolution.attribute}["group"].i == groups
    assert sum(node.op_type == "Gather" for node in found) == int(groups > 1)


def test_onnx_runtime_has_no_convolution_in_float64_but_runs_groups_of_channels(tmp_path: Path) -> None:
    layer = nn.Conv2d(64, 41, 1, stride=2, dtype=torch.float64)
    prune(layer, 0.9, granularity=SharedFanIn(16))
    found = exported(SharedFanInConv2d.of(layer, 16), torch.randn(2, 64, 5, 7, dtype=torch.float64), tmp_path)
    assert "Conv" not in {node.op_type for node in found}


def test_onnx_runtime_merges_groups_of_channels_with_the_norm_and_the_activation(tmp_path: Path) -> None:
    layer, norm = nn.Conv2d(64, 48, 1, bias=False), nn.BatchNorm2d(48)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    prune(layer, 0.9, granularity=SharedFanIn(16))
    exported(nn.Sequential(SharedFanInConv2d.of(layer, 16), norm, nn.ReLU6()), torch.randn(2, 64, 5, 7), tmp_path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "merged.onnx"), 3
    onnxruntime.InferenceSession(tmp_path / "layer.onnx", options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "merged.onnx").graph.node]
    assert kinds.count("Conv") + kinds.count("FusedConv") == 1
    assert set(kinds) <= {"Gather", "Conv", "FusedConv", "ReorderInput", "ReorderOutput"}


def exported(layer: nn.Module, inputs: Tensor, folder: Path) -> list[onnx.NodeProto]:
    """Return the nodes of an exported layer; the export has compared its outputs."""
    export_onnx(layer, inputs, folder / "layer.onnx", batch_axis=0 if len(inputs) > 1 else None)
    return list(onnx.load(folder / "layer.onnx").graph.node)


def axes_of_gathers(nodes: list[onnx.NodeProto]) -> set[int]:
    found = {attribute.i for node in nodes if node.op_type == "Gather" for attribute in node.attribute}
    return found - {0}  # of shapes


def test_a_traced_layer_takes_any_number_of_samples() -> None:
    layer = nn.Linear(64, 64)
    prune(layer, 0.8, granularity=SharedFanIn(16))
    found, inputs = SharedFanInLinear.of(layer, 16, by_column=False), torch.randn(9000, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        traced = torch.jit.trace(found, inputs[:6000])
    assert torch.allclose(traced(inputs), layer(inputs), atol=1e-5)


@pytest.mark.parametrize("by_column", [False, True])
def test_groups_of_rows_compile_as_one_graph(by_column: bool) -> None:
    layer = nn.Linear(70, 40)
    prune(layer, 0.7, granularity=SharedFanIn(16))
    compiled = torch.compile(SharedFanInLinear.of(layer, 16, by_column), backend="eager", fullgraph=True)
    for samples in (3, 9000):
        inputs = torch.randn(samples, 70)
        assert torch.allclose(compiled(inputs), layer(inputs), atol=1e-5)
