"""`prune`: one call without a Trainer, and a model that is otherwise left as it was."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import (
    SNIP,
    APoZ,
    Channel,
    Criterion,
    Entropy,
    Granularity,
    GraSP,
    Magnitude,
    Masks,
    Random,
    Sensitivity,
    Wanda,
    Weight,
    prune,
)
from lightning_prune.criteria import Loss
from lightning_prune.models.forward import convert
from lightning_prune.scopes import SCOPES

CRITERIA = [Magnitude(), Random(), Entropy("high", window=2), Entropy("low", window=2), Sensitivity(window=2)]
NEED_DATA = [Entropy(window=2), Sensitivity(window=2)]


def net() -> nn.Sequential:
    """Return a network with a norm, dropout, and no zero among its weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        *(nn.Linear(24, 8), nn.Dropout(0.5), nn.Linear(8, 4)),
    )


WEIGHTS = {"0.weight": 54, "5.weight": 192, "7.weight": 32}
CHANNELS = {"0.weight": 6, "5.weight": 8, "7.weight": 4}


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(5, 1, 6, 6), torch.randint(0, 4, (5,))) for _ in range(count)]


def pruned_units(model: nn.Module, granularity: Granularity) -> dict[str, int]:
    weights = {name: model.get_parameter(name) for name in WEIGHTS}
    if granularity == Weight():
        return {name: int((weight == 0).sum()) for name, weight in weights.items()}
    return {name: int((weight.flatten(1) == 0).all(1).sum()) for name, weight in weights.items()}


# ------------------------------------------------------------------------------------------------ every combination


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
@pytest.mark.parametrize("granularity", [Weight(), Channel()], ids=str)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_exactly_as_many_units_are_zero(
    criterion: Criterion, granularity: Granularity, scope: str, sparsity: float
) -> None:
    model = net()
    axes = {"criterion": criterion, "granularity": granularity, "scope": scope, "targets": ("*",)}
    masks = prune(model, sparsity, data=batches(), min_density=0.0, **axes)
    sizes = WEIGHTS if granularity == Weight() else CHANNELS
    zeros = pruned_units(model, granularity)
    if scope == "local":
        assert zeros == {name: round(sparsity * size) for name, size in sizes.items()}
    else:
        assert sum(zeros.values()) == round(sparsity * sum(sizes.values()))
    for name, mask in masks.items():
        assert (model.get_parameter(name)[~mask] == 0).all()
        assert name not in WEIGHTS or (model.get_parameter(name)[mask] != 0).all()
    followers = [] if granularity == Weight() else ["0.bias", "1.bias", "1.weight", "5.bias", "7.bias"]
    assert sorted(set(masks) - set(WEIGHTS)) == followers


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
@pytest.mark.parametrize("granularity", [Weight(), Channel()], ids=str)
def test_a_sparsity_for_each_layer(criterion: Criterion, granularity: Granularity) -> None:
    model = net()
    prune(model, {"0.*": 0.5, "7.*": 0.25}, criterion=criterion, granularity=granularity, data=batches())
    sizes = WEIGHTS if granularity == Weight() else CHANNELS
    assert pruned_units(model, granularity) == {
        "0.weight": sizes["0.weight"] // 2,
        "5.weight": 0,
        "7.weight": sizes["7.weight"] // 4,
    }


@pytest.mark.parametrize("granularity", [Weight(), Channel()], ids=str)
def test_a_threshold_prunes_every_unit_below_it(granularity: Granularity) -> None:
    model = net()
    before = {name: model.get_parameter(name).detach().clone() for name in WEIGHTS}
    masks = prune(model, threshold=0.1, granularity=granularity)
    assert 0.1 < masks.sparsity < 0.9
    for name, weight in before.items():
        size = weight.abs() if granularity == Weight() else weight.abs().flatten(1).mean(1)
        keep = ~(size < 0.1)
        expected = weight * (keep if granularity == Weight() else keep.view(-1, *[1] * (weight.ndim - 1)))
        assert torch.equal(model.get_parameter(name), expected)


def test_magnitude_prunes_the_smallest_weights_of_all() -> None:
    model = net()
    weights = torch.cat([model.get_parameter(name).detach().flatten() for name in WEIGHTS])
    prune(model, 0.5)
    after = torch.cat([model.get_parameter(name).detach().flatten() for name in WEIGHTS])
    assert torch.equal(after, torch.where(weights.abs() > weights.abs().median(), weights, 0.0))


def test_a_scope_of_ones_own() -> None:
    model = net()

    def ends(scores: Mapping[str, Tensor], sparsity: float) -> Mapping[str, int]:
        names = list(scores)
        return {n: scores[n].numel() if n in (names[0], names[-1]) else int((1 - sparsity) * 192) for n in names}

    prune(model, 0.75, scope=ends)
    assert pruned_units(model, Weight()) == {"0.weight": 0, "5.weight": 144, "7.weight": 0}


def test_targets_and_ignore() -> None:
    model = net()
    prune(model, 0.5, targets=["*.weight"], ignore=["re:[57]"])
    assert pruned_units(model, Weight()) == {"0.weight": 27, "5.weight": 0, "7.weight": 0}


def test_masks_keep_the_zeros_while_the_model_trains_on() -> None:
    model = net()
    masks = prune(model, 0.6, granularity=Channel(), targets=("0.*", "5.*", "7.*"))
    assert isinstance(masks, Masks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        masks.apply(model)
    assert sum(pruned_units(model, Channel()).values()) == sum(round(0.6 * size) for size in CHANNELS.values())
    for name, mask in masks.items():
        assert (model.get_parameter(name)[~mask] == 0).all()


def test_pruning_again_goes_on_from_there() -> None:
    model = net()
    first = prune(model, 0.5)
    second = prune(model, 0.8)
    assert second.sparsity == pytest.approx(0.8, abs=2e-3)
    assert not any((second[name] & ~mask).any() for name, mask in first.items())
    assert prune(model, 0.8).sparsity == second.sparsity


def test_a_tied_weight_is_pruned_in_both_places() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    masks = prune(model, 0.5)
    assert list(masks) == ["0.weight"]
    assert int((model[1].weight == 0).sum()) == 8


# ------------------------------------------------------------------------------------------------ left as it was


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
@pytest.mark.parametrize("granularity", [Weight(), Channel()], ids=str)
def test_nothing_but_zeros_is_new(criterion: Criterion, granularity: Granularity) -> None:
    model = net()
    for x, _ in batches(3):
        model(x)  # running statistics of the norm
    model[0].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = list(model.parameters())
    masks = prune(model, 0.5, criterion=criterion, granularity=granularity, data=batches())
    for name, value in model.state_dict().items():
        kept = masks.get(name)
        assert torch.equal(value, before[name] if kept is None else before[name] * kept)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert [module.training for module in model.modules()] == modes
    assert all(p.requires_grad and p.is_leaf and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
def test_gradients_are_left_as_they_were(criterion: Criterion) -> None:
    model = net()
    x, y = batches(1)[0]
    nn.functional.cross_entropy(model(x), y).backward()
    model[7].bias.grad = None
    grads = [parameter.grad for parameter in model.parameters()]
    values = [None if grad is None else grad.clone() for grad in grads]
    prune(model, 0.5, criterion=criterion, data=batches())
    for parameter, grad, value in zip(model.parameters(), grads, values, strict=True):
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, value)


class Noisy(nn.Module):
    """Draws random numbers in every mode, as a variational autoencoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.norm(self.fc(x))
        return hidden + torch.randn_like(hidden)


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
@pytest.mark.parametrize("granularity", [Weight(), Channel()], ids=str)
@pytest.mark.parametrize("shuffle", [False, True])
def test_the_global_random_state_is_left_as_it_was(
    criterion: Criterion, granularity: Granularity, shuffle: bool
) -> None:
    model = Noisy()
    data = DataLoader(TensorDataset(torch.rand(8, 3), torch.rand(8, 4)), batch_size=4, shuffle=shuffle)
    before = torch.get_rng_state()
    prune(model, 0.5, criterion=criterion, granularity=granularity, data=data)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("criterion", NEED_DATA, ids=str)
def test_a_model_is_observed_in_eval_mode(criterion: Criterion) -> None:
    model = net()
    once = prune(copy.deepcopy(model), 0.5, criterion=criterion, data=batches())
    again = prune(copy.deepcopy(model), 0.5, criterion=criterion, data=batches())  # with dropout they would differ
    still = prune(copy.deepcopy(model).eval(), 0.5, criterion=criterion, data=batches())
    assert all(torch.equal(once[name], again[name]) and torch.equal(once[name], still[name]) for name in once)


@pytest.mark.parametrize("criterion", NEED_DATA, ids=str)
def test_a_failure_leaves_the_model_as_it_was(criterion: Criterion) -> None:
    def broken() -> Iterator[tuple[Tensor, Tensor]]:
        yield batches(1)[0]
        raise OSError("the disk is gone")

    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model[7].weight.grad = torch.ones(4, 8)
    state = torch.get_rng_state()
    with pytest.raises(OSError, match="the disk is gone"):
        prune(model, 0.5, criterion=criterion, data=broken())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert [parameter.grad is None for parameter in model.parameters()] == [True] * 6 + [False, True]
    assert torch.equal(torch.get_rng_state(), state)


def test_pruning_works_where_gradients_are_switched_off() -> None:
    model = net()
    with torch.no_grad():
        prune(model, 0.5, criterion=Sensitivity(window=2), data=batches())
        assert not torch.is_grad_enabled()
    assert sum(pruned_units(model, Weight()).values()) == 139


# ------------------------------------------------------------------------------------------------ data and loss


@pytest.mark.parametrize("criterion", NEED_DATA, ids=str)
def test_missing_data_is_refused(criterion: Criterion) -> None:
    name = type(criterion).__name__
    with pytest.raises(ValueError, match=f"data must be given: {name} needs {criterion.needs}, got None"):
        prune(net(), 0.5, criterion=criterion)


@pytest.mark.parametrize("criterion", NEED_DATA, ids=str)
def test_empty_data_is_refused(criterion: Criterion) -> None:
    with pytest.raises(ValueError, match="data, or samples, must have a batch, got none"):
        prune(net(), 0.5, criterion=criterion, data=[])


@pytest.mark.parametrize("criterion", NEED_DATA, ids=str)
def test_no_more_batches_are_taken_than_the_window_holds(criterion: Criterion) -> None:
    stream = iter(batches(5))
    prune(net(), 0.5, criterion=criterion, data=stream)
    assert len(list(stream)) == 3


@pytest.mark.parametrize("criterion", NEED_DATA, ids=str)
def test_fewer_batches_than_the_window_will_do(criterion: Criterion) -> None:
    assert prune(net(), 0.5, criterion=criterion, data=batches(1)).sparsity == 0.5


@pytest.mark.parametrize("criterion", NEED_DATA, ids=str)
def test_a_layer_of_which_nothing_is_seen_is_refused(criterion: Criterion) -> None:
    model = net()
    model.register_module("unused", nn.Linear(2, 2))
    model.forward = nn.Sequential(*list(model)[:8]).forward  # type: ignore[method-assign]
    message = rf"{type(criterion).__name__} needs a .* of 'unused\.weight', got none in 2 steps: ignore the parameter"
    with pytest.raises(ValueError, match=message):
        prune(model, 0.5, criterion=criterion, data=batches())
    assert "unused.weight" not in prune(model, 0.5, criterion=criterion, data=batches(), ignore=["unused.*"])


@pytest.mark.parametrize(
    ("target", "loss"),
    [
        pytest.param(torch.tensor([1, 0]), nn.functional.cross_entropy, id="classes"),
        pytest.param(torch.tensor([[0.5, 1.0], [2.0, 3.0]]), nn.functional.mse_loss, id="numbers"),
        pytest.param(torch.tensor([1, 0], dtype=torch.uint8), None, id="bytes"),
    ],
)
def test_the_default_loss_follows_the_targets(target: Tensor, loss: Callable[..., Tensor] | None) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 2)
    x = torch.randn(2, 6)
    expected = prune(
        copy.deepcopy(layer),
        0.5,
        criterion=Sensitivity(),
        data=[x],
        loss=lambda model, batch: (loss or nn.functional.cross_entropy)(
            model(batch), target if loss else target.long()
        ),
    )
    found = prune(copy.deepcopy(layer), 0.5, criterion=Sensitivity(), data=[(x, target)])
    assert torch.equal(found["weight"], expected["weight"])


@pytest.mark.parametrize(
    ("batch", "kind"),
    [(torch.rand(2, 6), "Tensor"), ((torch.rand(2, 6),) * 3, "tuple"), ({"x": torch.rand(2, 6)}, "dict")],
)
def test_a_batch_that_needs_a_loss_is_refused_without_one(batch: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"loss must be given where a batch is not \(inputs, targets\), got a {kind}"):
        prune(nn.Linear(6, 2), 0.5, criterion=Sensitivity(), data=[batch])


class Pair(NamedTuple):
    x: Tensor
    y: dict[str, list[Tensor]]


def test_a_loss_gets_the_batch_as_the_data_gave_it() -> None:
    seen: list[Any] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch)
        x = batch.x if isinstance(batch, Pair) else batch[0]
        output: Tensor = model(x).square().mean()
        return output

    x = torch.rand(2, 6)
    data: list[Any] = [Pair(x, {"y": [x, x]}), (x, "a string", 3), [x, None]]
    prune(nn.Linear(6, 2), 0.5, criterion=Sensitivity(), data=data, loss=loss)
    assert [type(batch) for batch in seen] == [Pair, tuple, list]
    assert seen[0].y["y"][1].tolist() == x.tolist()
    assert seen[1][1:] == ("a string", 3)


@pytest.mark.parametrize("sequential", [None, "1"])
def test_a_loss_is_run_for_forward_passes_too(sequential: str | None) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    other, inputs = copy.deepcopy(model), torch.rand(5, 3)
    grads: list[bool] = []

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        grads.append(torch.is_grad_enabled())
        return model(batch["inputs"]).sum()

    arguments: dict[str, Any] = {"criterion": Wanda(), "scope": "local", "sequential": sequential}
    masks = prune(model, 0.5, data=[{"inputs": inputs}], loss=loss, **arguments)
    expected = prune(other, 0.5, data=[inputs], **arguments)
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())
    assert set(grads) == {False}


def test_a_loss_may_use_a_model_in_parts() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(3, 4), "decoder": nn.Linear(4, 3)})

    def loss(model: Any, batch: Tensor) -> Tensor:
        return nn.functional.mse_loss(model["decoder"](model["encoder"](batch)), batch)

    masks = prune(model, 0.5, criterion=Sensitivity(), data=[torch.rand(5, 3)], loss=loss)
    assert masks.sparsity == 0.5


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, None), lambda x: [x]], ids=["tensor", "tuple", "list"])
def test_inputs_of_forward_passes_are_the_first_of_a_batch(wrap: Callable[[Tensor], Any]) -> None:
    masks = prune(net(), 0.5, criterion=Entropy(window=1), data=[wrap(torch.randn(3, 1, 6, 6))])
    assert masks.sparsity == 0.5


def test_a_batch_that_is_a_mapping_goes_to_the_model_as_it_is() -> None:
    class FromDict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            output: Tensor = self.fc(batch["x"])
            return output

    assert prune(FromDict(), 0.5, criterion=Entropy(), data=[{"x": torch.rand(4, 3)}]).sparsity == 0.5


# ------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must be in [0, 1), got 1.0"),
        ({}, "give either sparsity or threshold"),
        ({"sparsity": 0.5, "threshold": 1.0}, "give either sparsity or threshold"),
        ({"sparsity": 0.5, "scope": "globel"}, "scope must be one of ['erk', 'global', 'lamp', 'local'] or a callable"),
        ({"sparsity": 0.5, "targets": ["6.*"]}, "targets must match a parameter, got '6.*'"),
        ({"sparsity": {"6.*": 0.5}}, "got '6.*'; close names"),
        ({"sparsity": 0.5, "ignore": ["*"]}, "the model must have a prunable parameter"),
    ],
)
def test_wrong_arguments_are_refused_before_any_data_is_read(arguments: dict[str, Any], message: str) -> None:
    stream = iter(batches())
    with pytest.raises(ValueError, match=re.escape(message)):
        prune(net(), criterion=Sensitivity(), data=stream, **arguments)
    assert len(list(stream)) == 2


def test_a_model_with_only_lazy_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="the model must have a prunable parameter"):
        prune(nn.Sequential(nn.LazyLinear(3)), 0.5)


def test_a_frozen_model_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"frozen: \['0\.weight', '5\.weight', '7\.weight'\]"):
        prune(net().requires_grad_(False), 0.5)


@pytest.mark.parametrize("criterion", [SNIP(), GraSP()], ids=str)
def test_at_initialisation_batch_norms_normalise_by_the_batch(criterion: Criterion) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.9), nn.Linear(8, 3))
    data = [(torch.randn(64, 4) + 3, torch.randint(0, 3, (64,)))]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    seen: list[tuple[bool, bool]] = []
    model[3].register_forward_pre_hook(lambda dropout, inputs: seen.append((model[1].training, dropout.training)))

    def loss(norm: bool) -> Loss:
        def loss(model: Any, batch: Any) -> Tensor:
            model[1].train(norm)
            return nn.functional.cross_entropy(model(batch[0]), batch[1])

        return loss

    by_batch, by_running = (
        prune(copy.deepcopy(model), 0.5, criterion=criterion, data=data, loss=loss(norm)) for norm in (True, False)
    )
    seen.clear()
    masks = prune(model, 0.5, criterion=criterion, data=data)
    assert set(seen) == {(True, False)}
    assert model[1].training
    assert model[3].training
    assert all(torch.equal(masks[name], mask) for name, mask in by_batch.items())
    assert any(not torch.equal(masks[name], mask) for name, mask in by_running.items())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


class Sized(dict):
    """A batch that knows something beside its tensors."""

    size = 2


def test_batches_of_every_kind_reach_the_loss_as_they_are() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.rand(3, 6), torch.rand(2, 6)])
    data = [Sized(x=torch.rand(2, 6)), {"x": [torch.rand(2, 6)]}, Pair(torch.rand(2, 6), "y"), packed]
    seen: list[Any] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch)
        x = batch["x"] if isinstance(batch, dict) else batch[0]
        return model(x[0] if isinstance(x, list) else x).square().mean()

    prune(nn.Linear(6, 2), 0.5, criterion=Sensitivity(), data=data, loss=loss)
    assert [type(batch) for batch in seen] == [type(batch) for batch in data]
    assert seen[0].size == 2
    assert seen[3].batch_sizes.tolist() == [2, 2, 1]
    assert type(convert(packed, torch.device("meta"))) is type(packed)


@pytest.mark.parametrize("criterion", [Wanda(), Entropy(), APoZ()], ids=lambda criterion: type(criterion).__name__)
def test_what_a_criterion_cannot_score_is_left_out_before_the_data(criterion: Criterion) -> None:
    layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True)
    model, data = nn.TransformerEncoder(layer, 2), [torch.randn(4, 5, 12) for _ in range(2)]
    before = model.layers[0].self_attn.out_proj.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"prune leaves out what \w+ cannot score: .*out_proj.weight: its"):
        masks = prune(model, 0.5, criterion=criterion, data=data, loss=lambda model, batch: model(batch).mean())
    assert {"layers.0.linear1.weight", "layers.1.linear2.weight"} <= masks.keys()
    assert masks.sparsity == pytest.approx(0.5, abs=0.01)
    assert torch.equal(model.layers[0].self_attn.out_proj.weight, before)
