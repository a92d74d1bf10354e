"""Scores agree with the formulas of the papers' own code, of which each test says a few lines."""

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn

from lightning_prune import (
    FPGM,
    LAMP,
    SNIP,
    APoZ,
    BatchNormScale,
    Block,
    Channel,
    Criterion,
    Magnitude,
    Movement,
    Sensitivity,
    Weight,
    prune,
    shrink,
)
from lightning_prune.granularities import Granularity
from lightning_prune.models.parameters import find
from lightning_prune.updates.statistics import Observation

_SEEDED = torch.Generator().manual_seed(0)
IMAGES = torch.randn(4, 8, 2, 8, 8, generator=_SEEDED)
CLASSES = torch.randint(3, (4, 8), generator=_SEEDED)
BATCHES = list(zip(IMAGES, CLASSES, strict=True))
COUPLED = Channel(coupled=True)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Gate(nn.Identity):
    """Where a reference has a gate: a factor of one for each channel, whose gradient says how much the channel does."""


def randomly(model: nn.Module) -> nn.Module:
    """Move all parameters away from values such as one and zero."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def convolutions() -> nn.Module:
    """Three layers: with a norm and no bias, with a norm and a bias, with a bias alone."""
    return randomly(
        nn.Sequential(
            *(nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), Gate(), nn.ReLU()),
            *(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(80, 4), Gate(), nn.Tanh(), nn.Linear(4, 3)),
        )
    )


class Residual(nn.Module):
    """Two layers that are added: norms follow each of them, or their sum, or neither."""

    def __init__(self, norms: bool, last: nn.Module) -> None:
        super().__init__()
        self.one, self.first = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6) if norms else nn.Identity()
        self.other, self.second = nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6) if norms else nn.Identity()
        self.last, self.gate, self.head = last, Gate(), nn.Linear(6, 3)
        randomly(self)

    def forward(self, x: Tensor) -> Tensor:
        total = self.last(self.first(self.one(x)) + self.second(self.other(x)))
        y: Tensor = self.head(self.gate(total).relu().mean((2, 3)))
        return y


def observed(
    model: nn.Module,
    criterion: Criterion,
    granularity: Granularity,
    batches: Sequence[tuple[Tensor, Tensor]] = BATCHES,
) -> dict[str, Tensor]:
    """Return the scores of training steps, of which no optimizer changes anything."""
    units, _ = granularity.find_units(find(model), model, (IMAGES[0],) if granularity.coupled else None)
    observation = Observation(criterion, units)
    for x, t in batches:
        model.zero_grad()
        nn.functional.cross_entropy(model.train()(x), t).backward()
        observation.gradients({id(parameter) for parameter in model.parameters()})
        observation.step()
    observation.finish()
    return {unit.name: criterion.scores(unit) for unit in units}


def by_gates(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]] = BATCHES) -> dict[str, Tensor]:
    """Return the gradients of each gate in the same steps, (steps, channels)."""
    found: dict[str, list[Tensor]] = {}
    gates: dict[str, Tensor] = {}

    def multiply(name: str, output: Tensor) -> Tensor:
        gates[name] = torch.ones(output.shape[1], requires_grad=True)
        return output * gates[name].view(-1, *[1] * (output.ndim - 2))

    for name, module in model.named_modules():
        if isinstance(module, Gate):
            module.register_forward_hook(lambda *call, name=name: multiply(name, call[-1]))
    for x, t in batches:
        nn.functional.cross_entropy(model.train()(x), t).backward()
        for name, gate in gates.items():
            found.setdefault(name, []).append(gate.grad)
    return {name: torch.stack(gradients) for name, gradients in found.items()}


# ------------------------------------------------------------------------------------------------ Taylor, SNIP


# NVlabs/Taylor_pruning, method 22: criteria += (gate * gate.grad).pow(2), then divided by the number of steps
@pytest.mark.parametrize(
    ("criterion", "formula"),
    [
        (Sensitivity(), lambda gradients: gradients.square().mean(0)),
        (SNIP(), lambda gradients: gradients.mean(0).abs()),
    ],
    ids=["Taylor", "SNIP"],
)
def test_channels_are_scored_by_the_gate_that_follows_their_norm_or_else_their_bias(
    criterion: Criterion, formula: Any
) -> None:
    model = convolutions()
    scores, gates = observed(model, criterion, Channel(coupled=False)), by_gates(model)
    assert scores["0.weight"].min() > 1e-6
    torch.testing.assert_close(scores["0.weight"], formula(gates["2"]), rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(scores["8.weight"], formula(gates["9"]), rtol=1e-4, atol=1e-8)


# mil-ad/snip, snip.py: abs(mask * grad) over their sum, for one batch; the highest stay. A mask of one has w * dL/dw
def test_snip_keeps_the_weights_that_it_keeps_elsewhere() -> None:
    model = convolutions()
    nn.functional.cross_entropy(model.train()(IMAGES[0]), CLASSES[0]).backward()
    names = [f"{at}.weight" for at in (0, 4, 8, 11)]
    saliences = [(model.get_parameter(name).grad * model.get_parameter(name)).detach().abs() for name in names]
    every = torch.cat([salience.flatten() for salience in saliences])
    threshold = (every / every.sum()).sort(descending=True)[0][round(0.3 * every.numel()) - 1]
    masks = prune(model, 0.7, criterion=SNIP(), data=[(IMAGES[0], CLASSES[0])])
    for name, salience in zip(names, saliences, strict=True):
        assert torch.equal(masks[name], salience / every.sum() >= threshold), name


# Theis et al., 2018, equation 9: half of the mean over samples of the square of a feature map's gate
def test_sensitivity_of_single_samples_is_twice_the_fisher_information_of_a_feature_map() -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 3), Gate(), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3))
    samples = [(x[None], t[None]) for x, t in zip(IMAGES[0], CLASSES[0], strict=True)]
    scores = observed(model, Sensitivity(window=8), Channel(coupled=False), samples)
    fisher = by_gates(model, samples)["1"].square().mean(0) / 2
    torch.testing.assert_close(scores["0.weight"], 2 * fisher, rtol=1e-4, atol=1e-8)


def test_movement_of_channels_is_that_of_their_gates_for_each_weight() -> None:
    model = convolutions()
    scores, gates = observed(model, Movement(), Channel(coupled=False)), by_gates(model)
    torch.testing.assert_close(scores["0.weight"], -gates["2"].mean(0) / 18, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(scores["8.weight"], -gates["9"].mean(0) / 80, rtol=1e-4, atol=1e-8)


# NVlabs/Taylor_pruning has the gates of residual networks after the sums
@pytest.mark.parametrize(
    ("norms", "last"),
    [(True, nn.Identity()), (False, nn.Identity()), (False, nn.BatchNorm2d(6))],
    ids=["of each", "nowhere", "of the sum"],
)
def test_coupled_channels_are_scored_by_the_gate_after_their_sum(norms: bool, last: nn.Module) -> None:
    model = Residual(norms, last)
    scores, gates = observed(model, Sensitivity(), COUPLED), by_gates(model)
    torch.testing.assert_close(scores["one.weight"], gates["gate"].square().mean(0), rtol=1e-3, atol=1e-8)


def test_sensitivity_finds_the_channels_behind_a_norm_that_change_the_loss_least() -> None:
    model = randomly(nn.Sequential(nn.Conv2d(2, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 3)))
    norm = model[1]
    for parameter in norm.parameters():
        parameter.data *= 0.1  # so that a channel more or less is a small change
    scores = observed(model, Sensitivity(), Channel(coupled=False))["0.weight"]
    changes = torch.tensor([change_without(model, norm, channel) for channel in range(16)])
    ranks = torch.stack([changes.argsort().argsort(), scores.argsort().argsort()]).float()
    assert torch.corrcoef(ranks)[0, 1] > 0.9  # 0 for an order at random
    assert changes[scores.argsort()[:8]].sum() < 0.2 * changes.sum()


def change_without(model: nn.Module, norm: nn.BatchNorm2d, channel: int) -> float:
    """Return the mean square of the change of the loss, over the batches, without a channel behind a norm."""

    def silence(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.index_fill(1, torch.tensor([channel]), 0.0)

    def loss() -> Tensor:
        pairs = BATCHES
        return torch.stack([nn.functional.cross_entropy(model(x), t) for x, t in pairs])

    with torch.no_grad():
        before = loss()
        handle = norm.register_forward_hook(silence)
        after = loss()
        handle.remove()
    return float((after - before).square().mean())


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("kind", [Sensitivity, SNIP, Movement])
def test_a_batch_norm_without_trainable_factors_is_refused_in_training_alone(kind: Any, coupled: bool) -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.Conv2d(6, 3, 6))
    model.append(nn.Flatten())
    with pytest.raises(ValueError, match=r"norm that follows the layer of '0\.weight' must have trainable factors"):
        observed(model, kind(), Channel(coupled=coupled))
    assert observed(model, kind(), Weight())["0.weight"].any()


@pytest.mark.parametrize("coupled", [False, True])
def test_a_batch_norm_without_factors_is_a_fixed_scale_in_eval_mode(coupled: bool) -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.Conv2d(6, 3, 6))
    model.append(nn.Flatten())
    data, inputs = BATCHES, IMAGES[0] if coupled else None
    prune(model, 0.3, criterion=Sensitivity(), granularity=Channel(coupled=coupled), data=data, example_inputs=inputs)
    assert not model[0].weight.flatten(1).all(1).all()


def test_frozen_factors_in_eval_mode_leave_the_gate_to_the_layer() -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6).eval(), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3))
    model[1].requires_grad_(False).train = lambda mode=True: model[1]
    scores = observed(randomly(model), SNIP(), Channel(coupled=False))["0.weight"]
    layer = model[0]
    steps = []
    for x, t in BATCHES:
        model.zero_grad()
        nn.functional.cross_entropy(model(x), t).backward()
        steps.append((layer.weight * layer.weight.grad).sum((1, 2, 3)) + layer.bias * layer.bias.grad)
    torch.testing.assert_close(scores, torch.stack(steps).mean(0).abs().detach())


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.RMSNorm(4), nn.LayerNorm(4, bias=False)], ids=str)
def test_a_norm_over_channels_is_the_gate_too(norm: nn.Module) -> None:
    model = randomly(nn.Sequential(nn.Flatten(), nn.Linear(128, 4), norm, Gate(), nn.ReLU(), nn.Linear(4, 3)))
    scores, gates = observed(model, Sensitivity(), Channel(coupled=False)), by_gates(model)
    torch.testing.assert_close(scores["1.weight"], gates["3"].square().mean(0), rtol=1e-4, atol=1e-8)


def test_a_layer_with_a_norm_in_one_of_two_places_has_both_gates() -> None:
    first, second, norm = nn.Linear(128, 128), nn.Linear(128, 128), nn.BatchNorm1d(128)
    second.weight = first.weight
    model = randomly(nn.Sequential(nn.Flatten(), first, norm, nn.ReLU(), second, nn.ReLU(), nn.Linear(128, 3)))
    scores = observed(model, SNIP(), Channel(coupled=False))["1.weight"]
    steps = []
    for x, t in BATCHES:
        model.zero_grad()
        nn.functional.cross_entropy(model.train()(x), t).backward()
        own = (first.weight * first.weight.grad).sum(1)
        steps.append(own + sum(p * p.grad for p in (norm.weight, norm.bias, first.bias, second.bias)))
    torch.testing.assert_close(scores, torch.stack(steps).mean(0).abs().detach(), rtol=1e-4, atol=1e-8)


def test_a_norm_that_no_symbolic_trace_finds_is_the_gate_of_coupled_channels() -> None:
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.gate, self.head = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), Gate(), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.gate(self.norm(self.conv(x)))
            y = y.relu() if y.isfinite().all() else y
            found: Tensor = self.head(y.mean((2, 3)))
            return found

    model = randomly(Untraceable())
    scores, gates = observed(model, Sensitivity(), COUPLED), by_gates(model)
    torch.testing.assert_close(scores["conv.weight"], gates["gate"].square().mean(0), rtol=1e-3, atol=1e-8)


# ------------------------------------------------------------------------------------------------ network slimming


# Eric-mingjie/rethinking-network-pruning, network-slimming/prune.py: of the factors of all batch norms, sorted by their
# absolute values, the one at total * percent is the threshold, and what is greater stays
@pytest.mark.parametrize("coupled", [False, True])
def test_slimming_keeps_the_channels_whose_factors_exceed_one_threshold_and_shrinks(coupled: bool) -> None:
    model = randomly(
        nn.Sequential(
            *(nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
        )
    ).eval()
    factors = [model[at].weight.detach().abs() for at in (1, 4)]
    threshold = torch.cat(factors).sort()[0][int(14 * 0.5)]
    granularity, ignore = Channel(coupled=coupled), ["8.*"]
    masks = prune(
        *(model, 0.5),
        criterion=BatchNormScale(),
        granularity=granularity,
        scope="global",
        min_density=0.0,
        ignore=ignore,
        example_inputs=IMAGES[0],
    )
    kept = [masks[f"{at}.weight"] for at in (1, 4)]
    assert all(torch.equal(mask, factor >= threshold) for mask, factor in zip(kept, factors, strict=True))
    if coupled:
        small = shrink(model, IMAGES[0])
        assert [small[at].out_channels for at in (0, 3)] == [int(mask.sum()) for mask in kept]
        torch.testing.assert_close(small(IMAGES[0]), model(IMAGES[0]), rtol=1e-4, atol=1e-5)


def test_slimming_of_a_sum_takes_the_mean_of_the_factors_of_both_branches() -> None:
    model = Residual(True, nn.Identity()).eval()
    factors = (model.first.weight.abs() + model.second.weight.abs()).detach() / 2
    prune(model, 0.5, criterion=BatchNormScale(), granularity=COUPLED, example_inputs=IMAGES[0])
    kept = model.one.weight.flatten(1).any(1)
    assert torch.equal(kept, factors > factors.sort()[0][2])
    assert torch.equal(kept, model.second.weight.detach() != 0)
    assert shrink(model, IMAGES[0]).one.out_channels == 3


def test_slimming_of_coupled_channels_names_a_layer_without_factors() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"0\.weight: no norm with scales follows its layer"):
        prune(model, 0.5, criterion=BatchNormScale(), granularity=COUPLED, example_inputs=torch.ones(1, 4))


# ------------------------------------------------------------------------------------------------ APoZ


class Functional(nn.Module):
    """A norm and a ReLU, a ReLU in front of its norm, a ReLU alone, a norm alone, dropout in front of a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(size, 6, 3, padding=1) for size in (2, 6, 6, 6, 6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(4))
        self.drop, self.head = nn.Dropout(), nn.Linear(6, 3)
        randomly(self)

    def forward(self, x: Tensor) -> Tensor:
        self.active = [torch.relu(self.norms[0](self.convs[0](x)))]
        self.active.append(nn.functional.relu(self.convs[1](self.active[0])))
        self.active.append(self.convs[2](self.norms[1](self.active[1])).relu())
        self.active.append(self.norms[2](self.convs[3](self.active[2])))
        self.active.append(self.norms[3](self.drop(self.convs[4](self.active[3]))).relu())
        y: Tensor = self.head(self.active[-1].mean((2, 3)))
        return y


# Hu et al., equation 1: APoZ of a channel is the sum of f(O = 0) over places and samples, divided by their number
@pytest.mark.parametrize("granularity", [Channel(coupled=False), COUPLED], ids=["alone", "coupled"])
def test_apoz_counts_the_zeros_behind_norm_and_relu(granularity: Channel) -> None:
    model = Functional().eval()
    units, _ = granularity.find_units(find(model, (), ("head.*",)), model, (IMAGES[0],))
    observation = Observation(APoZ(), units)
    observation.open()
    zeros = []
    for x in IMAGES:
        model(x)
        observation.step()
        zeros.append([(active <= 0).float().mean((0, 2, 3)) for active in model.active])
    observation.finish()
    observation.close()
    expected = [torch.stack(shares).mean(0) for shares in zip(*zeros, strict=True)]
    assert len(units) == len(expected)
    for unit, apoz in zip(units, expected, strict=True):
        torch.testing.assert_close(1 - APoZ().scores(unit), apoz)


def test_apoz_of_a_layer_that_runs_twice_is_of_its_own_output() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norms = nn.Linear(4, 4), nn.ModuleList(nn.BatchNorm1d(4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norms[1](self.layer(self.norms[0](self.layer(x)).relu()))
            return y

    model = Twice().eval()
    (units,), _ = Channel().find_units(find(model), model, None)
    assert APoZ().watched(units) == [model.layer]


# ------------------------------------------------------------------------------------------------ magnitude


@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize("layer", [nn.Linear(5, 8), nn.Conv2d(3, 8, 2)], ids=["linear", "conv"])
def test_magnitude_of_channels_has_the_order_of_ln_structured(layer: nn.Module, p: float) -> None:
    theirs = deepcopy(layer)
    torch.nn.utils.prune.ln_structured(theirs, "weight", amount=0.5, n=p, dim=0)
    masks = prune(layer, 0.5, criterion=Magnitude(p), granularity=Channel(), scope="local")
    assert torch.equal(masks["weight"], theirs.weight_mask.bool())


def test_the_magnitude_of_blocks_is_the_root_mean_square_or_the_maximum_of_the_weights_they_have() -> None:
    layer = nn.Linear(4, 3)
    layer.weight.data = torch.tensor([[1.0, -7.0, 0.0, 0.0], [3.0, -4.0, 3.0, -4.0], [2.0, 2.0, 0.0, -6.0]])
    (units,) = Block(2, 2).find_units(find(layer), layer)[0]
    assert Magnitude(math.inf).scores(units).tolist() == [7.0, 4.0, 2.0, 6.0]
    halves = [(1 + 49 + 9 + 16) / 4, (9 + 16) / 4, (4 + 4) / 2, 36 / 2]
    torch.testing.assert_close(Magnitude(2).scores(units), torch.tensor(halves).sqrt())
    assert Magnitude(1).scores(units).tolist() == [15 / 4, 7 / 4, 2.0, 3.0]


def test_the_maximum_of_coupled_channels_is_over_all_layers_that_make_them() -> None:
    model = Residual(False, nn.Identity())
    (units,) = COUPLED.find_units(find(model, (), ("head.*",)), model, (IMAGES[0],))[0]
    both = torch.cat([model.one.weight.flatten(1), model.other.weight.flatten(1)], 1).detach()
    assert torch.equal(Magnitude(math.inf).scores(units), both.abs().amax(1))
    torch.testing.assert_close(Magnitude(2).scores(units), both.square().mean(1).sqrt())


def test_single_weights_have_one_magnitude_for_every_p() -> None:
    layer = nn.Linear(3, 4)
    masks = [prune(deepcopy(layer), 0.5, criterion=Magnitude(p))["weight"] for p in (1, 2, math.inf)]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("p", [0, 3, -1.0, math.nan, True, "2", None])
def test_another_power_is_refused(p: Any) -> None:
    with pytest.raises(ValueError, match="p must be 1, 2 or inf, got"):
        Magnitude(p)


# ------------------------------------------------------------------------------------------------ LAMP, FPGM


# jaeho-lee/layer-adaptive-sparsity, tools/pruners.py: each square over the sum of all that are no less
def test_lamp_keeps_what_the_authors_keep() -> None:
    model = convolutions()
    weights = {f"{name}.weight": model[int(name)].weight.detach() for name in ("0", "4", "8", "11")}
    scores = {}
    for name, weight in weights.items():
        squares, order = weight.flatten().square().sort()
        scores[name] = torch.empty_like(squares).index_put_((order,), squares / squares.flip(0).cumsum(0).flip(0))
    total = sum(score.numel() for score in scores.values())
    threshold = torch.cat(list(scores.values())).sort()[0][round(0.7 * total)]
    masks = prune(model, 0.7, criterion=LAMP())
    for name, score in scores.items():
        assert torch.equal(masks[name].flatten(), score >= threshold), name


# he-y/filter-pruning-geometric-median, pruning_cifar10.py: of the distances between all filters, the sum for each
def test_fpgm_prunes_the_filters_that_the_authors_prune() -> None:
    model = convolutions()
    before = deepcopy(model)
    masks = prune(model, 0.4, criterion=FPGM(), granularity=Channel(), scope="local", targets=["0.*", "4.*"])
    for name in ("0", "4"):
        filters = before[int(name)].weight.detach().flatten(1)
        distances = torch.stack([(filters - one).square().sum(1).sqrt() for one in filters]).sum(0)
        kept = masks[f"{name}.weight"].flatten(1).any(1)
        assert torch.equal(kept, distances >= distances.sort()[0][2])
