"""Compressed files: what is loaded has the bits of what was saved, in an eighth of the room."""

import json
import random
import struct
import sys
from pathlib import Path

import pytest
import torch
from models import MLP, fit
from torch import Tensor, nn

from lightning_prune import MagnitudePruning, load_compressed, prune, save_compressed, sparsity

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64]
EIGHTS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8]
OTHERS = [torch.complex32, torch.bool]


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_same(state: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name


def round_trip(state: "dict[str, Tensor] | nn.Module", folder: Path) -> dict[str, Tensor]:
    save_compressed(state, folder / "model.safetensors")
    return load_compressed(folder / "model.safetensors")


def random_bits(dtype: torch.dtype, kept: float, count: int = 1001) -> Tensor:
    """Every pattern of bits may occur: infinities, NaN with payloads, denormals; not kept ones have no bit set."""
    values = torch.randint(256, (count, dtype.itemsize), dtype=torch.uint8)
    if dtype is torch.bool:
        values = values % 2
    return (values * (torch.rand(count, 1) < kept)).view(-1).view(dtype)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.95, 1.0])
@pytest.mark.parametrize("dtype", [*FLOATS, *EIGHTS, *INTEGERS, *OTHERS], ids=str)
def test_any_bits_of_any_type_come_back(dtype: torch.dtype, kept: float, tmp_path: Path) -> None:
    state = {"flat": random_bits(dtype, kept), "square": random_bits(dtype, kept, 36).view(6, 6)}
    assert_same(state, round_trip(state, tmp_path))


def test_minus_zero_and_the_payload_of_nan_come_back(tmp_path: Path) -> None:
    weight = torch.zeros(64)
    weight[3] = -0.0
    weight.view(torch.int32)[5] = 0x7FC01234
    weight.view(torch.int32)[6] = -1
    weight[7] = 1e-45
    found = round_trip({"weight": weight}, tmp_path)["weight"].view(torch.int32)
    assert found.nonzero().flatten().tolist() == [3, 5, 6, 7]
    assert found[[3, 5, 6, 7]].tolist() == [-(1 << 31), 0x7FC01234, -1, 1]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(0.0),
        torch.tensor(3.0),
        torch.tensor(0),
        torch.zeros(0),
        torch.zeros(2, 0, 3),
        torch.eye(12)[::2, 1::3],
        torch.eye(12).t(),
        torch.eye(4).expand(3, 4, 4),
        torch.eye(24).view(4, 6, 6, 4).to(memory_format=torch.channels_last),
        torch.eye(5, dtype=torch.complex64).conj(),
        torch.tensor([1 + 2j]).conj().imag,
        nn.Parameter(torch.eye(5)),
    ],
    ids=["0", "3", "int", "empty", "empty3", "strided", "transposed", "expanded", "last", "conj", "neg", "parameter"],
)
def test_any_shape_and_any_strides_come_back(tensor: Tensor, tmp_path: Path) -> None:
    found = round_trip({"a": tensor}, tmp_path)["a"]
    assert torch.equal(found, tensor)
    assert found.dtype == tensor.dtype
    assert found.is_contiguous()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
        self.head.weight = self.words.weight
        self.norm = nn.BatchNorm1d(32)
        self.register_buffer("upper", self.words.weight.data[:32])  # a part of a tensor that is stored itself
        self.register_buffer("turned", self.words.weight.data.t())


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    model = Tied()
    prune(model, 0.9, targets=["words.*"])
    found = round_trip(model, tmp_path)
    assert_same(dict(model.state_dict()), found)
    assert found["head.weight"] is found["words.weight"]
    assert found["turned"].data_ptr() != found["words.weight"].data_ptr()
    again = Tied()
    again.load_state_dict(found)
    assert torch.equal(again.head.weight, model.words.weight)
    once = (tmp_path / "model.safetensors").stat().st_size
    untied = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    round_trip(untied, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size > once + 64 * 32 // 8


@pytest.mark.parametrize(("level", "most"), [(0.9, 0.16), (0.5, 0.56), (0.0, 1.01)])
def test_the_file_is_as_small_as_its_zeros_allow(level: float, most: float, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.BatchNorm1d(256), nn.Linear(256, 64))
    prune(model, level)
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    assert_same(dict(model.state_dict()), round_trip(model, tmp_path))
    dense = sum(tensor.nbytes for tensor in model.state_dict().values())
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size <= most * dense < most * (tmp_path / "dense.pt").stat().st_size


def test_a_pruned_lightning_module_goes_to_a_file_and_back(tmp_path: Path) -> None:
    model = MLP()
    fit(model, MagnitudePruning(0.8, start=0, end=3))
    again = MLP(seed=1)
    compiled = torch.compile(model, backend="eager")
    for saved in (model, model.state_dict(), compiled):
        again.load_state_dict(round_trip(saved, tmp_path))
        assert sparsity(again) == sparsity(model)
        assert_same(dict(model.state_dict()), dict(again.state_dict()))


def test_the_file_is_mapped_and_never_written_to(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    state = {"dense": torch.randn(100, 100), "sparse": torch.eye(100)}
    found = round_trip(state, tmp_path)
    before = path.read_bytes()
    if sys.platform == "linux":
        assert str(path) in Path("/proc/self/maps").read_text()
    found["dense"].zero_()
    found["sparse"].zero_()
    assert path.read_bytes() == before
    found = load_compressed(path)
    save_compressed({"dense": torch.ones(3)}, path)  # in the place of what is still mapped
    assert_same(state, found)
    assert list(load_compressed(path)) == ["dense"]
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_other_tools_can_read_the_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    round_trip({"bias": torch.ones(3), "weight": torch.eye(8)}, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == {"bias", "weight.bitmask", "weight.compressed"}
    assert stored["weight.compressed"].tolist() == [1.0] * 8
    assert stored["weight.bitmask"].tolist() == [128, 64, 32, 16, 8, 4, 2, 1]


REFUSED = {
    "object": ({"extra": {"epoch": 3}}, "got dict for 'extra'"),
    "sparse": (
        {"weight": torch.eye(3).to_sparse()},
        "got Tensor of torch.float32, torch.sparse_coo on cpu for 'weight'",
    ),
    "meta": (
        {"weight": torch.empty(3, device="meta")},
        "got Tensor of torch.float32, torch.strided on meta for 'weight'",
    ),
    "bits": (
        {"weight": torch.zeros(2, dtype=torch.uint8).view(torch.bits8)},
        "got Tensor of torch.bits8, torch.strided on cpu",
    ),
    "names": ({"a": torch.eye(9), "a.bitmask": torch.ones(2)}, "got 'a.bitmask' twice"),
}


@pytest.mark.parametrize(("state", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_saved_is_named_and_the_old_file_stays(
    state: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_compressed({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=message):
        save_compressed(state, path)
    assert_same({"a": torch.ones(1)}, load_compressed(path))


def damaged(content: bytes, kind: str) -> bytes:
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    if kind == "cut":
        return content[:-3]
    if kind == "text":
        return b"not a model"
    if kind == "mask":  # one value more is said to be kept; bits come before floats, which have to be aligned
        begin = 8 + size + header["weight.bitmask"]["data_offsets"][0]
        return content[:begin] + b"\xff" + content[begin + 1 :]
    if kind == "index":
        header["__metadata__"] = {"format": "pt"}
    if kind == "shape":
        header["__metadata__"]["lightning_prune"] = header["__metadata__"]["lightning_prune"].replace("8, 8", "9, 9")
    changed = json.dumps(header).encode()
    return struct.pack("<Q", len(changed)) + changed + content[8 + size :]


@pytest.mark.parametrize("kind", ["cut", "text", "mask", "index", "shape"])
def test_a_damaged_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    weight = torch.zeros(8, 8)
    weight[3, 4] = 1.0  # one value only: it must not be spread over the places of a wrong mask
    save_compressed({"weight": weight}, path)
    path.write_bytes(damaged(path.read_bytes(), kind))
    with pytest.raises(ValueError, match=r"path must be a file that save_compressed wrote, got .*model\.safetensors"):
        load_compressed(path)


def test_no_damaged_byte_gives_other_weights_in_silence(tmp_path: Path) -> None:
    path, chance, refused = tmp_path / "model.safetensors", random.Random(0), 0
    weight = torch.randn(16, 8) * (torch.rand(16, 8) > 0.7)
    state = {
        "a.weight": weight,
        "a.bias": torch.randn(16),
        "b.weight": weight,
        "c": torch.arange(6.0, dtype=torch.bfloat16),
    }
    save_compressed(state, path)
    content = path.read_bytes()
    for _ in range(400):
        at = chance.randrange(len(content))
        path.write_bytes(
            content[:at]
            + bytes([chance.choice([content[at] ^ 1 << chance.randrange(8), chance.randrange(256)])])
            + content[at + 1 :]
        )
        try:
            loaded = load_compressed(path)
        except ValueError:
            refused += 1
        else:
            assert_same(state, loaded)
    assert refused > 300


def test_a_file_without_a_checksum_is_loaded(tmp_path: Path) -> None:
    path, weight = tmp_path / "model.safetensors", torch.zeros(8, 8)
    weight[3, 4] = 1.5
    save_compressed({"weight": weight}, path)
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    del header["__metadata__"]["lightning_prune.crc32"]
    changed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + size :])
    assert_same({"weight": weight}, load_compressed(path))
    path.write_bytes(path.read_bytes().replace(struct.pack("<f", 1.5), struct.pack("<f", 0.0)))
    with pytest.raises(ValueError, match="the values must be nonzero"):
        load_compressed(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"got .*nowhere\.safetensors"):
        load_compressed(tmp_path / "nowhere.safetensors")


def test_without_safetensors_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: save_compressed({}, tmp_path / "a"), lambda: load_compressed(tmp_path / "a")):
        with pytest.raises(ImportError, match=r"pip install '.\[export\]'"):
            call()
