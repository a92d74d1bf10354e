"""No synchronisation with a device in the step path: a GPU is never made to wait for what the host wants to know."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from models import MLP, fit
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from variants import CRITERIA

from lightning_prune import Channel, ConstantSparsity, Criterion, Granularity, Pruning, Weight, prune
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


@pytest.mark.parametrize("granularity", [Weight(), Channel()], ids=["weight", "channel"])
@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda criterion: type(criterion).__name__)
@pytest.mark.parametrize("clip", [None, 0.1])
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
