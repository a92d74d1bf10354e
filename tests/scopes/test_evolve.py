"""Evolve: the search itself, on losses that are known; counts are exact at every moment."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from lightning_prune import OWL, Evolve, Pruning, PruningAtInit, RigL
from lightning_prune.scopes.evolve import groupings_of, joined, moved, spread
from lightning_prune.scopes.searching import Room, Trial
from lightning_prune.tensors.selection import Scores

NAMES = [f"h.{block}.{part}.weight" for block in range(3) for part in ("q", "v")]
START = dict.fromkeys(NAMES, 40)
ROOMS = dict.fromkeys(NAMES, Room(4, 100))
BEST = dict(zip(NAMES, (10, 70, 20, 60, 20, 60), strict=True))


def distance(keep: Mapping[str, int]) -> float:
    return float(sum((number - BEST[name]) ** 2 for name, number in keep.items()))


def search(
    evolve: Evolve,
    loss: Callable[[Trial], float] = lambda trial: distance(trial.keep),
    rooms: Mapping[str, Room] = ROOMS,
    start: Mapping[str, int] = START,
    batches: int = 6,
) -> tuple[dict[str, int], list[Trial]]:
    """Run a search to its end; return what it has found and all trials."""
    trials, seen = evolve.trials(start, rooms, batches), list[Trial]()
    try:
        seen.append(next(trials))
        while True:
            seen.append(trials.send(loss(seen[-1])))
    except StopIteration as end:
        return end.value, seen


# ------------------------------------------------------------------------------------------------ what is tried


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("step", [1, 4])
def test_every_trial_has_as_many_units_and_lies_within_its_bounds(seed: int, step: int) -> None:
    rooms = {name: Room(8, 100 if "q" in name else 52, step) for name in NAMES}
    found, trials = search(Evolve(30, 6, seed=seed, step=1.0), rooms=rooms)
    for keep in (found, *(trial.keep for trial in trials)):
        assert list(keep) == NAMES
        assert sum(keep.values()) == sum(START.values())
        assert all(rooms[name].low <= number <= rooms[name].high for name, number in keep.items())
        assert all(number % step == 0 for number in keep.values())


def test_stages_take_more_batches_for_fewer_allocations() -> None:
    _, trials = search(Evolve(3, offspring=8, survivors=(4, 2, 1), batches=(1, 3, 9)))
    for generation in range(3):
        now = [trial for trial in trials if trial.generation == generation]
        stages = list(dict.fromkeys(trial.batches for trial in now))
        assert [len(batches) for batches in stages] == [1, 3, 6]  # there are no more than 6
        sizes = [sum(trial.batches == batches for trial in now) for batches in stages]
        assert sizes[0] == 8
        assert 4 <= sizes[1] <= 5  # with what the changes of the survivors give together
        assert 3 <= sizes[2] <= 4  # and the parent
    assert [trial.batches for trial in trials[-2:]] == [tuple(range(6))] * 2
    assert len({trial.batches for trial in trials if len(trial.batches) == 1}) > 1, "always the same batch"


def test_it_finds_what_is_best() -> None:
    found, _ = search(Evolve(60, offspring=16))
    assert distance(found) < 0.02 * distance(START)


def test_a_seed_decides() -> None:
    settings: dict[str, Any] = {"generations": 5, "offspring": 4}
    assert search(Evolve(**settings, seed=1)) == search(Evolve(**settings, seed=1))
    assert search(Evolve(**settings, seed=1))[1] != search(Evolve(**settings, seed=2))[1]


def test_the_first_allocation_is_taken_if_all_of_the_data_speak_for_it() -> None:
    def misled(trial: Trial) -> float:
        return distance(trial.keep) * (1 if len(trial.batches) < 6 else -1)

    found, trials = search(Evolve(10), misled)
    assert found == START != trials[-2].keep


def test_losses_that_are_no_numbers_lose() -> None:
    found, _ = search(Evolve(5), lambda trial: 1.0 if trial.keep == START else float("inf"))
    assert found == START


@pytest.mark.parametrize("rooms", [{"a": Room(4, 9)}, {"a": Room(5, 5), "b": Room(5, 5)}], ids=["one", "no room"])
def test_where_nothing_can_move_nothing_is_tried(rooms: dict[str, Room]) -> None:
    start = dict.fromkeys(rooms, 5)
    assert search(Evolve(), rooms=rooms, start=start) == (start, [])


# ------------------------------------------------------------------------------------------------ its parts


def test_units_move_between_targets_blocks_and_kinds() -> None:
    alone, blocks, kinds = groupings_of(NAMES)
    assert alone == [[name] for name in NAMES]
    assert blocks == [NAMES[:2], NAMES[2:4], NAMES[4:]]
    assert kinds == [NAMES[::2], NAMES[1::2]]
    assert groupings_of(["0.weight", "2.weight"]) == [[["0.weight"], ["2.weight"]]]
    assert groupings_of(["weight"]) == []


def test_what_moves_is_a_part_of_the_room() -> None:
    rooms = {"a": Room(0, 10), "b": Room(0, 30), "c": Room(10, 80)}
    assert moved({"a": 8, "b": 24, "c": 20}, ["a", "b"], ["c"], rooms, 0.25) == {"a": 6, "b": 18, "c": 28}
    assert moved({"a": 8, "b": 24, "c": 20}, ["c"], ["a", "b"], rooms, 1.0) == {"a": 10, "b": 30, "c": 12}
    assert moved({"a": 8, "b": 24, "c": 10}, ["c"], ["a", "b"], rooms, 1.0) == {"a": 8, "b": 24, "c": 10}
    few = {"a": Room(0, 3), "b": Room(0, 3)}
    assert moved({"a": 1, "b": 1}, ["a"], ["b"], few, 0.01) == {"a": 0, "b": 2}  # at least one


def test_shares_are_in_proportion_and_exact() -> None:
    assert spread({"a": 10, "b": 20, "c": 0}, 7) == {"a": 2, "b": 5, "c": 0}
    assert spread({"a": 0, "b": 0}, 0) == {"a": 0, "b": 0}


def test_changes_are_joined_where_there_is_room() -> None:
    rooms = {"a": Room(0, 10), "b": Room(3, 10)}
    assert joined({"a": 5, "b": 5}, [{"a": 6, "b": 4}, {"a": 6, "b": 4}], rooms) == {"a": 7, "b": 3}
    assert joined({"a": 5, "b": 5}, [{"a": 6, "b": 4}] * 3, rooms) == {"a": 5, "b": 5}


@pytest.mark.parametrize("start", ["local", "global", "erk", "lamp", OWL(spread=0.2)])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.5, 0.913])
def test_it_begins_with_another_scope_and_an_exact_total(start: Any, sparsity: float) -> None:
    torch.manual_seed(0)
    scores = Scores.of({f"h.{size}.weight": torch.rand(size) for size in (3, 5, 7, 11, 13, 17)})
    keep = Evolve(start=start)(scores, sparsity)
    assert sum(keep.values()) == 56 - round(sparsity * 56)
    assert all(0 <= keep[name] <= scores.sizes[name] for name in scores)


# ------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"generations": 0}, "generations must be at least 1, got 0"),
        ({"offspring": 0}, "offspring must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"step": 0.0}, r"step must be in \(0, 1\], got 0.0"),
        ({"survivors": (4, 2)}, r"survivors must fall from stage to stage, to 1 after the last, got \(4, 2\)"),
        ({"survivors": (2, 4, 1), "batches": (1, 2, 3)}, "survivors must fall from stage to stage"),
        ({"batches": (1, 2, 3)}, r"batches must be as many numbers as survivors, got \(1, 2, 3\) and \(4, 1\)"),
        ({"batches": (0, 1)}, r"batches must be numbers in \[1, inf\), got 0"),
        ({"metric": "accuracy"}, 'metric must be "kl" or "mse", got \'accuracy\''),
        ({"mode": "max"}, 'mode must be "min" for metric=\'kl\', got "max"'),
        ({"mode": "best"}, 'mode must be "min" or "max", got \'best\''),
        ({"start": "layer"}, "start must be one of"),
        ({"start": Evolve()}, "start must be a scope that does not search, got Evolve"),
        ({"path": ""}, "path must be the path of a file, got the string ''"),
    ],
)
def test_it_refuses_what_makes_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Evolve(**arguments)


@pytest.mark.parametrize("arguments", [{"metric": 5}, {"metric": lambda model: 1.0}, {"survivors": 4}, {"progress": 1}])
def test_it_refuses_other_types(arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"^{next(iter(arguments))} must be "):
        Evolve(**arguments)


@pytest.mark.parametrize("callback", [Pruning, PruningAtInit, RigL])
def test_callbacks_name_the_way_out(callback: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=rf"in {callback.__name__}, which holds no data, .*masks.sparsities\(\)"):
        callback(0.5, scope=Evolve())
