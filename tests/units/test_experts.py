"""Experts, also transposed: N:M runs along the inputs, and what needs output channels leaves them out."""

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import (
    FPGM,
    NM,
    Block,
    Channel,
    Entropy,
    Granularity,
    InputChannel,
    Magnitude,
    Wanda,
    Weight,
    prune,
)
from lightning_prune.updates import decision

HIDDEN, WIDTH = 8, 12


class TinyExperts(nn.Module):
    """Four experts, in the layout of transformers 5, as Mixtral has them or transposed as in Llama 4."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        shapes = (4, 2 * WIDTH, HIDDEN), (4, HIDDEN, WIDTH)
        self.transposed = transposed
        first, second = (torch.randn(shape).mT.contiguous() if transposed else torch.randn(shape) for shape in shapes)
        self.gate_up_proj, self.down_proj = nn.Parameter(first), nn.Parameter(second)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.gate_up_proj, self.down_proj
        first, second = (first, second) if self.transposed else (first.mT, second.mT)
        gate, up = (x @ first).chunk(2, -1)
        return ((torch.relu(gate) * up) @ second).mean(0)


class Model(nn.Module):
    def __init__(self, transposed: bool = False, says_so: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.experts = nn.Linear(HIDDEN, HIDDEN), TinyExperts(transposed)
        if says_so:
            self.experts.is_transposed = transposed  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.stem(x))


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("says_so", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_n_of_m_runs_along_the_inputs_of_each_expert(
    transposed: bool, says_so: bool, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(decision, "HELD", 0)
    model = Model(transposed, says_so)
    dense = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    masks = prune(model, 0.5, granularity=NM(2, 4))
    assert {"experts.gate_up_proj", "experts.down_proj"} < masks.keys()
    for name, mask in masks.items():
        along = (lambda t: t.mT) if transposed and name.startswith("experts") else (lambda t: t)
        groups, weights = along(mask).unflatten(-1, (-1, 4)), along(dense[name]).unflatten(-1, (-1, 4)).abs()
        assert (groups.sum(-1) == 2).all(), name
        assert (weights.masked_fill(~groups, torch.inf).amin(-1) >= weights.masked_fill(groups, 0.0).amax(-1)).all()


@pytest.mark.parametrize("granularity", [Channel(), Channel(coupled=False), InputChannel(), Block(2, 2)], ids=str)
def test_what_needs_output_channels_leaves_experts_out(granularity: Granularity) -> None:
    assert prune(Model(), 0.5, granularity=granularity, scope="local").keys() <= {"stem.weight", "stem.bias"}
    with pytest.raises(
        ValueError, match=r"got none: \['experts.gate_up_proj', .*holds the matrices of several experts"
    ):
        prune(Model(), 0.5, granularity=granularity, targets=["experts.*"])


@pytest.mark.parametrize("criterion", [FPGM(), Entropy(window=1), Wanda()], ids=str)
def test_a_criterion_of_channels_or_inputs_leaves_experts_out(criterion: Magnitude) -> None:
    data = None if criterion.needs == "weights" else [torch.randn(5, HIDDEN)]
    with pytest.warns(UserWarning, match="prune leaves out what .* cannot score: experts.gate_up_proj: "):
        masks = prune(Model(), 0.5, criterion=criterion, data=data, scope="local")
    assert masks.keys() == {"stem.weight"}


def test_single_weights_of_experts_are_pruned() -> None:
    model = Model()
    masks = prune(model, 0.5, granularity=Weight(), scope="local")
    assert {name: int((~mask).sum()) for name, mask in masks.items()} == {
        name: parameter.numel() // 2 for name, parameter in model.named_parameters() if parameter.ndim > 1
    }
