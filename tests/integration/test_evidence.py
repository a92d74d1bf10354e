"""The benchmark of evidence: verdicts, runs that are kept, and peers that prune what they are asked to."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from benchmark_modules import imported
from lightning import Trainer

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks" / "evidence"
NAMES = ("claims", "drawing", "methods", "peers", "report", "running", "tasks", "mnist5k")
BESIDE = ("marked", "timing", "post_training", "shapes")


@pytest.fixture(scope="module")
def evidence() -> Iterator[dict[str, ModuleType]]:
    with imported([FOLDER, FOLDER.parent], [*NAMES, *BESIDE]) as modules:
        yield modules


@pytest.mark.parametrize(
    ("gains", "margin", "or_equal", "verdict"),
    [
        ([1.0, 1.2, 0.8, 1.1, 0.9], 0.0, False, "holds"),
        ([-1.0, -1.2, -0.8, -1.1, -0.9], 0.0, True, "**the opposite holds**"),
        ([1.0, -1.0, 0.5, -0.4, 0.1], 0.0, False, "**not significant**"),
        ([1.0, -1.0, 0.5, -0.4, 0.1], 0.0, True, "holds: not worse"),
        ([-0.5, -0.4, -0.6, -0.5, -0.5], 1.0, False, "holds"),
        ([3.0, -0.1, 0.2, -0.1, 0.3], 0.0, False, "**not significant**"),  # one lucky seed
    ],
)
def test_verdicts_are_those_of_a_paired_test(
    evidence: dict[str, ModuleType], gains: list[float], margin: float, or_equal: bool, verdict: str
) -> None:
    setting = evidence["running"].Setting("mnist", "dense", 0.0)
    claim = evidence["claims"].Claim("", "", setting, setting, margin, or_equal)
    assert claim.verdict(gains) == verdict


def test_a_claim_is_not_judged_before_all_its_runs_are_there(evidence: dict[str, ModuleType], tmp_path: Path) -> None:
    path, claim = tmp_path / "found.jsonl", evidence["claims"].CLAIMS[0]
    for seed in range(2):
        for setting, accuracy in ((claim.one, 90.0 + seed), (claim.other, 80.0)):
            assert claim.judge(evidence["running"].Results(path), range(2)) is None
            row = {**setting._asdict(), "seed": seed, "accuracy": accuracy, "zeros": 0.98}
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
    found = claim.judge(evidence["running"].Results(path), range(2))
    assert found[2:5] == ["90.5 ± 0.7", "80.0 ± 0.0", "+10.5 ± 0.7"]


def test_all_settings_of_the_claims_can_be_run(evidence: dict[str, ModuleType]) -> None:
    claims = evidence["claims"]
    pairs = [
        *((claim.one, claim.other) for claim in claims.CLAIMS),
        *claims.PEERS["mnist"],
        *claims.PEERS["fashion-10"],
    ]
    for setting in (setting for pair in pairs for setting in pair):
        assert setting.task in evidence["tasks"].TASKS
        evidence["methods"].METHODS[setting.method](setting.sparsity, 0)


@pytest.mark.parametrize(
    "method", ["ModelPruning, gradual", "ModelPruning, one-shot", "torch.nn.utils.prune, one-shot"]
)
def test_peers_prune_what_they_are_asked_to(evidence: dict[str, ModuleType], method: str) -> None:
    tasks = evidence["tasks"]
    model = tasks.TASKS["mnist"].model(0)
    options = {**tasks.QUIET, "max_epochs": 10, "limit_train_batches": 1, "limit_val_batches": 0}
    callback = evidence["methods"].METHODS[method](0.9, 0)
    Trainer(callbacks=[callback], **options).fit(model, datamodule=tasks.TASKS["mnist"].data(0))
    weights = evidence["running"].weights(model)
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros == pytest.approx(0.9 * sum(weight.numel() for weight in weights), abs=10)


def test_a_curve_is_drawn_from_three_sparsities_with_all_seeds(evidence: dict[str, ModuleType], tmp_path: Path) -> None:
    results, path = evidence["running"].Results(tmp_path / "found.jsonl"), tmp_path / "curves.png"
    for count, level in enumerate((0.9, 0.98, 0.995), 1):
        for seed in range(2):
            assert not evidence["drawing"].curves("mnist", "", results, range(2))
            setting = evidence["running"].Setting("mnist", "gradual", level)
            results.rows[setting, seed] = {"accuracy": 90.0 + count + seed}
    found = evidence["drawing"].curves("mnist", "", results, range(2))
    assert list(found) == ["gradual"]
    assert not evidence["drawing"].curves("mnist", "neurons", results, range(2))  # of neurons
    assert [round(kept, 3) for kept, _, _ in found["gradual"]] == [0.1, 0.02, 0.005]
    assert [mean for _, mean, _ in found["gradual"]] == [91.5, 92.5, 93.5]
    evidence["drawing"].draw(results, range(2), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_tables_go_between_their_markers(evidence: dict[str, ModuleType], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a:begin -->\nold\n<!-- a:end -->\nafter\n")
    evidence["marked"].replace(page, "a", "new")
    assert page.read_text() == "before\n<!-- a:begin -->\nnew\n<!-- a:end -->\nafter\n"
    with pytest.raises(ValueError, match="must have the lines"):
        evidence["marked"].replace(page, "b", "new")


def test_the_table_of_pruning_without_training_has_what_was_measured(evidence: dict[str, ModuleType]) -> None:
    post = evidence["post_training"]
    pairs = post.wanted(["50 %", "2:4"])
    assert pairs[0] == ("dense", "")
    nothing = post.NOTHING_TO_ALLOCATE  # of 2:4
    assert len(pairs) == len(set(pairs)) == 1 + 2 * len(post.METHODS) - len(nothing)
    assert not {*pairs} & {*nothing}
    scores = {"SmolLM2-135M": 1567.3, "all-MiniLM-L6-v2": 0.5621, "CNN": 68.57}
    rows = [
        {"model": name, "setting": setting, "method": method, "score": score}
        for name, score in scores.items()
        for setting, method in [("dense", ""), ("2:4", "magnitude")]
    ]
    assert post.make_table(rows).splitlines()[2:] == [
        "| SmolLM2-135M, 2:4 | 1,567 | 1,567 |  |  |  |  |  |",
        "| all-MiniLM-L6-v2, 2:4 | 0.562 | 0.562 |  |  |  |  |  |",
        "| CNN, 2:4 | 68.6 % | 68.6 % |  |  |  |  |  |",
    ]
