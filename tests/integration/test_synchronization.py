"""No synchronisation with a device in the step path: a GPU is never made to wait for what the host wants to know."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from models import MLP, fit
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from variants import CRITERIA, GRANULARITIES, METHODS, label

from lightning_prune import Channel, ConstantSparsity, Criterion, Granularity, Pruning, SharedFanIn, Weight, prune
from lightning_prune.export.shared_fan_in import SharedFanInConv2d, SharedFanInLinear
from lightning_prune.training.enforcement import MaskEnforcement
from lightning_prune.training.masked import MaskedTraining
from lightning_prune.training.observed import ObservedTraining
from lightning_prune.training.scheduled import ScheduledTraining
from lightning_prune.updates.statistics import Observation

# operations whose result is on the host, or has a shape that depends on the values
WAIT = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount", "histc", "unique_dim", "_unique2"}


class Trap(TorchDispatchMode):
    """Notes what would make the host wait, while it is entered: in an update of masks, or between two updates."""

    def __init__(self) -> None:
        super().__init__()
        self.updating = False
        self.entered = 0
        self.found: dict[bool, list[str]] = {True: [], False: []}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        by_flags = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAIT or by_flags or (name == "repeat_interleave" and isinstance(args[0], Tensor)):
            self.found[self.updating].append(name)
        return func(*args, **(kwargs or {}))


def trapped(trap: Trap, function: Callable) -> Callable:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        trap.entered += 1
        with trap:
            return function(*args, **kwargs)

    return call


def updating(trap: Trap, function: Callable) -> Callable:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        before, trap.updating = trap.updating, True
        try:
            return function(*args, **kwargs)
        finally:
            trap.updating = before

    return call


def noted(trap: Trap, function: Callable) -> Callable:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _get_current_dispatch_mode() is trap:
            trap.found[trap.updating].append(function.__name__)
        return function(*args, **kwargs)

    return call


@pytest.fixture
def trap(monkeypatch: pytest.MonkeyPatch) -> Trap:
    """A trap that is entered by every hook that a training step runs through."""
    trap = Trap()
    for owner, name, wrapper in (
        (MaskedTraining, "on_before_optimizer_step", trapped),
        (MaskedTraining, "on_train_batch_end", trapped),
        (MaskEnforcement, "after_step", trapped),
        (Observation, "forward", trapped),
        (ScheduledTraining, "update", updating),
        (ObservedTraining, "find_units", updating),  # once a window
        *((Tensor, name, noted) for name in ("tolist", "numpy", "cpu")),  # on the CPU these dispatch nothing
    ):
        monkeypatch.setattr(owner, name, wrapper(trap, getattr(owner, name)))
    # few enough for the histogram to be there, and to grow, within the window
    monkeypatch.setattr("lightning_prune.criteria.entropy._CELLS", 16)
    monkeypatch.setattr("lightning_prune.criteria.entropy._CELLS_A_BIN", 1)
    monkeypatch.setattr("lightning_prune.criteria.histogram._is_on_host", lambda counts: False)
    return trap


GROUPED = [granularity for granularity in GRANULARITIES if not isinstance(granularity, Weight | Channel)]
CASES = [
    (criterion, *case)
    for turn, criterion in enumerate(CRITERIA)
    for case in ((Weight(), None), (Channel(), 0.1), (GROUPED[turn % len(GROUPED)], (None, 0.1)[turn % 2]))
]


@pytest.mark.parametrize(("criterion", "granularity", "clip"), CASES, ids=label)
def test_only_updates_wait_for_the_device(
    criterion: Criterion, granularity: Granularity, clip: float | None, trap: Trap
) -> None:
    schedule = {"schedule": lambda progress: 0.5 + progress / 2, "start": 3, "end": 7, "frequency": 4}
    callback = Pruning(0.6, criterion, granularity, **schedule)
    fit(MLP(optimizer="adam"), callback, gradient_clip_val=clip)
    assert callback.sparsity_now > 0.5
    assert trap.entered >= 3 * 8
    assert trap.found[False] == []
    assert len(trap.found[True]) >= 2  # the trap is not blind


@pytest.mark.parametrize("method", METHODS)
def test_methods_wait_for_the_device_in_updates_only(method: str, trap: Trap) -> None:
    callback = METHODS[method]()
    fit(MLP(optimizer="adam"), callback, max_epochs=3)
    assert callback.sparsity_now > 0.2
    assert trap.entered > 9
    assert trap.found[False] == []


@pytest.mark.parametrize("batch", [1, 8])
def test_layers_with_shared_fan_in_wait_for_nothing(batch: int) -> None:
    linear, convolution = nn.Linear(12, 10), nn.Conv2d(12, 10, 1, stride=2)
    for layer in (linear, convolution):
        prune(layer, 0.5, granularity=SharedFanIn(4))
    trap, inputs, images = Trap(), torch.rand(batch, 12), torch.rand(batch, 12, 4, 4)
    fast = SharedFanInLinear.of(linear, 4, by_column=batch > 1), SharedFanInConv2d.of(convolution, 4)
    with trap:
        found = fast[0](inputs), fast[1](images)
    assert trap.found == {True: [], False: []}
    for one, expected in zip(found, (linear(inputs), convolution(images)), strict=True):
        torch.testing.assert_close(one, expected)


def test_holding_constant_zeros_waits_for_nothing(trap: Trap) -> None:
    model = MLP()
    prune(model, 0.5)
    fit(model, ConstantSparsity())
    assert trap.entered == 3 * 8
    assert trap.found[False] == []


@pytest.mark.parametrize(
    "wait",
    [
        Tensor.item,
        lambda ones: ones.tolist(),
        Tensor.nonzero,
        bool,
        float,
        partial(torch.equal, torch.ones(1)),
        lambda ones: torch.ones(1)[ones > 0],
        lambda ones: ones.cpu(),
    ],
)
def test_the_trap_sees_what_waits(wait: Callable[[Tensor], Any], trap: Trap) -> None:
    class Waits(Pruning):
        """Looks at a value in every step."""

        def before_optimizer_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
            wait(torch.ones(1))

    fit(MLP(), Waits(0.5, start=1, end=2))
    assert len(trap.found[False]) == 8
