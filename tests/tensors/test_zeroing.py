"""Zeroing: what a mask prunes becomes zero, of whatever type and wherever it lies, and the rest keeps its bits."""

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.tensors.masking import by_row, zero_pruned
from lightning_prune.training.enforcement import MaskEnforcement


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_zero_pruned_in_every_type_and_layout(dtype: torch.dtype, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    values = torch.randn(2, 3, 4, 4).to(dtype).to(memory_format=layout)
    mask = torch.rand(2, 3, 4, 4) > 0.5
    expected = torch.where(mask, values, torch.zeros((), dtype=dtype))
    zero_pruned([(values, mask)])
    assert values.dtype == dtype
    assert values.is_contiguous(memory_format=layout)
    assert torch.equal(values, expected)


def test_zero_pruned_takes_several_tensors_or_none() -> None:
    a, b, c = torch.ones(3), torch.full((2, 2), -2.0), torch.ones(2, dtype=torch.float64)
    zero_pruned([(a, torch.tensor([True, False, True])), (b, torch.eye(2).bool()), (c, torch.tensor([False, True]))])
    zero_pruned([])
    assert (a.tolist(), b.tolist(), c.tolist()) == ([1.0, 0.0, 1.0], [[-2.0, 0.0], [0.0, -2.0]], [0.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_whatever_was_pruned_is_zero_and_whatever_was_not_is_itself(dtype: torch.dtype) -> None:
    values = torch.tensor([1.5, -1.5, 0.0, -0.0, float("nan"), float("inf"), -float("inf")] * 2, dtype=dtype)
    before = values.clone()
    zero_pruned([(values, torch.tensor([False] * 7 + [True] * 7))])
    assert values[:7].tolist() == [0.0] * 7
    assert not torch.signbit(values[:7]).any()
    assert torch.equal(values[7:].isnan(), before[7:].isnan())
    assert torch.equal(torch.signbit(values[7:]), torch.signbit(before[7:]))
    assert values[7:].nan_to_num().tolist() == before[7:].nan_to_num().tolist()


@pytest.mark.parametrize("size", [(1 << 20) - 1, 1 << 20, (1 << 21) + 3])
def test_more_weights_than_a_chunk_are_zeroed(size: int) -> None:
    values, mask = torch.ones(size), torch.arange(size) % 3 > 0
    zero_pruned([(values, mask)])
    assert torch.equal(values != 0, mask)


@pytest.mark.parametrize("layout", ["strided", "transposed", "mask transposed", "mask expanded"])
def test_views_are_zeroed_where_they_lie(layout: str) -> None:
    whole, mask = torch.ones(4, 6), (torch.arange(12) % 5 == 0).view(4, 3)
    values = {"strided": whole[:, ::2], "transposed": torch.ones(3, 4).T}.get(layout, whole[:, :3])
    mask = {"mask transposed": mask.T.contiguous().T, "mask expanded": mask[:1].expand(4, 3)}.get(layout, mask)
    zero_pruned([(values, mask)])
    assert torch.equal(values != 0, mask)
    assert (whole[:, 5] == 1).all()


# ------------------------------------------------------------------------------------------------ whole rows


ODD = [1.5, -1.5, -0.0, float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4, 6), (4, 1), (1, 6), (4, 6, 3, 3), (4, 0)])
def test_a_mask_of_rows_does_the_same_as_one_of_entries(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.tensor(ODD, dtype=dtype).repeat(-(-4 * 6 * 9 // len(ODD)))[: torch.Size(shape).numel()].view(shape)
    mask = (torch.arange(shape[0]) % 2 > 0).view(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()
    expected = values.clone()
    zero_pruned([(expected, mask)])
    zero_pruned([(values, by_row(mask))])
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(values.view(bits), expected.view(bits))
    assert not values[0].any()


def test_rows_of_convolutions_in_channels_last() -> None:
    weight = torch.ones(4, 3, 3, 3).to(memory_format=torch.channels_last)
    mask = torch.tensor([True, False, True, False]).view(4, 1, 1, 1).expand(4, 3, 3, 3)
    zero_pruned([(weight, by_row(mask.clone(memory_format=torch.contiguous_format)))])
    assert torch.equal(weight != 0, mask)


@pytest.mark.parametrize("place", [(0, 1), (3, 0), (3, 5)])
def test_one_entry_that_differs_makes_it_a_mask_of_entries(place: tuple[int, int]) -> None:
    mask = torch.tensor([True, False, False, True])[:, None].repeat(1, 6)
    assert by_row(mask).shape == (4, 1)
    mask[place] ^= True
    assert by_row(mask) is mask


def test_masks_of_vectors_are_left() -> None:
    mask = torch.tensor([True, True])
    assert by_row(mask) is mask


def test_holding_keeps_one_entry_a_row_and_masks_of_columns_whole() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    dead = torch.tensor([True, False, True, False])
    masks = {"0.weight": (~dead)[:, None].repeat(1, 3), "0.bias": ~dead, "1.weight": (~dead).repeat(3, 1)}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    enforcement = MaskEnforcement()
    enforcement.enforce(dict(model.named_parameters()), masks)
    assert sorted(mask.numel() for _, mask in enforcement._masked.values()) == [4, 4, 12]
    for name, parameter in model.named_parameters():
        kept: Tensor = masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter, before[name] * kept)
