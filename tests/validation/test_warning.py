"""Warnings name the line of the user's code, wherever in the package the reason was found."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_prune
from lightning_prune import Channel, Movement, prune, shrink, sparsegpt


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


BATCH = torch.rand(4, 4), torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prune(net(), 0.98, min_density=0.0), "hardly any signal"),
        (lambda: sparsegpt(net(), 0.98, data=[torch.rand(4, 4)]), "hardly any signal"),
        (lambda: prune(net(), 0.5, criterion=Movement(), data=[BATCH] * 40), "takes .* batches of data"),
        (lambda: shrink(net(), torch.rand(1, 4)), "nothing was removed"),
        (lambda: prune(net(), 0.5, granularity=Channel(), example_inputs=torch.rand(1, 3)), "channels are pruned"),
    ],
)
def test_a_warning_points_to_the_call(call: Callable[[], object], message: str) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        call()
    assert {warning.filename for warning in caught} == {__file__}


def test_the_package_warns_in_one_place() -> None:
    folder = Path(lightning_prune.__file__).parent
    found = [path for path in folder.rglob("*.py") if "warnings.warn(" in path.read_text()]
    assert found == [folder / "validation" / "warning.py"]
