"""The ranks that tests share: each call finds them as new, and one that fails fails its caller and nobody else."""

import os
import random
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from ranks import run

pytestmark = pytest.mark.distributed


def pid() -> int:
    return os.getpid()


def number() -> tuple[int, int]:
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


@pytest.mark.parametrize("size", [1, 2])
def test_results_come_in_the_order_of_ranks_from_processes_that_stay(size: int) -> None:
    assert run(number, size) == [(rank, size) for rank in range(size)]
    assert run(pid, size) == run(pid, size)
    assert os.getpid() not in run(pid, size)


def look() -> list[Any]:
    found = [torch.rand(1).item(), random.random(), str(torch.get_default_dtype()), torch.is_grad_enabled()]
    return [*found, os.environ.get("LEFT"), str(Path.cwd())]


def disturb(folder: Path) -> list[Any]:
    found = look()
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    os.environ["LEFT"] = "behind"
    os.chdir(folder)
    warnings.simplefilter("ignore")
    return found


def test_a_task_finds_nothing_of_the_last(tmp_path: Path) -> None:
    assert run(disturb, 2, tmp_path) == run(look, 2)


def warn() -> None:
    warnings.warn("something is odd", RuntimeWarning, stacklevel=1)


def seed_of_lightning() -> str | None:
    return os.environ.get("PL_GLOBAL_SEED")


def test_new_ranks_have_no_seed_of_an_earlier_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    ranks.close()
    assert run(seed_of_lightning, 1) == [None]


def test_warnings_are_filtered_as_they_are_for_the_test() -> None:
    with pytest.raises(AssertionError, match="something is odd"):
        run(warn, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run(warn, 2) == [None, None]


def fail(how: str) -> None:
    if torch.distributed.get_rank() == 1:
        if how == "raise":
            raise ConnectionError("lost")
        if how == "die":
            os._exit(3)
        time.sleep(60)
    torch.distributed.barrier()


@pytest.mark.parametrize(
    ("how", "told"), [("raise", "ConnectionError: lost"), ("die", "ended with"), ("hang", "time.sleep|in fail")]
)
def test_a_rank_that_fails_fails_its_caller_and_is_replaced(how: str, told: str) -> None:
    before = run(pid, 2)
    with pytest.raises(AssertionError, match=told):
        run(fail, 2, how, timeout=2)
    after = run(pid, 2)
    assert not set(before) & set(after)
    assert run(number, 2) == [(0, 2), (1, 2)]
