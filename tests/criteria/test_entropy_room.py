"""Entropy holds values in a storage with room for more, which nobody sees."""

import io

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Channel, Entropy
from lightning_prune.models.parameters import find
from lightning_prune.units.finding import make_units
from lightning_prune.updates.statistics import Observation


def watch(model: nn.Module) -> Observation:
    observation = Observation(Entropy(), make_units(find(model), model, Channel(coupled=False)))
    observation.open()
    return observation


def held(observation: Observation) -> Tensor:
    statistic = observation.units[0].statistic
    assert statistic is not None
    return statistic


def test_values_are_added_behind_those_that_are_held() -> None:
    model = nn.Linear(2, 3)
    observation = watch(model)
    outputs, places = [], set()
    for rows in (4, 1, 0, 5):
        outputs.append(model(torch.randn(rows, 2)).detach())
        places.add(held(observation).data_ptr())
        observation.step()
    assert torch.equal(held(observation), torch.cat(outputs))
    assert len(places) == 1


def test_outputs_of_the_model_are_left_alone() -> None:
    model = nn.Linear(2, 3)
    observation = watch(model)
    first = model(torch.randn(4, 2))
    before = first.detach().clone()
    model(torch.randn(4, 2))
    assert torch.equal(first, before)
    assert held(observation).untyped_storage().data_ptr() != first.untyped_storage().data_ptr()


@pytest.mark.parametrize("several", [False, True])
def test_a_checkpoint_holds_the_values_and_not_the_room(several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 3)
    observation = watch(model)
    model(torch.randn(4, 2))
    observation.step()
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda found, mine: found.__setitem__(0, mine))
    observation.several = several
    file = io.BytesIO()
    torch.save(observation.state_dict()["statistics"], file)
    assert file.tell() < 3000  # bytes; the room has 24,576
    assert held(observation).untyped_storage().nbytes() > 20_000


def test_a_resumed_observation_goes_on_where_it_stopped() -> None:
    model = nn.Linear(2, 3)
    one, inputs = watch(model), torch.randn(3, 4, 2)
    for batch in inputs[:2]:
        model(batch)
        one.step()
    state = one.state_dict()
    model(inputs[2])
    one.close()
    other = watch(model)
    other.load_state_dict(state)
    model(inputs[2])
    assert torch.equal(held(one), held(other))
    assert len(held(other)) == 12
