"""Calibration block by block, and in rounds: what a block sees comes from pruned blocks, and nothing else changes."""

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Channel, Criterion, Entropy, Magnitude, Masks, Sensitivity, prune, sparsegpt
from lightning_prune.posttraining.calibration import forward, stages


class Block(nn.Module):
    """Takes what comes along as keywords, too, and gives more than one thing back, as transformers do."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(size, size), nn.BatchNorm1d(size)

    def forward(self, hidden: Tensor, scale: Tensor, *, shift: Tensor) -> tuple[Tensor, None]:
        return torch.relu(self.norm(self.fc(hidden)) * scale + shift), None


class Stacked(nn.Module):
    """An embedding layer, three blocks that get another scale each, and a head."""

    def __init__(self, keyword: bool = False) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(4, 6), nn.ModuleList(Block() for _ in range(3)), nn.Linear(6, 2)
        self.keyword = keyword

    def forward(self, x: Tensor) -> Tensor:
        hidden, shift = self.stem(x), x.mean()
        for number, block in enumerate(self.blocks):
            scale = torch.tensor(float(number + 1))
            if self.keyword:
                hidden = block(hidden=hidden, scale=scale, shift=shift)[0]
            else:
                hidden = block(hidden, scale, shift=shift)[0]
        return self.head(hidden)


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 4, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("keyword", [False, True])
def test_a_block_is_calibrated_behind_the_pruned_ones(keyword: bool) -> None:
    model, reference = Stacked(keyword), Stacked(keyword)
    reference.load_state_dict(model.state_dict())
    masks = prune(
        *(model, 0.5),
        criterion=Entropy("low", window=3),
        granularity=Channel(),
        targets=("*",),
        data=batches(),
        sequential="blocks",
    )
    # by hand: block after block, each through whole passes of the model, then all that is left
    expected = Masks()
    for names in (["blocks.0.*"], ["blocks.1.*"], ["blocks.2.*"], ["stem.*", "head.*"]):
        part = prune(
            reference, 0.5, criterion=Entropy("low", window=3), granularity=Channel(), targets=names, data=batches()
        )
        expected.update(part)
    assert masks.keys() == expected.keys()
    assert all(torch.equal(mask, expected[name]) for name, mask in masks.items())
    dense = Stacked(keyword)
    dense.load_state_dict(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value, reference.state_dict()[name]), name


def test_reconstruction_block_by_block_is_that_through_whole_passes() -> None:
    model = Stacked()
    reference, at_once = copy.deepcopy(model), copy.deepcopy(model)
    sparsegpt(model, 0.5, data=iter(batches()), sequential="blocks")
    for names in (["blocks.0.*"], ["blocks.1.*"], ["blocks.2.*"], ["stem.*", "head.*"]):
        sparsegpt(reference, 0.5, data=batches(), targets=names)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name])
    sparsegpt(at_once, 0.5, data=batches())
    assert torch.equal(at_once.blocks[0].fc.weight, model.blocks[0].fc.weight)
    assert not torch.equal(at_once.blocks[2].fc.weight, model.blocks[2].fc.weight)


def test_every_block_runs_twice_for_each_batch_and_once_before() -> None:
    model, passes = Stacked(), [0, 0, 0, 0]
    for number, module in enumerate([*model.blocks, model]):
        module.register_forward_hook(lambda *_, number=number: passes.__setitem__(number, passes[number] + 1))
    sparsegpt(model, 0.5, data=batches(), targets=["blocks.*"], sequential="blocks")
    assert passes == [3 + 3 + 3 + 1, 9, 9, 3]


def test_only_the_input_of_one_block_is_held() -> None:
    model = Stacked().requires_grad_(False)
    alive: list[Any] = []
    for block in model.blocks:
        block.register_forward_hook(
            lambda module, args, output: alive.append(
                torch.multiprocessing.reductions.StorageWeakRef(output[0].untyped_storage())
            )
        )
    most = 0
    for stage in stages(model.eval(), batches(), lambda batch: forward(model, batch), "blocks"):
        for output in stage.passes():
            most = max(most, sum(not ref.expired() for ref in alive))
            del output
    assert most <= 3 + 1


def test_the_order_of_stages_ends_with_the_whole_model() -> None:
    model = Stacked().eval()
    parts = [stage.part for stage in stages(model, batches(), lambda batch: forward(model, batch), "blocks")]
    assert parts == [*model.blocks, model]
    assert [stage.part for stage in stages(model, batches(), lambda batch: forward(model, batch))] == [model]


class Cached(Block):
    """Remembers what it has seen, as a cache of keys and values does."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, hidden: Tensor, scale: Tensor, *, shift: Tensor) -> tuple[Tensor, None]:
        self.seen += 1
        return super().forward(hidden * self.seen, scale, shift=shift)


class Branching(Stacked):
    """Blocks side by side."""

    def forward(self, x: Tensor) -> Tensor:
        hidden, one = self.stem(x), torch.ones(())
        return self.head(sum(block(hidden, one, shift=one)[0] for block in self.blocks))


class Twice(Stacked):
    """Blocks that run again and again."""

    def forward(self, x: Tensor) -> Tensor:
        hidden, one = self.stem(x), torch.ones(())
        for block in [*self.blocks, *self.blocks]:
            hidden = block(hidden, one, shift=one)[0]
        return self.head(hidden)


def cached() -> Stacked:
    model = Stacked()
    model.blocks[0] = Cached()
    return model


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (
            Stacked(),
            {"sequential": "layers"},
            "ModuleList or Sequential of the model, got 'layers'; there are: ['blocks']",
        ),
        (Stacked(), {"sequential": "stem"}, "ModuleList or Sequential of the model, got 'stem'; there are: ['blocks']"),
        (Branching(), {}, "each take the output of the previous one, got 'blocks', where block 1 does not"),
        (Twice(), {}, "blocks that run once a batch, got 'blocks', where block 0 ran 4 times for 2 batches"),
        (cached(), {}, "blocks that can be run again, got 'blocks', where block 0 then returns a different output"),
        (Stacked(), {"criterion": Sensitivity()}, "forwards, got Sensitivity, which needs gradients"),
        (Stacked(), {"criterion": Magnitude()}, "forwards, got Magnitude, which needs weights"),
        (Stacked(), {"rounds": 0}, "rounds must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_the_model(
    model: nn.Module, arguments: dict[str, Any], message: str
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        prune(model, 0.5, **{"criterion": Entropy(window=2), "data": batches(), "sequential": "blocks", **arguments})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# ------------------------------------------------------------------------------------------------ rounds


@pytest.mark.parametrize("criterion", [Magnitude(), Sensitivity(window=2), Entropy(window=2)], ids=str)
def test_the_last_of_several_rounds_ends_at_the_sparsity(criterion: Criterion) -> None:
    model = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 6))
    data = [(x, torch.randint(6, (5,))) for x in batches(2)]
    masks = prune(model, 0.9, criterion=criterion, data=iter(data), rounds=5)
    assert sum(int((p == 0).sum()) for p in (model[0].weight, model[2].weight)) == round(0.9 * 120)
    assert masks.sparsity == 0.9


def test_each_round_scores_what_the_last_one_has_left() -> None:
    class Rows(Criterion):
        """A weight matters as its row does, so that with every round the rows have other scores."""

        def scores(self, units: Any) -> Tensor:
            weight = units.weight()
            return weight.abs() * weight.abs().sum(1, keepdim=True)

    def run(rounds: int) -> Masks:
        torch.manual_seed(3)
        return prune(nn.Linear(20, 10), 0.8, criterion=Rows(), rounds=rounds)

    model = nn.Linear(20, 10)
    torch.manual_seed(3)
    model.reset_parameters()
    for due in (1 - 0.2**0.5, 0.8):
        prune(model, due, criterion=Rows())
    assert torch.equal(run(2)["weight"], model.weight != 0)
    assert not torch.equal(run(1)["weight"], run(2)["weight"])


def test_batches_are_taken_once_for_all_rounds() -> None:
    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        for x in batches(5):
            taken.append(1)
            yield x, torch.zeros(5, 2)

    taken: list[int] = []
    prune(nn.Linear(4, 2), 0.5, criterion=Sensitivity(window=3), data=stream(), rounds=4)
    assert len(taken) == 3
