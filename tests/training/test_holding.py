"""MaskEnforcement: zeros survive every step of every kind of optimizer, and nothing stays behind afterwards."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from foreign import Divided, ScheduleFree, Shampoo
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_prune.training.enforcement import MaskEnforcement, is_elementwise, reset_elements

MASK = torch.tensor([[True, False], [False, True]])


def layer() -> nn.Linear:
    linear = nn.Linear(2, 2)
    linear.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    linear.bias.data = torch.tensor([5.0, 6.0])
    return linear


def held(model: nn.Module, optimizer: Optimizer | None = None, **masks: Tensor) -> MaskEnforcement:
    enforcement = MaskEnforcement()
    enforcement.enforce(dict(model.named_parameters()), masks or {"weight": MASK})
    if optimizer is not None:
        enforcement.attach(optimizer)
    return enforcement


def step(optimizer: Optimizer, model: nn.Module) -> None:
    optimizer.zero_grad()
    (model(torch.ones(1, 2)) - 20.0).square().sum().backward()
    optimizer.step()


def hooks(optimizer: Optimizer) -> int:
    return len(optimizer._optimizer_step_post_hooks) + len(optimizer._optimizer_step_pre_hooks)


# ------------------------------------------------------------------------------------------------ zeros stay


def test_holding_applies_the_masks_at_once() -> None:
    linear = layer()
    held(linear)
    assert linear.weight.tolist() == [[1.0, 0.0], [0.0, 4.0]]
    assert linear.bias.tolist() == [5.0, 6.0]


OPTIMIZERS: list[Any] = [
    pytest.param(lambda ps: SGD(ps, 0.1, momentum=0.9, weight_decay=0.1), id="SGD"),
    pytest.param(lambda ps: SGD(ps, 0.1, momentum=0.9, nesterov=True, foreach=True), id="SGD foreach"),
    pytest.param(lambda ps: SGD(ps, 0.1, momentum=0.9, fused=True), id="SGD fused"),
    pytest.param(lambda ps: torch.optim.Adam(ps, 0.1, weight_decay=0.1), id="Adam"),
    pytest.param(lambda ps: torch.optim.AdamW(ps, 0.1, amsgrad=True), id="AdamW"),
    pytest.param(lambda ps: torch.optim.AdamW(ps, 0.1, fused=True), id="AdamW fused"),
    pytest.param(lambda ps: torch.optim.RMSprop(ps, 0.1, momentum=0.9), id="RMSprop"),
    pytest.param(lambda ps: torch.optim.Adagrad(ps, 0.1), id="Adagrad"),
    pytest.param(lambda ps: torch.optim.Rprop(ps, 0.1), id="Rprop"),
]


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_zeros_stay_after_every_step(build: Callable[[Iterable[nn.Parameter]], Optimizer]) -> None:
    linear = layer()
    optimizer = build(linear.parameters())
    for _ in range(3):
        step(optimizer, linear)  # momentum that was gathered before there were masks must not bring weights back
    enforcement = held(linear, optimizer)
    before = linear.weight.detach().clone()
    for _ in range(4):
        step(optimizer, linear)
        assert (linear.weight[~MASK] == 0).all()
    assert (linear.weight[MASK] != before[MASK]).all()
    assert enforcement.stepped


def test_kept_weights_move_as_without_masks() -> None:
    # the masked weights are zero, so the outputs are those of a layer that never had them
    linear = layer()
    linear.weight.data *= MASK
    free = nn.ParameterList([torch.tensor([1.0, 4.0]), torch.tensor([5.0, 6.0])])
    one, two = (SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01) for model in (linear, free))
    held(linear, one)
    for _ in range(3):
        step(one, linear)
        two.zero_grad()
        (free[0] + free[1] - 20.0).square().sum().backward()
        two.step()
    assert linear.weight.diagonal().tolist() == pytest.approx(free[0].tolist())
    assert linear.bias.tolist() == pytest.approx(free[1].tolist())


def test_a_step_with_a_closure() -> None:
    linear = layer()
    optimizer = SGD(linear.parameters(), 0.1)
    held(linear, optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (linear(torch.ones(1, 2)) - 10.0).square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    # row sums 1 + 5 and 4 + 6: (6 - 10)^2 + (10 - 10)^2
    assert loss == 16.0  # type: ignore[comparison-overlap]
    assert linear.weight[0].tolist() == pytest.approx([1.8, 0.0])  # 1 - 0.1 * 2 * (6 - 10)


class Outer(SGD):
    """Steps as SGD does, and then moves every parameter once more."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(1.0)
        return loss


def test_an_optimizer_that_calls_the_step_of_its_base() -> None:
    linear = layer()
    optimizer = Outer(linear.parameters(), lr=0.0)
    held(linear, optimizer)
    step(optimizer, linear)
    assert linear.weight.tolist() == [[2.0, 0.0], [0.0, 5.0]]


def test_parameter_groups_that_are_added_later_are_held() -> None:
    model = nn.Sequential(layer(), layer())
    optimizer = SGD(model[0].parameters(), 0.1)
    held(model, optimizer, **{"0.weight": MASK, "1.weight": ~MASK})
    optimizer.add_param_group({"params": model[1].parameters()})
    step(optimizer, model)
    assert (model[0].weight[~MASK] == 0).all()
    assert (model[1].weight[MASK] == 0).all()
    assert (model[1].weight[~MASK] != 0).all()


def test_new_masks_replace_the_old_ones() -> None:
    linear = layer()
    optimizer = SGD(linear.parameters(), 0.1)
    enforcement = held(linear, optimizer)
    enforcement.enforce(dict(linear.named_parameters()), {"weight": torch.tensor([[False, True], [True, True]])})
    assert linear.weight.tolist() == [[0.0, 0.0], [0.0, 4.0]]
    step(optimizer, linear)
    assert linear.weight[0, 0] == 0
    assert (linear.weight[[0, 1], [1, 0]] != 0).all()


# ------------------------------------------------------------------------------------------------ its own only


def test_an_optimizer_holds_its_own_parameters_only() -> None:
    a, b = layer(), layer()
    model = nn.ModuleDict({"a": a, "b": b})
    first, second = SGD(a.parameters(), 0.1), SGD(b.parameters(), 0.1)
    enforcement = held(model, first, **{"a.weight": MASK, "b.weight": MASK})
    enforcement.attach(second)
    b.weight.data.fill_(1.0)  # as if it were in the middle of something
    version = b.weight._version
    step(first, a)
    assert b.weight.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert b.weight._version == version
    step(second, b)
    assert (b.weight[~MASK] == 0).all()


def test_a_graph_of_other_parameters_can_still_be_differentiated() -> None:
    # as a generator and its discriminator do: both forwards first, then step after step
    a, b = layer(), layer()
    first, second = SGD(a.parameters(), 0.1), SGD(b.parameters(), 0.1)
    enforcement = held(nn.ModuleDict({"a": a, "b": b}), first, **{"a.weight": MASK, "b.weight": MASK})
    enforcement.attach(second)
    x = torch.ones(1, 2, requires_grad=True)
    loss_a, loss_b = a(x).sum(), b(x).sum()
    loss_a.backward()
    first.step()
    loss_b.backward()
    second.step()
    assert (a.weight[~MASK] == 0).all()
    assert (b.weight[~MASK] == 0).all()


def test_parameters_that_no_optimizer_has_are_held_on_demand() -> None:
    linear = layer()
    enforcement = held(linear)
    linear.weight.data.fill_(1.0)
    enforcement.apply()
    assert linear.weight.tolist() == MASK.float().tolist()


# ------------------------------------------------------------------------------------------------ attach, release


def test_attaching_twice_is_attaching_once() -> None:
    linear = layer()
    optimizer = SGD(linear.parameters(), 0.1)
    enforcement = held(linear, optimizer)
    enforcement.attach(optimizer)
    assert hooks(optimizer) == 1


def test_after_release_no_hook_remains_and_weights_move_freely() -> None:
    linear = layer()
    optimizers = [SGD([linear.weight], 0.1), SGD([linear.bias], 0.1)]
    enforcement = held(linear, optimizers[0])
    enforcement.attach(optimizers[1], before=lambda optimizer: None)
    assert [hooks(optimizer) for optimizer in optimizers] == [1, 2]
    enforcement.release()
    assert [hooks(optimizer) for optimizer in optimizers] == [0, 0]
    step(optimizers[0], linear)
    assert (linear.weight[0] != 0).all()


def test_release_applies_the_masks_once_more_and_may_be_repeated() -> None:
    linear = layer()
    optimizer = SGD(linear.parameters(), 0.1)
    enforcement = held(linear, optimizer)
    linear.weight.data.fill_(1.0)
    enforcement.release()
    assert linear.weight.tolist() == MASK.float().tolist()
    linear.weight.data.fill_(1.0)
    enforcement.release()
    assert linear.weight.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_what_was_released_can_hold_again() -> None:
    linear = layer()
    optimizer = SGD(linear.parameters(), 0.1)
    enforcement = held(linear, optimizer)
    enforcement.release()
    enforcement.enforce(dict(linear.named_parameters()), {"weight": MASK})
    enforcement.attach(optimizer)
    step(optimizer, linear)
    assert (linear.weight[~MASK] == 0).all()
    assert hooks(optimizer) == 1


def test_other_hooks_of_an_optimizer_are_left_alone() -> None:
    linear = layer()
    optimizer = SGD(linear.parameters(), 0.1)
    seen: list[str] = []
    optimizer.register_step_post_hook(lambda *args: seen.append("after"))
    optimizer.register_step_pre_hook(lambda *args: seen.append("before"))  # type: ignore[arg-type, func-returns-value]
    held(linear, optimizer).release()
    step(optimizer, linear)
    assert seen == ["before", "after"]


def test_what_is_to_be_done_before_a_step_sees_gradients_and_old_weights() -> None:
    linear = layer()
    optimizer = SGD(linear.parameters(), 0.1)
    seen: list[Any] = []

    def before(stepping: Optimizer) -> None:
        seen.append((stepping, linear.weight.grad is not None, linear.weight.tolist()))

    enforcement = MaskEnforcement()
    enforcement.enforce(dict(linear.named_parameters()), {"weight": MASK})
    enforcement.attach(optimizer, before)
    step(optimizer, linear)
    assert seen == [(optimizer, True, [[1.0, 0.0], [0.0, 4.0]])]


def test_an_optimizer_says_that_it_has_stepped() -> None:
    linear = layer()
    optimizer = SGD(linear.parameters(), 0.1)
    enforcement = held(linear, optimizer)
    assert not enforcement.stepped
    step(optimizer, linear)
    assert enforcement.stepped
    enforcement.stepped = False
    step(optimizer, linear)
    assert enforcement.stepped


class Bare(Optimizer):
    """An optimizer that was not set up as one."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        self.param_groups = [{"params": list(params)}]

    def step(self, closure: Any = None) -> None:
        return None


def test_an_optimizer_without_the_set_up_of_torch_is_refused() -> None:
    linear = layer()
    with pytest.raises(TypeError, match=r"set up by torch\.optim\.Optimizer\.__init__, got Bare without it"):
        MaskEnforcement().attach(Bare(linear.parameters()))


# ------------------------------------------------------------------------------------------------ gradients


def test_gradients_of_pruned_weights_are_zeroed() -> None:
    linear = layer()
    optimizer = SGD(linear.parameters(), 0.1)
    enforcement = held(linear, optimizer)
    linear.weight.grad = torch.tensor([[3.0, 100.0], [-100.0, 4.0]])
    linear.bias.grad = torch.ones(2)
    enforcement.mask_gradients(optimizer)
    assert linear.weight.grad.tolist() == [[3.0, 0.0], [0.0, 4.0]]
    assert linear.bias.grad.tolist() == [1.0, 1.0]
    assert nn.utils.get_total_norm([linear.weight.grad]) == 5.0


def test_gradients_that_are_missing_or_not_its_own_are_left() -> None:
    model = nn.ModuleDict({"a": layer(), "b": layer()})
    optimizer = SGD(model["a"].parameters(), 0.1)
    enforcement = held(model, optimizer, **{"a.weight": MASK, "b.weight": MASK})
    model["b"].weight.grad = torch.ones(2, 2)
    enforcement.mask_gradients(optimizer)
    assert model["a"].weight.grad is None
    assert model["b"].weight.grad.tolist() == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("mask", [[[1, 0], [0, 1], [1, 1]], [[1, 1], [0, 0], [1, 1]]], ids=["entries", "rows"])
def test_sparse_gradients_of_pruned_weights_are_zeroed(mask: list[list[int]]) -> None:
    table, mask = nn.Embedding(3, 2, sparse=True), torch.tensor(mask).bool()
    optimizer = SGD(table.parameters(), 0.1)
    enforcement = held(table, optimizer, weight=mask)
    table(torch.tensor([0, 1, 1])).sum().backward()  # not coalesced: row 1 twice
    enforcement.mask_gradients()
    assert table.weight.grad is not None
    assert table.weight.grad.to_dense().tolist() == (torch.tensor([[1.0], [2.0], [0.0]]) * mask).tolist()
    optimizer.step()
    assert (table.weight[~mask] == 0).all()


# ------------------------------------------------------------------------------------------------ kinds of optimizers


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_an_entrywise_optimizer_moves_kept_weights_alike_whatever_the_gradients_of_pruned_ones(
    build: Callable[[Iterable[nn.Parameter]], Optimizer],
) -> None:
    layers = [layer(), layer()]
    for linear, masked in zip(layers, (False, True), strict=True):
        optimizer = build(linear.parameters())
        assert is_elementwise(optimizer)
        enforcement = held(linear, optimizer)
        for _ in range(3):
            linear.weight.grad = torch.tensor([[1.0, 50.0], [-50.0, 2.0]])
            linear.bias.grad = torch.ones(2)
            if masked:
                enforcement.mask_gradients(optimizer)
            optimizer.step()
    assert torch.equal(layers[0].weight, layers[1].weight)


@pytest.mark.parametrize("build", [torch.optim.LBFGS, lambda ps: Outer(ps, lr=0.1)])
def test_other_optimizers_are_not_taken_for_entrywise(build: Callable[[Iterable[nn.Parameter]], Optimizer]) -> None:
    assert not is_elementwise(build(layer().parameters()))


def test_lbfgs_forgets_steps_under_other_masks() -> None:
    linear = layer()
    optimizer = torch.optim.LBFGS(linear.parameters())
    optimizer.state[linear.weight]["old_dirs"] = [torch.ones(6)]
    reset_elements(optimizer, linear.weight, ~MASK)
    assert not optimizer.state


INITIAL: list[Any] = [  # an optimizer, and what the entries of its state begin with
    pytest.param(lambda ps: SGD(ps, 0.1, momentum=0.9), {"momentum_buffer": 0.0}, id="SGD"),
    pytest.param(
        lambda ps: torch.optim.AdamW(ps, 0.1, amsgrad=True),
        {"exp_avg": 0.0, "exp_avg_sq": 0.0, "max_exp_avg_sq": 0.0},
        id="AdamW",
    ),
    pytest.param(lambda ps: torch.optim.Adamax(ps, 0.1), {"exp_avg": 0.0, "exp_inf": 0.0}, id="Adamax"),
    pytest.param(
        lambda ps: torch.optim.RMSprop(ps, 0.1, momentum=0.9, centered=True),
        {"square_avg": 0.0, "grad_avg": 0.0, "momentum_buffer": 0.0},
        id="RMSprop",
    ),
    pytest.param(lambda ps: torch.optim.Adadelta(ps, 0.1), {"square_avg": 0.0, "acc_delta": 0.0}, id="Adadelta"),
    pytest.param(lambda ps: torch.optim.Adagrad(ps, 0.1, initial_accumulator_value=0.5), {"sum": 0.5}, id="Adagrad"),
    pytest.param(lambda ps: torch.optim.Rprop(ps, 0.1), {"prev": 0.0, "step_size": 0.1}, id="Rprop"),
    pytest.param(lambda ps: torch.optim.ASGD(ps, 0.1), {"ax": 0.0}, id="ASGD"),
    pytest.param(lambda ps: Outer(ps, lr=0.1, momentum=0.9), {"momentum_buffer": 0.0}, id="subclass"),
    pytest.param(ScheduleFree, {"z": 0.0}, id="ScheduleFree"),
]


@pytest.mark.parametrize(("make", "initial"), INITIAL)
def test_changed_entries_start_afresh_and_the_others_keep_their_state(
    make: Callable[[Iterable[nn.Parameter]], Optimizer], initial: dict[str, float]
) -> None:
    linear = layer()
    with torch.no_grad():
        linear.weight[1, 1] = -9.0
    optimizer = make(linear.parameters())
    step(optimizer, linear)
    step(optimizer, linear)
    before = {parameter: copy.deepcopy(state) for parameter, state in optimizer.state.items()}
    reset_elements(optimizer, linear.weight, MASK)
    assert initial.keys() <= optimizer.state[linear.weight].keys()
    for key, value in before[linear.weight].items():
        kept = value.masked_fill(MASK, initial[key]) if value.shape == MASK.shape else value
        assert torch.equal(optimizer.state[linear.weight][key], kept), key
    for key, value in before[linear.bias].items():
        assert torch.equal(optimizer.state[linear.bias][key], value), key


def test_the_first_step_size_of_rprop_is_that_before_a_scheduler() -> None:
    linear = layer()
    optimizer = torch.optim.Rprop(linear.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
    step(optimizer, linear)
    scheduler.step()
    reset_elements(optimizer, linear.weight, MASK)
    assert optimizer.state[linear.weight]["step_size"].tolist() == [[pytest.approx(0.1)] * 2] * 2


@pytest.mark.parametrize("make", [Shampoo, Divided])
def test_of_other_optimizers_neither_divisors_nor_preconditioners_are_reset(
    make: Callable[[Iterable[nn.Parameter]], Optimizer],
) -> None:
    linear = layer()
    optimizer = make(linear.parameters())
    for mask in (MASK, ~MASK, MASK):
        step(optimizer, linear)
        reset_elements(optimizer, linear.weight, mask)
        step(optimizer, linear)
    assert all(parameter.isfinite().all() for parameter in linear.parameters())
