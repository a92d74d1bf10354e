"""Against formulas of the authors' own code, written down again here: pruning without training and before training."""

import copy
import pickle
import warnings
from collections.abc import Sequence
from fnmatch import fnmatch
from itertools import pairwise
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from models import fit
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune import (
    ERK,
    NM,
    OWL,
    Entropy,
    GraSP,
    MagnitudePruning,
    Pruning,
    PruningAtInit,
    Sensitivity,
    SynFlow,
    Wanda,
    prune,
    sparsegpt,
)
from lightning_prune.tensors.selection import Scores


class Block(nn.Module):
    """Two layers and a residual: the block of a transformer without its attention."""

    def __init__(self, size: int, loud: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
        with torch.no_grad():
            self.up.weight[:, 0] *= loud  # the more outliers, the louder

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.down(self.up(x).relu())
        return output


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(64, loud) for loud in (1.0, 40.0, 10.0)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Training(LightningModule):
    """Trains a network on one batch, and does not go through its own ``forward`` for that."""

    def __init__(self, net: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.net, self.data = net, data

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data, batch_size=None)


def calibration(count: int = 20, size: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, size, generator=generator) * torch.linspace(0.1, 3.0, size) for _ in range(count)]


# ------------------------------------------------------------------------------------------------ Wanda


def metric(weight: Tensor, inputs: Tensor) -> Tensor:
    """locuslab/wanda: the weight times the norm of the input."""
    return weight.detach().abs() * inputs.square().mean(0).sqrt()


def test_wanda_prunes_the_lowest_of_each_row() -> None:
    layer, data = nn.Linear(16, 9), calibration()
    scores = metric(layer.weight, torch.cat(data))
    expected = torch.ones_like(scores, dtype=torch.bool).scatter(1, scores.argsort(1)[:, :8], False)
    assert torch.equal(prune(layer, 0.5, criterion=Wanda(), data=data)["weight"], expected)


def by_alpha(scores: Tensor, sparsity: float) -> Tensor:
    """locuslab/wanda, use_variant: bisect the share alpha of the sum of each row that goes."""
    ordered = scores.sort(1).values
    low, high = 0.0, 0.8
    while True:
        alpha = (low + high) / 2
        count = (ordered.cumsum(1) <= alpha * scores.sum(1, keepdim=True)).sum(1, keepdim=True)
        pruned = scores <= ordered.gather(1, count - 1)
        found = float(pruned.float().mean())
        if abs(found - sparsity) <= 0.001 or high - low < 0.001:
            return pruned
        low, high = (low, alpha) if found > sparsity else (alpha, high)


@pytest.mark.parametrize("sparsity", [0.4, 0.6])
def test_wandas_variant_takes_the_same_share_of_each_row(sparsity: float) -> None:
    torch.manual_seed(0)
    layer, data = nn.Linear(16, 40), calibration()
    with torch.no_grad():
        layer.weight[:20, :4] *= 8.0  # rows of which a few weights make up the sum lose more
    pruned = by_alpha(metric(layer.weight, torch.cat(data)), sparsity)
    assert pruned.float().mean() == pytest.approx(sparsity, abs=0.01)
    zeros = float(pruned.float().mean())
    masks = prune(copy.deepcopy(layer), zeros, criterion=Wanda(by_row=False), scope="local", data=data)
    assert torch.equal(~masks["weight"], pruned)
    assert not torch.equal(prune(layer, zeros, criterion=Wanda(), scope="local", data=data)["weight"], ~pruned)


def test_wanda_takes_all_batches_as_sparsegpt_does_unless_told_otherwise() -> None:
    data, layer = calibration(20), nn.Linear(16, 40)
    for window, seen in ((None, 20), (3, 3)):
        expected = metric(layer.weight, torch.cat(data[:seen])).argsort(1)[:, :8]
        masks = prune(copy.deepcopy(layer), 0.5, criterion=Wanda(window), data=data)
        assert torch.equal(masks["weight"].sum(1), torch.full((40,), 8))
        assert not masks["weight"].gather(1, expected).any()


def test_a_default_that_leaves_batches_out_says_so() -> None:
    pairs = [(x, torch.zeros(6, dtype=torch.long)) for x in calibration(20)]
    for criterion in (Sensitivity(), Entropy()):
        name = type(criterion).__name__
        with pytest.warns(UserWarning, match=rf"{name} takes 16 of the 20 batches of data: say {name}\(window=20\)"):
            prune(nn.Linear(16, 4), 0.5, criterion=criterion, data=pairs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune(nn.Linear(16, 4), 0.5, criterion=Sensitivity(window=3), data=pairs)
        prune(nn.Linear(16, 4), 0.5, criterion=Sensitivity(), data=pairs[:16])


# ------------------------------------------------------------------------------------------------ OWL


def owl(model: Blocks, data: Sequence[Tensor], sparsity: float, times: float, spread: float) -> list[float]:
    """luuyin/OWL: densities of the blocks, by how many of their scores exceed a multiple of the block's mean."""
    ratios, x = [], torch.cat(list(data))
    for block in model.layers:
        hidden = block.up(x).relu()
        scores = torch.cat([metric(block.up.weight, x).flatten(), metric(block.down.weight, hidden).flatten()])
        ratios.append(float((scores > times * scores.mean()).double().mean()))
        x = block(x)
    found = torch.tensor(ratios, dtype=torch.float64)
    found = (found - found.min()) / (found.max() - found.min()) * spread * 2
    return (found - found.mean() + 1 - sparsity).tolist()


@pytest.mark.parametrize("how", ["one pass", "sequential", "sparsegpt", "sparsegpt, sequential"])
@torch.no_grad()
def test_owl_goes_by_the_scores_of_a_whole_block(how: str) -> None:
    model, data = Blocks(), calibration(4, 64)
    expected = owl(model, data, 0.6, 3.0, 0.1)
    assert max(expected) - min(expected) == pytest.approx(0.2)
    scope, sequential = OWL(outliers=3.0, spread=0.1), "layers" if "sequential" in how else None
    if "sparsegpt" in how:
        masks = sparsegpt(model, 0.6, data=data, scope=scope, sequential=sequential)
    else:
        masks = prune(model, 0.6, criterion=Wanda(), data=data, scope=scope, sequential=sequential)
    for number, density in enumerate(expected):
        kept = torch.cat([masks[f"layers.{number}.{part}.weight"].flatten() for part in ("up", "down")])
        assert float(kept.double().mean()) == pytest.approx(density, abs=1e-4)  # two of 16,384 weights
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.6 * 49152)


def test_owl_with_rounds_and_blocks_reaches_the_sparsity() -> None:
    model, data = Blocks(), iter(calibration(4, 64))
    masks = prune(model, 0.8, criterion=Wanda(), data=data, scope=OWL(), sequential="layers", rounds=2)
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.8 * 49152)


def test_owl_finds_blocks_by_their_numbers() -> None:
    loud = torch.ones(40)
    loud[:4] = 100.0
    quiet = torch.ones(40)
    scores = {f"enc.h.{block}.{part}.0.w": quiet for block in (0, 1) for part in "qk"} | {"enc.norm.w": quiet}
    scores["enc.h.1.k.0.w"] = loud
    keep = OWL(spread=0.1)(Scores.of(scores), 0.5)
    assert list(keep.values()) == [17, 17, 25, 25, 16]  # of 40: the two of the second block have more
    apart = OWL(spread=0.1, depth=0)(Scores.of(scores), 0.5)
    assert apart["enc.h.1.q.0.w"] < 20 < apart["enc.h.1.k.0.w"]


def test_a_scope_without_blocks_is_refused_where_groups_leave_nothing_to_share_out() -> None:
    with pytest.raises(ValueError, match=r'scope must be "local" for NM\(n=2, m=4\), .* got OWL\('):
        sparsegpt(Blocks(), 0.5, data=calibration(1, 64), granularity=NM(2, 4), scope=OWL())


# ------------------------------------------------------------------------------------------------ SparseGPT


def fasterprune(weight: Tensor, inputs: Tensor, sparsity: float, blocksize: int) -> Tensor:
    """IST-DASLab/sparsegpt: block by block, with the Cholesky factor of the inverse; ``round`` where theirs has <=."""
    new, moments = weight.clone(), 2 / len(inputs) * inputs.T @ inputs
    dead = moments.diagonal() == 0
    moments[dead, dead] = 1.0
    new[:, dead] = 0.0
    inverse = torch.linalg.cholesky(torch.linalg.inv(moments), upper=True)
    for begin in range(0, weight.shape[1], blocksize):
        end = min(begin + blocksize, weight.shape[1])
        saliency = new[:, begin:end].square() / inverse.diagonal()[begin:end].square()
        lowest = saliency.flatten().argsort(stable=True)[: round(sparsity * saliency.numel())]
        pruned = torch.zeros(saliency.numel(), dtype=torch.bool).scatter(0, lowest, True).view_as(saliency)
        for at in range(begin, end):
            error = torch.where(pruned[:, at - begin], new[:, at] / inverse[at, at], 0.0)
            new[:, at:] -= error[:, None] * inverse[at, at:]
            new[:, at] = torch.where(pruned[:, at - begin], 0.0, new[:, at])
    return new


@pytest.mark.parametrize("dead", [[], [1, 5, 11], list(range(10))])
def test_sparsegpt_prunes_as_its_authors_do(dead: list[int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 16, dtype=torch.float64) @ torch.randn(16, 16, dtype=torch.float64)
    x[:, dead] = 0.0
    layer = nn.Linear(16, 8, dtype=torch.float64)
    expected = fasterprune(layer.weight.detach(), x, 0.5, 8)
    sparsegpt(layer, 0.5, data=[x], blocksize=8, damping=1e-9)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-4, atol=1e-6)
    assert not layer.weight[:, dead].any()


def test_dead_inputs_go_before_all_others() -> None:
    x = torch.randn(100, 18)
    x[:, ::2] = 0.0  # half of the inputs, and half of the weights are to go: nothing is lost
    layer = nn.Linear(18, 7)
    with torch.no_grad():
        layer.weight[:, ::2] = 100.0
        dense = layer(x)
        masks = sparsegpt(layer, 0.5, data=[x])
        assert torch.equal(~masks["weight"], (x == 0).all(0).expand(7, 18))
        torch.testing.assert_close(layer(x), dense, rtol=0, atol=1e-5)


def test_sparsegpt_keeps_the_zeros_of_an_earlier_mask() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 16), torch.randn(200, 32) @ torch.randn(32, 32)
    first = prune(layer, 0.4)["weight"]
    second = sparsegpt(layer, 0.7, data=[x], blocksize=8)["weight"]
    assert not (second & ~first).any()
    assert int((~second).sum()) == round(0.7 * 512)
    assert torch.equal(layer.weight != 0, second)
    assert torch.equal(sparsegpt(layer, 0.5, data=[x])["weight"], second)  # no less, and no other ones


# ------------------------------------------------------------------------------------------------ GraSP


def grasp(model: nn.Module, weights: list[nn.Parameter], data: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """alecwangcq/GraSP: w * H g of logits over 200, g over all batches first, by the weights of the layers alone."""
    losses = [nn.functional.cross_entropy(model(x) / 200, y) for x, y in data]
    total = [sum(parts) for parts in zip(*(torch.autograd.grad(loss, weights) for loss in losses), strict=True)]
    found = [torch.zeros_like(weight) for weight in weights]
    for x, y in data:
        slopes = torch.autograd.grad(nn.functional.cross_entropy(model(x) / 200, y), weights, create_graph=True)
        z = sum((g.detach() * slope).sum() for g, slope in zip(total, slopes, strict=True))
        for place, part in enumerate(torch.autograd.grad(z, weights)):  # type: ignore[arg-type]
            found[place] += part
    return [(weight * part).detach() for weight, part in zip(weights, found, strict=True)]


def lowest(scores: list[Tensor], sparsity: float) -> Tensor:
    flat = torch.cat([part.flatten() for part in scores])
    return torch.ones_like(flat, dtype=torch.bool).scatter(0, flat.argsort()[: round(sparsity * len(flat))], False)


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 20), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(20, 4)).double()


def labelled(count: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(12, 1, 6, 6).double() + b, torch.randint(0, 4, (12,))) for b in range(count)]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("loss", ["default", "log_softmax", "keyword"])
def test_grasp_is_that_of_its_authors(count: int, loss: str) -> None:
    functions: dict[str, Any] = {
        "default": None,
        "log_softmax": lambda model, batch: nn.functional.nll_loss(model(batch[0]).log_softmax(1), batch[1]),
        "keyword": lambda model, batch: nn.CrossEntropyLoss().forward(input=model(batch[0]), target=batch[1]),
    }
    model, data = classifier(), labelled(count)
    weights = [model[0].weight, model[4].weight, model[6].weight]
    scores = grasp(model, weights, data)
    masks = prune(model, 0.7, criterion=GraSP(window=3), data=data, loss=functions[loss])
    assert torch.equal(torch.cat([mask.flatten() for mask in masks.values()]), lowest(scores, 0.7))


def test_grasp_divides_logits_wherever_a_training_step_has_them_from() -> None:
    data, net = labelled(1), classifier()
    expected = prune(copy.deepcopy(net), 0.7, criterion=GraSP(), data=data)
    callback = PruningAtInit(0.7, GraSP())
    fit(Training(net, data), callback, max_epochs=1)
    assert all(torch.equal(callback.masks[f"net.{name}"], mask) for name, mask in expected.items())


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_makes_no_sense_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be above 0"):
        GraSP(temperature=temperature)


# ------------------------------------------------------------------------------------------------ rounds


def synflow(model: nn.Sequential, sparsity: float, rounds: int, size: tuple[int, ...]) -> list[Tensor]:
    """ganguli-lab/Synaptic-Flow: (1 - s)^(k/n) of all weights stay after round k, here in float64."""
    linear = copy.deepcopy(model).double()
    for parameter in linear.parameters():
        parameter.data.abs_()
    weights = [parameter for parameter in linear.parameters() if parameter.ndim > 1]
    for done in range(1, rounds + 1):
        found = torch.autograd.grad(linear(torch.ones(1, *size).double()).sum(), weights)
        scores = torch.cat([(slope * weight).flatten() for slope, weight in zip(found, weights, strict=True)])
        keep = len(scores) - round((1 - (1 - sparsity) ** (done / rounds)) * len(scores))
        mask = torch.zeros_like(scores).scatter(0, scores.topk(keep).indices, 1.0)
        for weight, part in zip(weights, mask.split([w.numel() for w in weights]), strict=True):
            weight.data *= part.view_as(weight)
    return [weight != 0 for weight in weights]


def mlp() -> nn.Sequential:
    layers = [nn.Linear(a, b) for a, b in pairwise([30, 60, 60, 60, 5])]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])


def cnn() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32, 40), nn.ReLU(), nn.Linear(40, 5)),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("make", "size"), [(mlp, (30,)), (cnn, (1, 9, 9))])
@pytest.mark.parametrize("sparsity", [0.99, 0.997])
def test_a_hundred_rounds_of_synflow_are_those_of_its_authors_and_lose_no_layer(
    make: Any, size: tuple[int, ...], sparsity: float
) -> None:
    torch.manual_seed(0)
    model = make()
    expected = synflow(model, sparsity, 100, size)
    data = [(torch.zeros(2, *size), torch.zeros(2, dtype=torch.long))]
    masks = prune(copy.deepcopy(model), sparsity, criterion=SynFlow(), data=data, rounds=100)
    assert all(bool(mask.any()) for mask in masks.values())
    agree = sum(int((mask & other).sum()) for mask, other in zip(masks.values(), expected, strict=True))
    assert agree >= 0.99 * sum(int(mask.sum()) for mask in masks.values())


def test_pruning_at_init_counts_rounds_the_same_way() -> None:
    torch.manual_seed(0)
    model, data = mlp(), [(torch.randn(2, 30), torch.randint(0, 5, (2,)))]
    expected = prune(copy.deepcopy(model), 0.98, criterion=SynFlow(), data=data, rounds=20)
    callback = PruningAtInit(0.98, SynFlow(), rounds=20)
    fit(Training(model, data), callback, max_epochs=1)
    assert all(torch.equal(callback.masks[f"net.{name}"], mask) for name, mask in expected.items())


def test_rounds_of_a_sparsity_for_each_layer_and_of_a_threshold() -> None:
    model = mlp()
    masks = prune(model, {"0.*": 0.9, "2.*": 0.0}, rounds=5)
    assert {name: int((~mask).sum()) for name, mask in masks.items()} == {"0.weight": 1620, "2.weight": 0}
    once, often = (prune(copy.deepcopy(model), threshold=0.05, rounds=rounds) for rounds in (1, 4))
    assert all(torch.equal(mask, often[name]) for name, mask in once.items())


# ------------------------------------------------------------------------------------------------ ERK


def erdos_renyi(shapes: dict[str, tuple[int, ...]], sparsity: float, power: float, dense: set[str]) -> dict[str, float]:
    """google-research/rigl, get_sparsities_erdos_renyi: raise the layers above 1 to dense until none is left."""
    size = {name: float(torch.Size(shape).numel()) for name, shape in shapes.items()}
    full = set(dense)
    while True:
        wanted = sum(n * (1 - sparsity) for name, n in size.items() if name not in full)
        wanted -= sum(size[name] * sparsity for name in full)
        raw = {name: (sum(shape) / size[name]) ** power for name, shape in shapes.items() if name not in full}
        epsilon = wanted / sum(raw[name] * size[name] for name in raw)
        if max(raw.values()) * epsilon <= 1:
            return {name: raw[name] * epsilon if name in raw else 1.0 for name in shapes}
        full |= {name for name in raw if raw[name] == max(raw.values())}


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("dense", [(), ("c1",), ("c1", "fc*")])
@pytest.mark.parametrize("sparsity", [0.3, 0.8])
def test_erk_is_that_of_rigl(power: float, dense: tuple[str, ...], sparsity: float) -> None:
    shapes = {"c1": (16, 1, 3, 3), "c2": (32, 16, 3, 3), "c3": (64, 32, 3, 3), "fc": (10, 64)}
    scores = Scores.of({name: torch.rand(shape) for name, shape in shapes.items()})
    keep = ERK(power=power, dense=dense)(scores, sparsity)
    expected = erdos_renyi(shapes, sparsity, power, {"c1", "fc"} if "fc*" in dense else set(dense))
    for name, density in expected.items():
        assert keep[name] == pytest.approx(density * scores.sizes[name], abs=1.0)
    assert sum(keep.values()) == sum(scores.sizes.values()) - round(sparsity * sum(scores.sizes.values()))


# google-research/rigl, custom_sparsity_map: the others are as if these were not there, with what is left for them
@pytest.mark.parametrize("overrides", [{"c1": 0.3}, {"c*": 0.7, "c1": 0.1}, {"fc": 0.0, "c1": 0.2, "*1": 0.9}], ids=str)
def test_erk_shares_out_what_targets_with_a_sparsity_of_their_own_leave(overrides: dict[str, float]) -> None:
    shapes = {"c1": (16, 1, 3, 3), "c2": (32, 16, 3, 3), "c3": (64, 32, 3, 3), "fc": (100, 64), "out": (90, 100)}
    scores = Scores.of({name: torch.rand(shape) for name, shape in shapes.items()})
    keep, sizes = ERK(overrides=overrides)(scores, 0.8), scores.sizes
    own = {name: next((s for p, s in overrides.items() if fnmatch(name, p)), None) for name in shapes}
    given = {name: (1 - s) * sizes[name] for name, s in own.items() if s is not None}
    others = {name: shape for name, shape in shapes.items() if name not in given}
    left = (0.2 * sum(sizes.values()) - sum(given.values())) / sum(sizes[name] for name in others)
    expected = {**given, **{name: d * sizes[name] for name, d in erdos_renyi(others, 1 - left, 1.0, set()).items()}}
    assert all(keep[name] == pytest.approx(count, abs=1.0) for name, count in expected.items())
    assert sum(keep.values()) == sum(sizes.values()) - round(0.8 * sum(sizes.values()))


def test_targets_with_a_sparsity_of_their_own_have_no_more_than_is_due() -> None:
    scores = Scores.of({"a": torch.rand(40, 10), "b": torch.rand(40, 10), "c": torch.rand(20, 10)})
    scope = ERK(overrides={"a": 0.9, "b": 0.3})
    assert scope(scores, 0.0) == {"a": 400, "b": 400, "c": 200}
    assert scope(scores, 0.24) == {"a": 400 - 180, "b": 400 - 60, "c": 200}
    assert scope(scores, 0.5) == {"a": 40, "b": 280, "c": 180}
    assert hash(scope) == hash(ERK())


def test_a_floor_holds_targets_with_a_sparsity_of_their_own_too() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 20))
    masks = prune(model, 0.5, scope=ERK(overrides={"0.*": 0.99}), min_density=0.2)
    assert [int(mask.sum()) for mask in masks.values()] == [20, 130]


def test_er_leaves_the_kernel_out() -> None:
    scores = Scores.of({"conv": torch.rand(32, 16, 3, 3), "fc": torch.rand(32, 16)})
    assert ERK(kernel=False)(scores, 0.9) == {"conv": 461, "fc": 51}  # both have 32 outputs and 16 inputs
    assert ERK()(scores, 0.9)["conv"] < 461


def test_erk_refuses_what_cannot_be() -> None:
    scores = Scores.of({"a": torch.rand(4, 4), "b": torch.rand(2, 4)})
    with pytest.raises(ValueError, match="power must be at least 0, got -1"):
        ERK(power=-1)
    with pytest.raises(ValueError, match=r"dense must match targets, got 'c', which matches none of \['a', 'b'\]"):
        ERK(dense=("c",))(scores, 0.5)
    with pytest.raises(ValueError, match=r"dense must leave room .* which keeps 16 units of 12"):
        ERK(dense=("a",))(scores, 0.5)
    with pytest.raises(ValueError, match=r"overrides must match targets, got 'c', which matches none of"):
        ERK(overrides={"a": 0.1, "c": 0.5})(scores, 0.5)
    with pytest.raises(ValueError, match=r"overrides must leave room .* got \{.*\}, which keeps 18 units of 12"):
        ERK(overrides={"*": 0.25})(scores, 0.5)
    for wrong in (0.5, ["a"], {"a": 1.0}, {"a": True}):
        with pytest.raises(ValueError, match="overrides"):
            ERK(overrides=wrong)


# ------------------------------------------------------------------------------------------------ schedules


@pytest.mark.parametrize("initial", [0.0, 0.5])
def test_the_cubic_schedule_is_that_of_zhu_and_gupta(initial: float) -> None:
    begin, span, final = 100, 500, 0.9
    callback = pickle.loads(pickle.dumps(MagnitudePruning(final, start=begin, end=600, frequency=50, initial=initial)))
    updates = callback.plan(begin, begin + span)
    assert len(updates) == (11 if initial else 10)  # nothing is due at the start, unless something is
    for step, due in updates:
        expected = final + (initial - final) * (1 - (step - begin) / span) ** 3
        assert due * final == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"sparsity": 0.5, "initial": 0.5},
            "initial must be less than one sparsity for all targets, got 0.5 for 0.5",
        ),
        (
            {"sparsity": {"*": 0.5}, "initial": 0.1},
            "initial must be less than one sparsity for all targets, got 0.1",
        ),
        (
            {"threshold": 0.5, "initial": 0.1},
            "initial must be less than one sparsity for all targets, got 0.1 for None",
        ),
        ({"sparsity": 0.5, "initial": 50}, r"initial must be in \[0, 1\), got 50"),
    ],
)
def test_an_initial_sparsity_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pruning(**arguments)
