"""A training method is one file on public hooks: here, one that prunes a layer step by step."""

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from models import MLP, fit
from torch import nn

from lightning_prune import Masks, sparsity
from lightning_prune.training.masked import MaskedTraining
from lightning_prune.training.protocols import averaged_models
from lightning_prune.training.state import TRANSIENT, RunState, saved
from lightning_prune.validation.states import items, whole


@dataclass(eq=False)
class StepwiseState(RunState):
    """What the method below knows of its run."""

    updates: list[int] = field(default_factory=list, metadata=saved(items(whole()), load=list))
    late: int = field(default=0, metadata=saved(whole(), absent=7))
    model_of_a_run: Any = field(default=None, metadata=TRANSIENT)


class Stepwise(MaskedTraining):
    """Prunes another tenth of the first layer every other step, up to a half."""

    State: ClassVar[type[RunState]] = StepwiseState
    state: StepwiseState

    def on_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.state.model_of_a_run = pl_module
        if not self.masks:
            weight = pl_module.net[0].weight
            self.state.masks = Masks({"net.0.weight": torch.ones_like(weight, dtype=torch.bool)})

    def maybe_update(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps, done = self.state.steps, len(self.state.updates)
        if steps and steps % 2 == 0 and done < 5 and steps not in self.state.updates:
            weight = pl_module.net[0].weight.detach()
            smallest = weight.abs().flatten().argsort()[: round(weight.numel() * (done + 1) / 10)]
            mask = torch.ones(weight.numel(), dtype=torch.bool)
            mask[smallest] = False
            self.set_masks(trainer, pl_module, Masks({"net.0.weight": mask.view(weight.shape)}))
            self.state.updates.append(steps)


def test_a_method_in_one_file_prunes() -> None:
    model, callback = MLP(), Stepwise()
    fit(model, callback)
    assert callback.state.updates == [2, 4, 6, 8]
    assert callback.sparsity_now == pytest.approx(0.4, abs=0.02)
    assert sparsity(model.net[0]) == pytest.approx(callback.sparsity_now)


def test_its_state_is_saved_loaded_copied_and_reset_from_one_declaration() -> None:
    callback = Stepwise()
    fit(MLP(), callback)
    state = callback.state_dict()
    assert list(state) == ["version", "steps", "levels", "masks", "arguments", "updates", "late"]
    other = Stepwise()
    other.load_state_dict({key: value for key, value in state.items() if key != "late"})
    assert (other.state.updates, other.state.late) == ([2, 4, 6, 8], 7)
    assert torch.equal(other.masks["net.0.weight"], callback.masks["net.0.weight"])
    with pytest.raises(
        ValueError, match=r"the state of Stepwise must have a whole number of at least 0 in 'updates\[1\]'"
    ):
        other.load_state_dict({**state, "updates": [2, -4]})
    with pytest.raises(ValueError, match=r"the state of Stepwise must have \['updates'\], got"):
        other.load_state_dict({key: value for key, value in state.items() if key != "updates"})
    copied = copy.deepcopy(callback)
    assert copied.state.updates == [2, 4, 6, 8]
    assert copied.state.model_of_a_run is None
    assert callback.state.model_of_a_run is not None
    callback.reset()
    assert (callback.state.updates, callback.masks, callback.sparsity_now) == ([], {}, 0.0)


def test_a_shallow_copy_has_a_state_of_its_own() -> None:
    callback = Stepwise()
    fit(MLP(), callback)
    other = copy.copy(callback)
    other.reset()
    assert callback.state.updates == [2, 4, 6, 8]
    assert callback.masks


def test_a_callback_that_wants_to_sees_the_dense_model() -> None:
    class Watcher(Callback):
        seen: ClassVar[list[float]] = []

        def on_before_pruning(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.seen.append(sparsity(pl_module))

    fit(MLP(), Stepwise(), Watcher())
    assert Watcher.seen == [0.0]


def test_averaged_copies_are_found_by_the_protocol() -> None:
    class Averaging:
        def __init__(self, model: nn.Module | None) -> None:
            self._average_model = model

    model = nn.Linear(2, 2)
    assert averaged_models([Averaging(None), Averaging(model), object()]) == [model]
    assert averaged_models([Averaging(torch.optim.swa_utils.AveragedModel(model))])[0] is not model
