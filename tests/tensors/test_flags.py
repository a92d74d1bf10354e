"""Bool tensors: counted and searched at speed, with the results of PyTorch's own operations."""

import pytest
import torch

from lightning_prune.tensors.boolean import chunks, count, exceeds, places


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 127, 128, 129, 40_001])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_flags_are_counted_and_found(size: int, share: float) -> None:
    flags = torch.rand(size) < share
    assert count(flags) == int(flags.sum())
    assert torch.equal(places(flags), flags.nonzero().squeeze(1))


def test_flags_in_any_layout_are_counted() -> None:
    flags = torch.rand(64, 33) < 0.5
    assert count(flags.T) == count(flags[:, 1:]) + count(flags[:, 0]) == int(flags.sum())
    assert count(torch.ones(3, 4, dtype=torch.bool)[:, ::2]) == 6


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_mark_is_exceeded_by_what_is_greater(dtype: torch.dtype) -> None:
    ends = torch.iinfo(dtype)
    values = torch.tensor([ends.min, -1, 0, 1, ends.max], dtype=dtype)
    for mark in (ends.min, -1, 0, ends.max):
        found = exceeds(values, mark, torch.empty(5, dtype=torch.bool))
        assert found.tolist() == [value > mark for value in values.tolist()]


def test_chunks_are_all_entries_in_order() -> None:
    values = torch.arange(700_001)
    assert torch.equal(torch.cat(list(chunks(values))), values)
    assert [piece.numel() for piece in chunks(torch.empty(0))] == [0]
