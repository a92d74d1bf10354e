"""The benchmark on the Cubist Spiral: its data, the weights on a path, and the search for the least number of them."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmark_modules import imported

from lightning_prune import prune

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
FOLDERS = [FOLDER / "spiral", FOLDER, FOLDER / "evidence"]
NAMES = ("cubist", "compared", "outcome", "searching")


@pytest.fixture(scope="module")
def spiral() -> Iterator[dict[str, ModuleType]]:
    with imported(FOLDERS, NAMES) as modules:
        yield modules


def test_the_arms_have_sixteen_straight_pieces_and_as_many_points_each(spiral: dict[str, ModuleType]) -> None:
    x, labels = spiral["cubist"].points()
    assert x.shape == (49_982, 2)
    torch.testing.assert_close(x.mean(0), torch.zeros(2), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(x.std(0), torch.ones(2))
    assert labels.mean() == 0.5
    arm = spiral["cubist"].arm(0.0)
    steps = torch.nn.functional.normalize(arm.diff(dim=0), dim=1)
    assert int(((steps[1:] * steps[:-1]).sum(1) < 0.99).sum()) >= 15  # 15 corners between 16 pieces


def test_weights_without_a_path_do_not_count(spiral: dict[str, ModuleType]) -> None:
    into, out = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 0.0, 4.0]])
    used = spiral["cubist"].on_paths([into, out])
    assert [mask.tolist() for mask in used] == [[[True, False], [False, False], [False, False]], [[True, False, False]]]
    assert spiral["cubist"].connected([into, out]) == {"connected": 2, "with_biases": 4}


def test_weights_without_a_path_are_pruned_first(spiral: dict[str, ModuleType]) -> None:
    network = spiral["cubist"].network((2, 1, 1))
    with torch.no_grad():
        for weight in network.parameters():
            weight.fill_(1.0)
        network.hidden1.weight[:] = torch.tensor([[1.0, 1.0], [9.0, 9.0]])
        network.hidden2.weight[0, 1] = 0.0  # so nothing follows the second neuron
    criterion = spiral["compared"].OnPaths({n: w for n, w in network.named_parameters() if w.ndim > 1})
    masks = prune(network, 3 / 8, criterion=criterion)
    assert masks["hidden1.weight"].tolist() == [[True, True], [False, False]]
    assert masks["hidden2.weight"].tolist() == [[True, False]]


@pytest.mark.parametrize("seed", [0])
def test_every_method_keeps_as_many_weights_as_it_is_asked_to(
    spiral: dict[str, ModuleType], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cubist, compared = spiral["cubist"], spiral["compared"]
    monkeypatch.setattr(cubist, "EPOCHS", 10)
    arms = [part[::50] for part in cubist.points()]
    monkeypatch.setattr(cubist, "points", lambda: arms)
    for method in ("gradual, on paths", "torch.nn.utils.prune, one-shot", "SNIP, 100 rounds"):
        found = cubist.fit(seed, 500, compared.BOTH[method](compared.sparsity_of(method, 50), seed))
        assert found["left"] == 50, method
    method = "neurons, L2"
    found = cubist.fit(seed, 500, compared.BOTH[method](compared.sparsity_of(method, 44), seed))
    assert found["connected"] <= 44


def test_the_search_goes_down_to_the_first_miss_and_up_to_the_last_target(
    spiral: dict[str, ModuleType], tmp_path: Path
) -> None:
    searching, tried = spiral["searching"], list[int]()

    def run(method: str, weights: int, seed: int, batch: int) -> dict[str, Any]:
        tried.append(weights)
        accuracy = 99.9 if weights >= 90 else 96.0 if weights >= 40 else 80.0
        return {"accuracy": accuracy, "left": weights, "connected": weights - 1, "with_biases": weights + 9}

    runs = searching.Accuracies(tmp_path / "runs.jsonl", 512, run)
    searching.search(runs, "gradual", 0)
    assert tried == [50, 40, 33, 65, 90]
    searching.search(searching.Accuracies(runs.path, 512, run), "gradual", 0)
    assert len(tried) == 5  # finished runs are not repeated
    least = spiral["outcome"].least
    assert [least(runs.rows, "gradual", target) for target in (95.0, 99.5)] == [[40], [90]]
    row = spiral["outcome"].make_table(runs.rows).splitlines()[-1]
    assert row == "| gradual | 1 | 40 | 40 (49) | 90 | 90 (99) | 96.0 | 49 of 50 |"
    spiral["outcome"].draw(runs.rows, [], tmp_path / "spiral.png")
    assert (tmp_path / "spiral.png").read_bytes().startswith(b"\x89PNG")
