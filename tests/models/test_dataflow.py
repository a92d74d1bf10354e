"""Dataflow: which norm follows which layer, and a trace of which the model notices nothing."""

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Channel, prune
from lightning_prune.models.norms import following_norms


def links(model: nn.Module) -> dict[str, str]:
    """Return the name of the norm behind each layer, by the name of the layer."""
    names = {module: name for name, module in model.named_modules()}
    return {names[layer]: names[norm] for layer, norm in following_norms(model).items()}


# ------------------------------------------------------------------------------------------------ in a sequence


@pytest.mark.parametrize(
    ("layer", "norm"),
    [
        (nn.Linear(2, 4), nn.BatchNorm1d(4)),
        (nn.Linear(2, 4), nn.LayerNorm(4)),
        (nn.Linear(2, 4), nn.RMSNorm(4)),
        (nn.Linear(2, 4), nn.GroupNorm(2, 4)),
        (nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4)),
        (nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)),
        (nn.Conv2d(2, 4, 1), nn.SyncBatchNorm(4)),
        (nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4)),
        (nn.Conv2d(2, 4, 1), nn.InstanceNorm2d(4, affine=True)),
        (nn.Conv3d(2, 4, 1), nn.BatchNorm3d(4)),
        (nn.ConvTranspose2d(2, 4, 1), nn.BatchNorm2d(4)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_norm_behind_a_layer_is_found(layer: nn.Module, norm: nn.Module) -> None:
    assert links(nn.Sequential(layer, norm, nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))) == {"0": "1"}


@pytest.mark.parametrize(
    ("layer", "norm"),
    [
        (nn.Conv2d(2, 4, 1), nn.LayerNorm(4)),  # over the width
        (nn.Conv1d(2, 4, 1), nn.RMSNorm(4)),
        (nn.Linear(2, 4), nn.BatchNorm2d(4)),  # over the second of four dimensions
        (nn.Linear(2, 4), nn.InstanceNorm2d(4, affine=True)),
        (nn.Embedding(4, 4), nn.LayerNorm(4)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_norm_over_another_dimension_is_not_linked(layer: nn.Module, norm: nn.Module) -> None:
    assert links(nn.Sequential(layer, norm)) == {}
    if not isinstance(layer, nn.Embedding):
        assert not any(name.startswith("1.") for name in prune(nn.Sequential(layer, norm), 0.25, granularity=Channel()))


@pytest.mark.parametrize(
    "between",
    [nn.ReLU(), nn.LeakyReLU(), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.ELU(), nn.Dropout(), nn.Dropout1d(), nn.Identity()],
    ids=lambda module: type(module).__name__,
)
def test_what_keeps_zeros_may_lie_between(between: nn.Module) -> None:
    assert links(nn.Sequential(nn.Linear(2, 4), between, nn.BatchNorm1d(4))) == {"0": "2"}
    twice = nn.Sequential(nn.Linear(2, 4), between, nn.Dropout(), nn.BatchNorm1d(4), between, nn.Linear(4, 2))
    assert links(twice) == {"0": "3"}


@pytest.mark.parametrize(
    "between",
    [nn.Sigmoid(), nn.Softmax(1), nn.Flatten(), nn.Linear(4, 4), nn.Embedding(4, 4)],
    ids=lambda module: type(module).__name__,
)
def test_what_moves_zeros_or_channels_may_not(between: nn.Module) -> None:
    assert "0" not in links(nn.Sequential(nn.Linear(2, 4), between, nn.Identity(), nn.LayerNorm(4)))


def test_of_two_norms_the_first_is_behind_the_layer() -> None:
    assert links(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.LayerNorm(4))) == {"0": "1"}


def test_a_norm_in_front_of_a_layer_is_not_behind_it() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    assert links(model) == {"1": "2"}


def test_sequences_inside_sequences() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 1), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4))),
        nn.Sequential(nn.Conv2d(4, 3, 1)),
        nn.BatchNorm2d(3),
    )
    assert links(model) == {"0.0": "0.1.1", "1.0": "2"}


# ------------------------------------------------------------------------------------------------ in a forward


class Net(nn.Module):
    """Layers and norms that are declared in another order than they are called in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(5)
        self.norm1 = nn.BatchNorm1d(4)
        self.fc1 = nn.Linear(3, 4)
        self.fc2 = nn.Linear(4, 5)
        self.fc3 = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(nn.functional.relu(self.norm1(self.fc1(x))), 0.1, self.training)
        x = self.norm2(nn.functional.gelu(self.fc2(x)))
        out: Tensor = self.fc3(x)
        return out


def test_calls_decide_and_not_the_order_of_declaration() -> None:
    assert links(Net()) == {"fc1": "norm1", "fc2": "norm2"}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm2(self.conv2(nn.functional.relu(self.norm1(self.conv1(x)))))
        return nn.functional.relu(hidden + self.shortcut(x))


def test_residual_blocks() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), Block(2), Block(2), nn.BatchNorm2d(2))
    # the last norm follows a sum
    assert links(model) == {
        f"{i}.{layer}": f"{i}.{norm}"
        for i in (1, 2)
        for layer, norm in (("conv1", "norm1"), ("conv2", "norm2"), ("shortcut.0", "shortcut.1"))
    }


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.fc1 = nn.LayerNorm(4), nn.Linear(4, 8)
        self.norm2, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.norm2(self.fc1(self.norm1(x))))


def test_norms_in_front_of_their_layers() -> None:
    # fc1 is followed by norm2; what comes into norm1 of the second block is a sum
    assert links(nn.Sequential(PreActivation(), PreActivation())) == {"0.fc1": "0.norm2", "1.fc1": "1.norm2"}


class Twice(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.other = nn.LayerNorm(4), nn.LayerNorm(4)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        pytest.param(lambda m, x: m.norm(m.b(m.norm(m.a(x)))), {}, id="a norm behind two layers"),
        pytest.param(lambda m, x: m.norm(m.a(x)) + m.norm(x), {}, id="a norm that is used elsewhere"),
        pytest.param(lambda m, x: m.other(m.a(m.norm(m.a(x)))), {}, id="a layer in front of two norms"),
        pytest.param(lambda m, x: m.norm(m.a(m.a(x))), {}, id="a layer that is used twice"),
        pytest.param(lambda m, x: m.norm(m.a(x)) + m.other(m.b(x)), {"a": "norm", "b": "other"}, id="two branches"),
        pytest.param(lambda m, x: m.norm(m.a(x) + m.b(x)), {}, id="a sum"),
        pytest.param(lambda m, x: m.norm(m.a(x).sigmoid()), {}, id="a method"),
        pytest.param(lambda m, x: m.norm(torch.cat([m.a(x)], 1)), {}, id="a concatenation"),
    ],
)
def test_shared_and_reused_modules_are_not_linked(
    forward: Callable[[Any, Tensor], Tensor], expected: dict[str, str]
) -> None:
    assert links(Twice(forward)) == expected


def test_layers_with_tied_weights_are_two_layers() -> None:
    model = Twice(lambda m, x: m.norm(m.a(x)) + m.other(m.b(x)))
    model.b.weight = model.a.weight
    assert links(model) == {"a": "norm", "b": "other"}


# ------------------------------------------------------------------------------------------------ that cannot be traced


class Untraceable(nn.Module):
    """Control flow that depends on data."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            if x.sum() > 0:
                x = part(x)
        return x


def test_what_cannot_be_traced_is_searched_child_by_child() -> None:
    model = Untraceable(Net(), Untraceable(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))), nn.Linear(3, 3))
    assert links(model) == {
        "parts.0.fc1": "parts.0.norm1",
        "parts.0.fc2": "parts.0.norm2",
        "parts.1.parts.0.0": "parts.1.parts.0.1",
    }


def test_a_layer_of_ones_own_is_not_looked_into() -> None:
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x  # could not be traced

    class Gated(Net):
        def __init__(self) -> None:
            super().__init__()
            self.gate = Gate()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.gate(x))

    assert links(Gated()) == {"fc1": "norm1", "fc2": "norm2"}


def test_inside_what_cannot_be_traced_a_norm_has_no_layer() -> None:
    assert links(Untraceable(nn.Linear(4, 4), nn.LayerNorm(4))) == {}


def test_a_norm_shared_by_parts_that_are_traced_apart_is_not_linked() -> None:
    norm = nn.BatchNorm1d(3)
    model = Untraceable(nn.Sequential(nn.Linear(2, 3), norm), nn.Sequential(nn.Linear(2, 3), norm))
    assert links(model) == {}


def test_a_layer_shared_by_parts_that_are_traced_apart_is_not_linked() -> None:
    layer = nn.Linear(3, 3)
    model = Untraceable(nn.Sequential(layer, nn.LayerNorm(3)), nn.Sequential(layer, nn.LayerNorm(3)))
    assert links(model) == {}


@pytest.mark.parametrize("error", [RuntimeError, ValueError, TypeError, NotImplementedError, KeyError])
def test_a_forward_that_fails_is_no_error(error: type[Exception]) -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            raise error("needs more than that")

    assert links(Fails()) == {"body.0": "body.1"}


def test_without_a_norm_nothing_is_traced() -> None:
    class Counts(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            out: Tensor = self.fc(x)
            return out

    assert following_norms(Counts()) == {}
    assert Counts.calls == 0


@pytest.mark.slow
def test_a_compiled_layer_has_its_norm() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 4), nn.LayerNorm(4))
    named: dict[str, Any] = {"granularity": Channel(), "targets": ("*",)}
    plain = list(prune(copy.deepcopy(model), 0.5, **named))
    assert plain == ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "3.weight", "3.bias"]
    model[0] = torch.compile(model[0])
    model[2].compile()
    assert list(prune(model, 0.5, **named)) == plain
    assert list(prune(torch.compile(model), 0.5, **named)) == plain


# ------------------------------------------------------------------------------------------------ unnoticed


def test_hooks_of_the_user_do_not_run() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), Net())
    seen: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda m, args, name=name: seen.append(f"before {name}"))  # type: ignore[misc]
        module.register_forward_hook(lambda m, args, out, name=name: seen.append(f"after {name}"))  # type: ignore[misc]
    assert links(model) == {"0.0": "0.1", "1.fc1": "1.norm1", "1.fc2": "1.norm2"}
    assert seen == []


def test_hooks_for_all_modules_do_not_run() -> None:
    seen: list[nn.Module] = []
    handles = [
        nn.modules.module.register_module_forward_pre_hook(lambda m, args: seen.append(m)),
        nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(m)),
    ]
    try:
        links(Net())
    finally:
        for handle in handles:
            handle.remove()
    assert seen == []


class Busy(nn.Module):
    """A forward with every side effect that is usual."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
        self.calls = 0
        self.history: list[Any] = []
        self.cache: dict[str, Any] = {"hidden": None}
        self.last: Any = None
        self.register_buffer("count", torch.zeros(2))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count.add_(1)  # type: ignore[operator]
        hidden = self.fc(x)
        self.last = hidden
        self.history.append(hidden)
        self.cache["hidden"] = self.cache["output"] = hidden
        self.mean = 0.9 * self.mean + 0.1 * hidden.mean(0)
        self.extra = torch.randn(3)
        if random.random() < 0.5:
            hidden = hidden * 1.0
        return self.norm(hidden) + torch.rand(3)  # type: ignore[no-any-return]


def nested() -> nn.Module:
    return nn.Sequential(Busy(), nn.Linear(3, 2))


@pytest.mark.parametrize("build", [Busy, nested])
@pytest.mark.parametrize("traceable", [True, False])
def test_a_trace_leaves_attributes_and_buffers_as_they_were(build: Callable[[], nn.Module], traceable: bool) -> None:
    model = build() if traceable else Untraceable(build())
    busy = next(module for module in model.modules() if isinstance(module, Busy))
    busy.history.append("something")
    history, cache, count = busy.history, busy.cache, busy.count
    following_norms(model)
    assert (busy.calls, busy.last, busy.history, busy.cache) == (0, None, ["something"], {"hidden": None})
    assert busy.history is history
    assert busy.cache is cache
    assert busy.count is count
    assert (busy.count.tolist(), busy.mean.tolist()) == ([0.0] * 2, [0.0] * 3)
    assert not hasattr(busy, "extra")


@pytest.mark.parametrize("build", [Busy, nested])
def test_a_trace_leaves_a_model_that_can_be_copied_saved_and_used(build: Callable[[], nn.Module]) -> None:
    model = build()
    before = pickle.dumps(model.state_dict())
    following_norms(model)
    assert pickle.dumps(model.state_dict()) == before
    copy.deepcopy(model)(torch.rand(4, 2))
    pickle.loads(pickle.dumps(model))
    model(torch.rand(4, 2)).sum().backward()


def test_a_trace_leaves_the_random_state_of_torch() -> None:
    model = Busy()
    before = torch.get_rng_state()
    following_norms(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_trace_leaves_the_random_state_of_python() -> None:
    model = Busy()
    before = random.getstate()
    following_norms(model)
    assert random.getstate() == before


def test_a_trace_leaves_hooks_modes_and_gradients() -> None:
    model = Net()
    model.norm1.eval()
    model.fc1.register_forward_hook(lambda m, args, out: None)
    model(torch.rand(4, 3)).sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    following_norms(model)
    assert [parameter.grad for parameter in model.parameters()] == grads
    assert (model.training, model.norm1.training, model.norm2.training) == (True, False, True)
    assert len(model.fc1._forward_hooks) == 1
    assert model(torch.rand(4, 3)).shape == (4, 2)
