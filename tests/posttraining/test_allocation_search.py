"""Evolve on models: what is tried is what is pruned, the weights come back, and a search resumes bit for bit."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import (
    NM,
    SNIP,
    Block,
    Channel,
    Criterion,
    Evolve,
    Magnitude,
    Masks,
    Pruning,
    Sensitivity,
    Wanda,
    prune,
    sparsegpt,
)

SMALL: dict[str, Any] = {"generations": 6, "offspring": 6, "survivors": (2, 1), "batches": (1, 3), "progress": False}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Net(nn.Module):
    """Three blocks, of which the second hardly does anything, and logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.norm, self.head = nn.BatchNorm1d(12), nn.Linear(12, 5)
        for parameter in self.layers[1].down.parameters():
            parameter.data.mul_(1e-3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def data(batches: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 12, generator=generator) for _ in range(batches)]


@torch.no_grad()
def divergence(model: nn.Module, dense: nn.Module) -> float:
    """The mean over all inputs of KL(dense || model), from its definition."""
    p, q = (torch.cat([net.eval()(x) for x in data()]).softmax(-1) for net in (dense, model))
    return float((p * (p / q).log()).sum(-1).mean())


def pruned(scope: Any, sparsity: float = 0.6, **axes: Any) -> tuple[nn.Module, Masks]:
    model = Net()
    masks = prune(model, sparsity, **{"criterion": Wanda(), "data": data(), "scope": scope, **axes})
    return model, masks


def zeros(masks: Masks) -> int:
    return sum(int((~mask).sum()) for mask in masks.values())


def bits(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found |= {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {f"mode of {name}": module.training for name, module in model.named_modules()}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in other.items():
        assert torch.equal(one[name], value) if isinstance(value, Tensor) else one[name] == value, name


# ------------------------------------------------------------------------------------------------ what it finds


def test_the_layers_that_matter_keep_more() -> None:
    dense = Net()
    even, _ = pruned("local", 0.85)
    model, masks = pruned(Evolve(generations=10, offspring=8, progress=False), 0.85)
    assert divergence(model, dense) < 0.3 * divergence(even, dense)
    found = masks.sparsities()
    assert found["layers.1.up.weight"] > 0.9 > 0.5 > found["head.weight"]


@pytest.mark.parametrize("seed", range(3))
def test_it_is_never_worse_than_where_it_began(seed: int) -> None:
    dense = Net()
    even, _ = pruned(Evolve().start, 0.5)
    model, _ = pruned(Evolve(**{**SMALL, "generations": 1, "offspring": 2, "step": 1.0}, seed=seed), 0.5)
    assert divergence(model, dense) <= divergence(even, dense) + 1e-7


@pytest.mark.parametrize(
    "axes",
    [
        {},
        {"criterion": Magnitude()},
        {"criterion": SNIP(window=2), "data": [(x, torch.zeros(8, dtype=torch.long)) for x in data()]},
        {"sequential": "layers"},
        {"sequential": "layers", "refine": 3},
        {"sequential": "layers", "reconstruct": True},
        {"criterion": Magnitude(), "reconstruct": True},
        {"rounds": 2},
        {"sequential": "layers", "rounds": 2},
        {"min_density": 0.3},
        {"granularity": Block(2, 2), "ignore": ["head.*"]},
        {"targets": ["layers.*"], "ignore": ["*.down.*"]},
        {"loss": lambda model, batch: model(batch).square().mean()},
    ],
    ids=", ".join,
)
def test_it_goes_with_all_that_prune_takes_and_counts_are_exact(axes: dict[str, Any]) -> None:
    model, masks = pruned(Evolve(**SMALL), **axes)
    total = sum(mask.numel() for mask in masks.values())
    assert zeros(masks) == 4 * round(0.6 * total / 4) if "granularity" in axes else zeros(masks) == round(0.6 * total)
    assert all(not dict(model.named_parameters())[name][~mask].any() for name, mask in masks.items())
    assert len({round(part, 2) for part in masks.sparsities().values()}) > 1, "as even as it began"
    assert all(mask.float().mean() >= axes.get("min_density", 0.0) - 0.01 for mask in masks.values())


@pytest.mark.parametrize("coupled", [False, True])
def test_channels_are_shared_out_as_well(coupled: bool) -> None:
    axes = {"granularity": Channel(coupled=coupled), "targets": ["*.up.weight"], "example_inputs": data()[0]}
    dense, scope = Net(), Evolve(generations=10, offspring=6, progress=False)
    for criterion in (Magnitude(), Sensitivity(window=4)):
        loss = {"loss": lambda model, batch: model(batch).square().mean()}
        more = loss if criterion.needs == "gradients" else {}
        even, _ = pruned("local", 0.5, criterion=criterion, **axes, **more)
        model, masks = pruned(scope, 0.5, criterion=criterion, **axes, **more)
        dead = {
            name: int((~mask.flatten(1).any(1)).sum()) for name, mask in masks.items() if name.endswith("up.weight")
        }
        assert sum(dead.values()) == 30
        assert dead["layers.1.up.weight"] == 18  # min_density keeps a tenth
        assert divergence(model, dense) < divergence(even, dense)


def test_sparsegpt_takes_it() -> None:
    dense, left = Net(), {}
    for scope in ("local", Evolve(**SMALL)):
        model = Net()
        masks = sparsegpt(model, 0.7, data=iter(data()), scope=scope)
        left[str(scope)[:5]] = divergence(model, dense)
    assert left["Evolv"] < left["local"]
    assert zeros(masks) == round(0.7 * sum(mask.numel() for mask in masks.values()))


def test_what_it_finds_can_be_pruned_while_training() -> None:
    _, masks = pruned(Evolve(**SMALL))
    levels = masks.sparsities()
    again = prune(Net(), levels, criterion=Wanda(), data=data())
    assert all(torch.equal(mask, again[name]) for name, mask in masks.items())
    assert Pruning(levels).sparsity_target.sparsity == levels


# ------------------------------------------------------------------------------------------------ what is measured


@pytest.mark.parametrize("held", [0, 1 << 18], ids=["streamed", "held"])
@pytest.mark.parametrize("criterion", [Wanda(), Magnitude()], ids=str)
def test_a_trial_has_the_zeros_of_the_masks(held: int, criterion: Criterion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_prune.updates.decision.HELD", held)
    seen: list[dict[str, Tensor]] = []

    def metric(model: nn.Module, batches: Any) -> float:
        seen.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        return float(model.head.weight.eq(0).sum())

    model, masks = pruned(Evolve(**SMALL, metric=metric), criterion=criterion)
    best = min(seen, key=lambda found: int(found["head.weight"].eq(0).sum()))
    assert int(best["head.weight"].eq(0).sum()) == int((~masks["head.weight"]).sum()) < round(0.6 * 60)
    now = dict(model.named_parameters())
    assert any(all(torch.equal(found[name], now[name]) for name in masks) for found in seen)


def test_the_metric_of_the_user_decides_and_gets_the_batches() -> None:
    counts = []

    def metric(model: nn.Module, batches: list[Tensor]) -> float:
        assert not model.training
        assert not torch.is_grad_enabled()
        counts.append(len(batches))
        return float(model.head.weight.count_nonzero())

    for mode, compare in (("max", int.__gt__), ("min", int.__lt__)):
        _, masks = pruned(Evolve(**SMALL, metric=metric, mode=mode))
        assert compare(int(masks["head.weight"].sum()), round(0.4 * 60))
    assert set(counts) == {1, 3, 4}


def test_mean_squared_error_is_for_other_outputs() -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 1))
    even, dense, inputs = copy.deepcopy(model), copy.deepcopy(model), data()
    with pytest.raises(
        ValueError, match=r'metric must be "mse" or a function .* got "kl" for an output of shape \(8, 1'
    ):
        prune(model, 0.6, scope=Evolve(**SMALL), data=inputs)
    prune(model, 0.6, scope=Evolve(**SMALL, metric="mse"), data=inputs)
    prune(even, 0.6, scope="local")
    with torch.no_grad():
        errors = [sum(float((net(x) - dense(x)).square().sum()) for x in inputs) for net in (model, even)]
    assert errors[0] < errors[1]


def test_logits_count_where_an_output_has_some() -> None:
    class Output(dict[str, Tensor]):
        @property
        def logits(self) -> Tensor:
            return self["logits"]

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Output:
            logits = self.net(x)
            return Output(loss=logits.square().mean(), logits=logits)

    masks = prune(Wrapped(), 0.6, criterion=Wanda(), data=data(), scope=Evolve(**SMALL))
    _, plain = pruned(Evolve(**SMALL))
    assert all(torch.equal(masks[f"net.{name}"], mask) for name, mask in plain.items())


def test_a_metric_is_needed_where_there_are_no_outputs_to_compare() -> None:
    with pytest.raises(ValueError, match=r"metric must be a function where the model does not return .*, got 'kl'"):
        pruned(Evolve(**SMALL), criterion=Magnitude(), loss=lambda model, batch: model.head(batch).square().mean())


# ------------------------------------------------------------------------------------------------ restored and resumed


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_model_comes_back_bit_for_bit(error: type[BaseException]) -> None:
    model, calls = Net(), []
    model(data()[0]).sum().backward()
    model.layers[0].eval()
    before, state = bits(model), torch.random.get_rng_state()

    def metric(net: nn.Module, batches: Any) -> float:
        calls.append(int(net.head.weight.eq(0).sum()))
        net.train()  # a careless one, which changes the statistics of norms and draws random numbers
        net(torch.randn(8, 12))
        if len(calls) == 9:
            raise error("stop")
        return float(len(calls))

    with pytest.raises(error, match="stop"):
        prune(model, 0.6, criterion=Wanda(), data=data(), scope=Evolve(**SMALL, metric=metric))
    assert calls[-1] > 0
    assert_same(bits(model), before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_only_what_is_pruned_changes() -> None:
    dense = Net().state_dict()
    model, masks = pruned(Evolve(**SMALL))
    for name, tensor in model.state_dict().items():
        expected = dense[name].masked_fill(~masks[name], 0.0) if name in masks else dense[name]
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("axes", [{}, {"sequential": "layers"}, {"rounds": 2}], ids=str)
def test_an_interrupted_search_resumes_bit_for_bit(axes: dict[str, Any], tmp_path: Path) -> None:
    calls: list[int] = []

    def metric(model: nn.Module, batches: list[Tensor]) -> float:
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return divergence(model, dense)

    path, dense = tmp_path / "trials.json", Net()
    settings = {**SMALL, "generations": 3, "metric": metric, "seed": 4}
    with pytest.raises(KeyboardInterrupt):
        pruned(Evolve(**settings, path=path), **axes)
    assert len(json.loads(path.read_text())["scores"]) == 14
    _, resumed = pruned(Evolve(**settings, path=path), **axes)
    both = len(calls)
    _, whole = pruned(Evolve(**settings), **axes)
    assert len(calls) - both == both - 1  # the trial that was interrupted was run again
    assert all(torch.equal(mask, resumed[name]) for name, mask in whole.items())


def test_more_generations_go_on_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "trials.json"
    pruned(Evolve(**SMALL, path=path))
    before = json.loads(path.read_text())["scores"]
    _, longer = pruned(Evolve(**{**SMALL, "generations": 8}, path=path))
    after = json.loads(path.read_text())["scores"]
    assert after[: len(before)] == before
    assert len(after) > len(before)
    _, whole = pruned(Evolve(**{**SMALL, "generations": 8}))
    assert all(torch.equal(mask, longer[name]) for name, mask in whole.items())


def test_a_file_of_another_search_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trials.json"
    pruned(Evolve(**SMALL, path=path))
    with pytest.raises(ValueError, match=r"path must hold the scores of this analysis or be new, .* \['criterion'\]"):
        pruned(Evolve(**SMALL, path=path), criterion=Magnitude())
    with pytest.raises(ValueError, match=r"which differs in \['data'\]"):
        pruned(Evolve(**SMALL, path=path), data=data(5))


def test_the_same_seed_gives_the_same_masks() -> None:
    (_, one), (_, other), (_, third) = (pruned(Evolve(**SMALL, seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(mask, other[name]) for name, mask in one.items())
    assert not all(torch.equal(mask, third[name]) for name, mask in one.items())


def test_the_bar_shows_generations_and_losses(capsys: pytest.CaptureFixture[str]) -> None:
    pruned(Evolve(**{**SMALL, "progress": True}))
    shown = capsys.readouterr().err
    assert "Evolve: 100%" in shown
    assert "6/6" in shown
    assert "loss=" in shown


# ------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"criterion": Magnitude(), "data": None}, "data must be given to try allocations on the model, got None"),
        ({"criterion": Magnitude(), "data": []}, "data must have a batch, got none"),
        ({"sparsity": None, "threshold": 0.1}, 'scope must share out one sparsity, of="units", to search'),
        ({"sparsity": {"*": 0.5}}, "scope must share out one sparsity"),
        ({"of": "parameters"}, "scope must share out one sparsity"),
        ({"granularity": NM(2, 4)}, r"scope must not search for NM\(n=2, m=4\), which leaves nothing to share out"),
    ],
)
def test_what_cannot_be_searched_is_refused(axes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruned(Evolve(**SMALL), **axes)
