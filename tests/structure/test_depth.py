"""Blocks are taken out of models of every make, which stay of their class and give the outputs of the masked one."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import Bottleneck, ResNet
from models import Deep, Residual, fit
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_prune import Channel, Head, Layer, Pruning, Random, load_shrunk, prune, save_shrunk, shrink
from lightning_prune.models.flops import dense_flops
from lightning_prune.models.forward import difference, run
from lightning_prune.models.parameters import find
from lightning_prune.structure.blocks import find_blocks
from lightning_prune.structure.cut_record import CutRecord, cut_record_of
from lightning_prune.structure.depth import remove_blocks
from lightning_prune.structure.surgery import cut

IMAGES, TOKENS = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8)


class Stacks(nn.Module):
    """Two stacks in stages of a class of their own, the blocks of the second one called by name."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Stage(2), Stage(3)])
        self.named = nn.Sequential()
        for number in range(3):
            self.named.add_module(f"block_{number}", Residual(8, 2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(self.named(x))


class Stage(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual(8, 2) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class PostNorm(Residual):
    """A layer of a transformer as of 2017: the norms act on the sums."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x + self.attention(x))
        return self.second(x + self.down(nn.functional.gelu(self.up(x))))


class Borrowing(nn.Module):
    """Blocks of which the first one has a bias that is used elsewhere, too, as the position biases of T5."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual(8, 2) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x + self.blocks[0].up.bias


def encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


def by_norms(model: nn.Module) -> nn.Module:
    """Let norms do something, whose initial values hide what they act on."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand_like(parameter))
    return model


MODELS: dict[str, tuple[Any, Tensor, list[str]]] = {
    "transformer": (lambda: Deep().net, TOKENS, [f"2.{number}" for number in range(6)]),
    "encoder": (lambda: encoder(True), TOKENS, [f"layers.{number}" for number in range(4)]),
    "resnet": (lambda: nn.Sequential(ResNet()), IMAGES, ["0.blocks.0", "0.blocks.2"]),
    "bottleneck": (lambda: ResNet(Bottleneck), IMAGES, ["blocks.0", "blocks.2"]),
    "stacks": (
        Stacks,
        TOKENS,
        [
            *(f"stages.0.blocks.{number}" for number in range(2)),
            *(f"stages.1.blocks.{number}" for number in range(3)),
            *(f"named.block_{number}" for number in range(3)),
        ],
    ),
    "borrowing": (Borrowing, TOKENS, [f"blocks.{number}" for number in range(1, 4)]),
}


@pytest.mark.parametrize("name", MODELS)
def test_residual_blocks_are_found_in_models_of_every_make(name: str) -> None:
    build, inputs, blocks = MODELS[name]
    assert find_blocks(by_norms(build()), inputs)[0] == blocks


@pytest.mark.parametrize("name", MODELS)
def test_masked_blocks_add_nothing_and_are_taken_out(name: str, tmp_path: Path) -> None:
    build, inputs, blocks = MODELS[name]
    model = by_norms(build())
    untouched = copy.deepcopy(model)
    masks = prune(model, 0.5, criterion=Random(), granularity=Layer(), example_inputs=inputs)
    gone = [block for block in blocks if not any(mask.any() for n, mask in masks.items() if n.startswith(f"{block}."))]
    assert 0 < len(gone) < len(blocks)

    for block in gone:  # what it would be with blocks that are jumped over
        untouched.get_submodule(block).register_forward_hook(lambda module, args, output: args[0])
    expected = run(untouched, inputs)
    assert difference(expected, run(model, inputs)) < 1e-5
    small = shrink(model, inputs)
    assert difference(expected, run(small, inputs)) < 1e-5
    assert type(small) is type(model)
    assert cut_record_of(small).removed == tuple(gone)
    assert len(list(small.parameters())) < len(list(model.parameters()))

    save_shrunk(small, tmp_path / "small.pt")
    loaded = load_shrunk(build, tmp_path / "small.pt")
    assert run(loaded, inputs).equal(run(small, inputs))


def test_blocks_whose_norms_act_on_the_sum_are_left_out_with_the_norm() -> None:
    model = nn.Sequential(*(PostNorm(8, 2) for _ in range(3)))
    with pytest.raises(ValueError, match=r"0\.attention\.q\.weight: the norm 'second' acts on the sum .* channels"):
        prune(by_norms(model), 0.5, granularity=Layer(), example_inputs=TOKENS)
    with pytest.raises(ValueError, match="the norm 'norm2' acts on the sum"):
        prune(encoder(False), 0.5, granularity=Layer(), example_inputs=TOKENS)


def test_other_blocks_are_left_out_with_a_reason() -> None:
    model = Deep().net
    model[2][0].up.weight.requires_grad = False
    model[2][1].up = model[2][2].up
    units, left_out = Layer().find_units(find(model, (), ("2.3.down.*",)), model, TOKENS)
    assert [unit.size for unit in units] == [2]
    assert left_out["0.weight"] == "it does not hand on what enters it once its weights are zero"
    assert left_out["5.weight"] == "it is in no residual block of a ModuleList or Sequential"
    assert left_out["2.0.down.weight"] == "what belongs to its block is frozen: 2.0.up.weight"
    assert "it has parameters in common with 2.2.up.weight" in left_out["2.1.down.weight"]
    assert "2.3.down.weight is not among the targets" in left_out["2.3.up.weight"]
    reusing = nn.Sequential(nn.Linear(8, 8), *[Residual(8, 2)] * 2)
    with pytest.raises(ValueError, match="it runs 2 times in a forward pass"):
        prune(reusing, 0.5, granularity=Layer(), example_inputs=TOKENS)
    with pytest.raises(ValueError, match="got none"):
        prune(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), 0.5, granularity=Layer(), example_inputs=TOKENS)
    with pytest.raises(ValueError, match=r"Layer\(minimum=1\) needs example inputs"):
        prune(model, 0.5, granularity=Layer())


def test_some_blocks_stay() -> None:
    model = Stacks()
    masks = prune(model, 0.9, granularity=Layer(minimum=2), example_inputs=TOKENS)
    alive = {
        name.rpartition(".")[0].split(".second")[0] for name, mask in masks.items() if ".second." in name and mask.any()
    }
    assert len(alive) == 6


def test_depth_heads_and_channels_one_after_another(tmp_path: Path) -> None:
    model = by_norms(Stacks())
    expected = None
    for granularity in (Layer(), Channel(), Layer(), Head()):
        masks = prune(model, 0.4, criterion=Random(), granularity=granularity, example_inputs=TOKENS)
        expected = run(model, TOKENS)
        small = shrink(model, TOKENS, masks=masks)
        assert difference(expected, run(small, TOKENS)) < 1e-5
        model = small
    save_shrunk(model, tmp_path / "small.pt")
    assert run(load_shrunk(Stacks, tmp_path / "small.pt"), TOKENS).equal(run(model, TOKENS))


def test_names_of_a_second_cut_are_those_of_the_whole_model() -> None:
    kept = torch.tensor([True, False])
    first = CutRecord({("a.3.weight", 0): kept, ("a.4.weight", 0): kept}, {"a.4": (4, 2)}, ("a.1", "a.3"))
    second = CutRecord({("a.2.weight", 1): kept, ("a.1.weight", 0): kept}, {"a.2": (2, 1)}, ("a.1",))
    both = first.then(second)
    assert both.removed == ("a.1", "a.3", "a.2")
    assert set(both.places) == {("a.4.weight", 0), ("a.4.weight", 1)}
    assert both.heads == {"a.4": (4, 1)}
    again = CutRecord.from_state_dict(both.state_dict())
    assert (again.removed, again.heads) == (both.removed, both.heads)


@pytest.mark.parametrize("removed", ["blocks.0", [3]])
def test_a_damaged_record_of_blocks_is_an_error(removed: object) -> None:
    state = {**CutRecord().state_dict(), "removed": removed}
    with pytest.raises(ValueError, match="the kept channels must have"):
        CutRecord.from_state_dict(state)
    with pytest.raises(ValueError, match=r"the model must have the block 'blocks\.7'"):
        cut(ResNet(), CutRecord(removed=("blocks.7",)))


def test_optimizers_and_averages_lose_the_same_blocks() -> None:
    model = Stacks()
    average = AveragedModel(model)
    prune(model, 0.5, criterion=Random(), granularity=Layer(), example_inputs=TOKENS)
    average.update_parameters(model)
    optimizer = torch.optim.Adam(model.parameters())
    model(TOKENS).sum().backward()
    optimizer.step()
    prune(model, 0.5, criterion=Random(), granularity=Layer(), example_inputs=TOKENS)
    shrink(model, TOKENS, inplace=True, optimizers=[optimizer], averages=[average])
    left = set(model.parameters())
    assert set(optimizer.param_groups[0]["params"]) == left
    assert optimizer.state.keys() <= left
    assert [p.shape for p in average.module.parameters()] == [p.shape for p in model.parameters()]
    optimizer.step()


def test_blocks_that_a_scale_of_zero_silences_stay() -> None:
    model = ResNet()
    nn.init.zeros_(model.blocks[0].two[1].weight)  # as some are initialised
    nn.init.zeros_(model.blocks[0].two[1].bias)
    with pytest.warns(UserWarning, match="stay in the model|nothing was removed"):
        assert len(shrink(model, IMAGES).blocks) == 3


def test_a_run_cuts_blocks_when_it_ends() -> None:
    model = Deep()
    callback = Pruning(0.5, granularity=Layer(), start=1, end=4, frequency=1, shrink_at_end=True)
    trainer = fit(model, callback)
    assert len(model.net[2]) == 3
    assert callback.sparsity_now == 0.5
    assert "blocks of net.2 6 -> 3" in callback.explain()
    assert set(callback.masks) == {name for name, _ in model.named_parameters() if name.startswith("net.2.")}
    assert all(mask.all() for mask in callback.masks.values())
    assert set(trainer.optimizers[0].param_groups[0]["params"]) == set(model.parameters())
    fit(model, callback.__class__(0.5, granularity=Layer(), start=1, end=4))
    assert len(model.net[2]) == 3


def test_modules_state_how_many_blocks_are_left() -> None:
    model = encoder(True)
    remove_blocks(model, ["layers.1", "layers.3"])
    assert model.num_layers == len(model.layers) == 2


@pytest.mark.parametrize("of", ["parameters", "flops"])
def test_a_goal_in_parameters_or_flops_counts_whole_blocks(of: Any) -> None:
    model = Stacks()
    total = sum(parameter.numel() for parameter in model.parameters())
    block = sum(parameter.numel() for parameter in model.named[0].parameters())
    masks = prune(model, 0.4, criterion=Random(), granularity=Layer(), example_inputs=TOKENS, of=of)
    dead = sum(not mask.any() for name, mask in masks.items() if name.endswith(".up.weight"))
    if of == "parameters":
        assert (dead - 1) * block < 0.4 * total <= dead * block
    small = shrink(model, TOKENS)
    before, after = (sum(dense_flops(each, TOKENS).values()) for each in (model, small))
    assert after <= 0.61 * before
    assert dead == 4
