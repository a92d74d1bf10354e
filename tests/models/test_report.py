"""Reports: sparsity counted from the weights, as a number and as a table, and the plan of a run."""

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Masks, prune, sparsity, summary
from lightning_prune.models.summary import Row, Summary, table, zeros
from lightning_prune.training.plan_text import plan


def half_sparse() -> nn.Sequential:
    """Return a model with 3 zeros among the 6 weights of the first layer, and none among the 1,200 of the second."""
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 600))
    model[0].weight.data = torch.tensor([[0.0, 1.0, -0.0], [2.0, 0.0, -1e-40]])
    model[2].weight.data.fill_(1.0)
    return model


def test_sparsity_is_the_fraction_of_zeros_among_the_prunable_weights() -> None:
    model = half_sparse()
    assert sparsity(model) == 3 / 1206
    nn.init.zeros_(model[0].bias)  # biases and norms do not count
    nn.init.zeros_(model[1].weight)
    assert sparsity(model) == 3 / 1206


@pytest.mark.parametrize(
    ("targets", "ignore", "expected"),
    [(["0.*"], [], 0.5), ([], ["0.*"], 0.0), (["*"], ["re:2"], 0.5), (["0.weight", "2.weight"], [], 3 / 1206)],
)
def test_sparsity_of_chosen_parameters(targets: list[str], ignore: list[str], expected: float) -> None:
    assert sparsity(half_sparse(), targets, ignore) == expected


def test_sparsity_agrees_with_the_masks_after_pruning() -> None:
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
    assert sparsity(model) == 0.0
    masks = prune(model, 0.7)
    assert sparsity(model) == pytest.approx(masks.sparsity) == 560 / 800


def test_tied_weights_are_counted_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    prune(model, 0.5)
    result = summary(model)
    assert [(row.name, row.weights, row.zeros) for row in result.rows] == [("0.weight", 4, 2)]


def test_frozen_parts_count_in_a_model_that_is_frozen_throughout() -> None:
    model = half_sparse()
    model[0].requires_grad_(False)
    assert sparsity(model) == 0.0  # of what is trained
    assert sparsity(model.requires_grad_(False)) == 3 / 1206


@pytest.mark.parametrize(
    ("dtype", "zero"),
    # the smallest weight, -1e-40, is a number in all types but float16
    [(torch.float16, 4), (torch.bfloat16, 3), (torch.float32, 3), (torch.float64, 3)],
)
def test_sparsity_of_every_float_type(dtype: torch.dtype, zero: int) -> None:
    assert sparsity(half_sparse().to(dtype), ["0.*"]) == zero / 6


@pytest.mark.parametrize(
    ("values", "expected"),
    [([[0.0, -0.0], [1.0, float("nan")]], 2), ([[1.0]], 0), ([[]], 0), ([[0.0] * 5], 5)],
)
def test_zeros(values: list[list[float]], expected: int) -> None:
    assert zeros(torch.tensor(values)) == expected


def test_summary_prints_and_returns_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    result = summary(half_sparse())
    expected = """\
name      shape    weights  zeros  sparsity
-------------------------------------------
0.weight  2 x 3          6      3    50.00%
2.weight  600 x 2    1,200      0     0.00%
-------------------------------------------
total                1,206      3     0.25%"""
    assert capsys.readouterr().out == expected + "\n"
    assert str(result) == expected
    assert result.rows == (Row("0.weight", (2, 3), 6, 3), Row("2.weight", (600, 2), 1200, 0))
    assert result.total == Row("total", (), 1206, 3)
    assert result.total.sparsity == 3 / 1206


def test_summary_of_chosen_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert [row.name for row in summary(half_sparse(), ignore=["2.*"]).rows] == ["0.weight"]
    assert [row.name for row in summary(half_sparse(), ["2.*"]).rows] == ["2.weight"]
    assert "0.weight" in capsys.readouterr().out


def test_summary_of_a_convolution_shows_its_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    summary(nn.Conv2d(2, 3, (5, 1)))
    assert "weight  3 x 2 x 5 x 1       30" in capsys.readouterr().out


def test_an_empty_summary_is_no_division_by_zero() -> None:
    assert Summary(()).total.sparsity == 0.0
    assert Row("w", (0, 2), 0, 0).sparsity == 0.0


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"targets must match a parameter, got '1\.\*'"):
        sparsity(nn.Sequential(nn.Linear(2, 2)), ["1.*"])


def test_summary_does_not_change_the_model() -> None:
    model = half_sparse()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sparsity(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_lines_of_a_table_are_of_one_length() -> None:
    lines = table([("a", "bb", "1"), ("aaaa", "b", "1000")])
    assert lines == ["a     bb     1", "aaaa  b   1000"]


# ------------------------------------------------------------------------------------------------ plan


def planned(updates: list[tuple[int, float]], interval: str = "step") -> list[str]:
    parameters: dict[str, Tensor] = {"conv.weight": torch.zeros(64, 3, 5, 5), "fc.weight": torch.zeros(10, 64)}
    return plan("MagnitudePruning", "sparsity 0.9", parameters, updates, interval).splitlines()


def test_a_plan_names_parameters_and_updates() -> None:
    lines = planned([(10, 0.5), (20, 0.9)])
    assert lines[0] == "MagnitudePruning to sparsity 0.9: 2 parameters, 5,440 weights"
    assert lines[1] == "  conv.weight  64 x 3 x 5 x 5  4,800"
    assert lines[2] == "  fc.weight    10 x 64           640"
    assert lines[3].startswith("2 updates")
    assert lines[3].endswith("10 (50.0%), 20 (90.0%)")


def test_a_plan_says_what_it_counts() -> None:
    assert "epoch" in planned([(1, 0.9)], "epoch")[-1]
    assert "step" in planned([(1, 0.9)])[-1]


def test_a_plan_of_many_updates_shows_the_first_and_the_last() -> None:
    last = planned([(position, position / 100) for position in range(1, 91)])[-1]
    assert last.startswith("90 updates")
    assert last.endswith("1 (1.0%), 2 (2.0%), 3 (3.0%), 4 (4.0%), ..., 88 (88.0%), 89 (89.0%), 90 (90.0%)")
    assert "..." not in planned([(position, 0.1) for position in range(8)])[-1]


def test_a_plan_has_at_most_twenty_lines_for_any_model() -> None:
    parameters: dict[str, Tensor] = {f"{number}.weight": torch.zeros(2, 2) for number in range(100)}
    for left_out in (0, 1, 6, 50):
        reasons = {f"{number}.other": "it is frozen" for number in range(left_out)}
        lines = plan("Pruning", "sparsity 0.9", parameters, [(1, 0.9)], "step", left_out=reasons).splitlines()
        assert len(lines) == 20
        assert lines[0] == "Pruning to sparsity 0.9: 100 parameters, 400 weights"
        assert lines[1].startswith("  0.weight")
        assert lines[19 - min(left_out, 6) - 1].startswith("  99.weight")
        assert lines[-1] == "1 update, step (sparsity): 1 (90.0%)"
        shown = [line for line in lines if "left out" in line]
        assert len(shown) == min(left_out, 6)
    assert "  left out: 45 more" in lines
    few = plan("Pruning", "sparsity 0.9", dict(list(parameters.items())[:18]), [(1, 0.9)], "step").splitlines()
    assert len(few) == 20
    assert "more" not in "".join(few)


def test_a_plan_counts_one_parameter_and_one_update() -> None:
    lines = plan("Pruning", "sparsity 0.9", {"weight": torch.zeros(1, 1)}, [(1, 0.9)], "step").splitlines()
    assert lines[0] == "Pruning to sparsity 0.9: 1 parameter, 1 weight"
    assert lines[-1].startswith("1 update, ")


def test_a_plan_shows_the_sparsity_of_each_parameter() -> None:
    parameters: dict[str, Tensor] = {"a": torch.zeros(2, 2), "b": torch.zeros(20, 2)}
    lines = plan("Pruning", "sparsity", parameters, [], "step", levels={"a": 0.25, "b": 0.5}).splitlines()
    assert lines[1:] == ["  a  2 x 2    4  25.0%", "  b  20 x 2  40  50.0%", "no updates planned"]


def test_masks_and_weights_are_counted_alike() -> None:
    layer = nn.Linear(4, 4)
    masks = Masks(weight=torch.rand(4, 4) > 0.5)
    masks.apply(layer)
    assert sparsity(layer) == masks.sparsity
