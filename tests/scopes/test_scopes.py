"""Scopes: how many units each target keeps, worked out by hand."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import LAMP, OWL, Masks, Pruning, Wanda, prune, scopes
from lightning_prune.scopes import SCOPES
from lightning_prune.tensors.selection import Scores
from lightning_prune.tensors.sources import Source
from lightning_prune.tensors.streaming import StreamedScores


def ranked(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> Scores:
    torch.manual_seed(seed)
    return Scores.of({name: torch.randn(shape) for name, shape in shapes.items()})


def in_rows(shapes: Mapping[str, tuple[int, int]]) -> Scores:
    """Return scores with one unit for each row of the weights."""
    return StreamedScores({n: Source.computed(lambda rows=s[0]: torch.rand(rows), s[0], s) for n, s in shapes.items()})  # type: ignore[misc]


def test_local_keeps_the_same_fraction_everywhere() -> None:
    # 10 - round(7.5) = 10 - 8, 4 - 3, 3 - round(2.25), 1 - round(0.75)
    scores = ranked({"a": (10,), "b": (2, 2), "c": (3,), "d": (1,)})
    assert scopes.local(scores, 0.75) == {"a": 2, "b": 1, "c": 1, "d": 0}


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    # sorted: a -3, b -1, b 0, a 0.5, b 0.5, a 2, of which round(6 * sparsity) go
    [
        (0.0, {"a": 3, "b": 3}),
        (0.2, {"a": 2, "b": 3}),
        (1 / 3, {"a": 2, "b": 2}),
        (0.5, {"a": 2, "b": 1}),
        (2 / 3, {"a": 1, "b": 1}),
        (0.83, {"a": 1, "b": 0}),
        (0.99, {"a": 0, "b": 0}),
    ],
)
def test_global_ranks_all_targets_together(sparsity: float, expected: dict[str, int]) -> None:
    scores = Scores.of({"a": torch.tensor([2.0, -3.0, 0.5]), "b": torch.tensor([0.5, -1.0, 0.0])})
    assert scopes.global_(scores, sparsity) == expected


def test_global_breaks_ties_in_the_order_of_the_targets() -> None:
    scores = Scores.of({"z": torch.ones(3), "a": torch.ones(3)})
    assert scopes.global_(scores, 2 / 3) == {"z": 0, "a": 2}


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    # A target of shape s gets density c * sum(s) / prod(s), so it keeps c * sum(s): 9 c of 20 in a, 5 c of 6 in b.
    [
        # keep 13: c = 13/14; a 8.36, b 4.64: the larger remainder is rounded up
        (0.5, {"a": 8, "b": 5}),
        # keep 26 - round(6.5) = 20: c = 20/14 would keep 7.1 of the 6 of b, so b is dense and a gets the rest
        (0.25, {"a": 14, "b": 6}),
        # keep 16: c = 16/14; a 10.29, b 5.71
        (0.4, {"a": 10, "b": 6}),
        # keep 3: c = 3/14; a 1.93, b 1.07
        (0.9, {"a": 2, "b": 1}),
        (0.0, {"a": 20, "b": 6}),
    ],
)
def test_erk_of_two_layers(sparsity: float, expected: dict[str, int]) -> None:
    assert scopes.erk(ranked({"a": (4, 5), "b": (2, 3)}), sparsity) == expected


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    # sum(s): a 9, b 5, c 20; sizes 20, 6, 100
    [
        # keep 63: c = 63/34 fills b (9.3 > 6); then c = 57/29: a 17.69, c 39.31
        (0.5, {"a": 18, "b": 6, "c": 39}),
        # keep 126 - round(37.8) = 88: c = 88/34 fills a (23.3 > 20) and b (12.9 > 6), c gets 62
        (0.3, {"a": 20, "b": 6, "c": 62}),
        # keep 126 - round(52.92) = 73: c = 73/34 fills b (10.7 > 6) but not a (19.3); then c = 67/29 fills a too (20.8)
        (0.42, {"a": 20, "b": 6, "c": 47}),
    ],
)
def test_erk_fills_layers_one_after_the_other(sparsity: float, expected: dict[str, int]) -> None:
    assert scopes.erk(ranked({"a": (4, 5), "b": (2, 3), "c": (10, 10)}), sparsity) == expected


def test_erk_counts_the_kernel_of_a_convolution() -> None:
    # sum(s): conv 4 + 2 + 3 + 3 = 12 of 72, fc 8 + 6 = 14 of 48; keep 26 of 120, c = 1
    assert scopes.erk(ranked({"conv": (4, 2, 3, 3), "fc": (8, 6)}), 94 / 120) == {"conv": 12, "fc": 14}


def test_erk_takes_the_density_from_the_weight_and_the_amount_from_the_units() -> None:
    # densities 9/20 and 5/6 over 4 and 2 rows; keep 4 of 6: c = 4 / (1.8 + 1.667) = 1.154; a 2.08, b 1.92
    assert scopes.erk(in_rows({"a": (4, 5), "b": (2, 3)}), 1 / 3) == {"a": 2, "b": 2}


def test_erk_breaks_equal_remainders_in_the_order_of_the_targets() -> None:
    # keep 7 of 3 * 9, all alike: 2.33 each, and the first one gets the one that is left
    assert scopes.erk(ranked({"z": (3, 3), "m": (3, 3), "a": (3, 3)}), 20 / 27) == {"z": 3, "m": 2, "a": 2}


@pytest.mark.parametrize("scope", ["global", "erk"])
@pytest.mark.parametrize("sparsity", [0.0, 0.013, 0.1, 1 / 3, 0.5, 0.77, 0.9, 0.98, 0.999])
def test_the_total_is_exact(scope: str, sparsity: float) -> None:
    shapes = {"conv": (8, 3, 3, 3), "fc": (10, 72), "head": (3, 10), "tiny": (1, 2)}  # 216 + 720 + 30 + 2 = 968
    scores = ranked(shapes)
    keep = SCOPES[scope](scores, sparsity)
    assert sum(keep.values()) == 968 - round(sparsity * 968)
    assert all(0 <= keep[name] <= scores.sizes[name] for name in shapes)
    assert all(type(count) is int for count in keep.values())


@pytest.mark.parametrize("scope", SCOPES)
def test_more_sparsity_keeps_no_more_in_total(scope: str) -> None:
    scores = ranked({"a": (7, 5), "b": (3, 4), "c": (2, 2)})
    totals = [sum(SCOPES[scope](scores, s / 100).values()) for s in range(100)]
    assert totals[0] == 51
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize(
    ("due", "expected"),
    # a: 0.9 of 10, b: 0.5 of 4, c: nothing; at one half: round(4.5) = 4 (half to even) and 1 are gone (6.75 and 1.5)
    [
        (0.75, {"a": 3, "b": 2, "c": 3}),
        (1.0, {"a": 1, "b": 2, "c": 3}),
        (0.5, {"a": 6, "b": 3, "c": 3}),
        (0.0, {"a": 10, "b": 4, "c": 3}),
    ],
)
def test_per_layer(due: float, expected: dict[str, int]) -> None:
    scores = ranked({"a": (10,), "b": (4,), "c": (3,)})
    sparsities = {"a": 0.9, "b": 0.5, "c": 0.0}
    assert scopes.per_layer(scores, sparsities, due) == expected
    assert due < 1.0 or scopes.per_layer(scores, sparsities) == expected


@pytest.mark.parametrize(
    ("level", "due", "expected"),
    # sorted: b -1, a 0.1, a 0.2, b 0.3, a 0.3, a 0.4
    [
        (0.3, 1.0, {"a": 2, "b": 1}),  # the level itself stays
        (0.35, 1.0, {"a": 1, "b": 0}),
        (0.35, 0.6, {"a": 2, "b": 1}),  # of the 5 below, the 3 lowest
        (0.35, 0.55, {"a": 2, "b": 1}),  # round(2.75)
        (0.35, 0.0, {"a": 4, "b": 2}),
        (-2.0, 1.0, {"a": 4, "b": 2}),
        (9.0, 1.0, {"a": 0, "b": 0}),
    ],
)
def test_below_a_level(level: float, due: float, expected: dict[str, int]) -> None:
    scores = Scores.of({"a": torch.tensor([0.3, 0.1, 0.4, 0.2]), "b": torch.tensor([0.3, -1.0])})
    assert scopes.below(scores, level, due) == expected
    assert due < 1.0 or scopes.below(scores, level) == expected


def test_the_names() -> None:
    assert scopes.resolve("global") is scopes.global_
    assert scopes.resolve("local") is scopes.local
    assert scopes.resolve("erk") is scopes.erk


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"\['erk', 'global', 'lamp', 'local'\] or a callable, got 'layer'"):
        scopes.resolve("layer")


def test_a_callable_is_taken_as_it_is() -> None:
    def keep_all(scores: Scores, sparsity: float) -> Mapping[str, int]:
        return scores.sizes

    assert scopes.resolve(keep_all) is keep_all


def test_local_and_erk_do_not_compute_scores() -> None:
    def compute() -> Tensor:
        raise AssertionError

    scores = StreamedScores({"a": Source.computed(compute, 6, (2, 3))})
    assert scopes.local(scores, 0.5) == scopes.erk(scores, 0.5) == {"a": 3}


# ------------------------------------------------------------------------------------------------ LAMP


def test_lamp_ranks_shares_of_what_is_no_less() -> None:
    # squares over tails: a 1/14, 4/13, 9/9; b 1/19802, 99^2/(99^2+100^2) = .495, 1
    scores = Scores.of({"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([1.0, 99.0, 100.0])})
    assert [scopes.lamp(scores, k / 6) for k in range(6)] == [
        {"a": 3, "b": 3},
        {"a": 3, "b": 2},
        {"a": 2, "b": 2},
        {"a": 1, "b": 2},
        {"a": 1, "b": 1},
        {"a": 0, "b": 1},
    ]


def test_lamp_counts_negative_and_pruned_scores_as_nothing() -> None:
    kept = torch.tensor([False, True, True])
    sources = {
        "a": Source.computed(lambda: torch.tensor([9.0, 2.0, 2.0]), 3, (3,), kept=kept),
        "b": Source.computed(lambda: torch.tensor([-8.0, 1.0, 3.0]), 3, (3,)),
    }
    # a: pruned, 1/2 and 1/2 (equal ones share the sum); b: 0, 1/10, 1
    assert [scopes.lamp(StreamedScores(sources), k / 6) for k in (2, 3, 4)] == [
        {"a": 2, "b": 2},
        {"a": 2, "b": 1},
        {"a": 1, "b": 1},
    ]


@pytest.mark.parametrize("sparsity", [0.3, 0.9, 0.98])
def test_the_criterion_and_the_scope_of_lamp_give_the_same_masks(sparsity: float) -> None:
    def masks(**axes: Any) -> Masks:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(24, 30), nn.Linear(30, 3))
        with torch.no_grad():
            model[2].weight.mul_(0.01)
        return prune(model, sparsity, **axes)

    one, other = masks(criterion=LAMP()), masks(scope="lamp")
    assert all(torch.equal(mask, other[name]) for name, mask in one.items())
    plain = masks()
    assert not all(torch.equal(mask, other[name]) for name, mask in plain.items())


# ------------------------------------------------------------------------------------------------ OWL


def test_owl_spreads_densities_by_outliers() -> None:
    spiky, flat, middle = torch.ones(20), torch.ones(20), torch.ones(20)
    spiky[:2] = 100.0  # the mean is 10.9: two of twenty are more than five times that
    middle[0] = 100.0  # one of twenty
    scores = Scores.of({"a": flat, "b": middle, "c": spiky})
    # densities 0, .1, .2 from the lowest on, shifted to a mean of 0.5
    assert OWL(outliers=5.0, spread=0.1)(scores, 0.5) == {"a": 8, "b": 10, "c": 12}
    assert OWL(outliers=5.0, spread=0.0)(scores, 0.5) == {"a": 10, "b": 10, "c": 10}
    assert OWL(outliers=500.0, spread=0.1)(scores, 0.5) == {"a": 10, "b": 10, "c": 10}
    # no target can have less than nothing: what a lacks is taken from the others
    assert OWL(outliers=5.0, spread=0.2)(scores, 0.9) == {"a": 0, "b": 1, "c": 5}


def test_owl_gives_a_block_one_density() -> None:
    spiky = torch.ones(20)
    spiky[:2] = 100.0
    names = ["layers.0.q.weight", "layers.0.k.weight", "layers.1.q.weight", "layers.1.k.weight"]
    scores = Scores.of(dict(zip(names, [torch.ones(20), torch.ones(10), torch.ones(10), spiky], strict=True)))
    assert list(OWL(spread=0.1, depth=2)(scores, 0.5).values()) == [8, 4, 6, 12]


def test_owl_looks_at_scores_and_not_at_ranks() -> None:
    layers = nn.Sequential(nn.Linear(40, 10, bias=False), nn.Linear(10, 40, bias=False))
    for layer in layers:
        nn.init.ones_(layer.weight)
    data = torch.ones(1, 40)
    data[:, 0] = 100.0
    masks = prune(layers, 0.5, criterion=Wanda(), data=[data], scope=OWL(spread=0.1))
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"0.weight": 240, "1.weight": 160}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"outliers": 0.0}, "outliers must be above 0, got 0.0"),
        ({"spread": 1.0}, r"spread must be in \[0, 1\), got 1.0"),
        ({"depth": -1}, "depth must be at least 0, got -1"),
    ],
)
def test_owl_refuses_what_makes_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OWL(**arguments)


# ------------------------------------------------------------------------------------------------ a minimum density


@pytest.mark.parametrize(
    "scope", [scopes.global_, scopes.erk, scopes.lamp, OWL(spread=0.5)], ids=["global", "erk", "lamp", "owl"]
)
@pytest.mark.parametrize(("sparsity", "density"), [(0.5, 0.3), (0.9, 0.1), (0.9, 0.001), (0.95, 0.05)])
def test_every_target_keeps_its_least_and_the_total_stays(scope: scopes.Scope, sparsity: float, density: float) -> None:
    shapes = {"a": (30, 20), "b": (20, 20), "c": (20, 3), "d": (100, 10)}
    scores = Scores.of({n: s * 10.0**place for place, (n, s) in enumerate(ranked(shapes).items())})
    keep = scopes.at_least(scores, sparsity, scope, density)
    sizes = scores.sizes
    assert list(keep) == list(sizes)
    assert all(keep[name] >= max(1, int(density * sizes[name])) for name in sizes)
    assert sum(keep.values()) == sum(sizes.values()) - round(sparsity * sum(sizes.values()))


def test_a_scope_that_keeps_enough_is_left_alone() -> None:
    scores = ranked({"a": (30, 20), "b": (20, 20)})
    assert scopes.at_least(scores, 0.5, scopes.global_, 0.2) == scopes.global_(scores, 0.5)


def test_the_others_share_what_is_left_by_their_scores() -> None:
    scores = Scores.of({"a": torch.arange(4.0), "b": torch.arange(4.0) + 10, "c": torch.arange(4.0) + 12.5})
    # six are kept: by rank two of b (12, 13) and all of c; with two of a, the highest four of the others
    assert scopes.global_(scores, 0.5) == {"a": 0, "b": 2, "c": 4}
    assert scopes.at_least(scores, 0.5, scopes.global_, 0.5) == {"a": 2, "b": 2, "c": 2}
    assert scopes.at_least(scores, 0.5, scopes.global_, 0.25) == {"a": 1, "b": 1, "c": 4}


def test_no_layer_is_lost() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(30, 4))
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
    assert not prune(copy.deepcopy(model), 0.9)["1.weight"].any()
    masks = prune(model, 0.9, min_density=0.02)
    assert int(masks["1.weight"].sum()) == 18
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.9 * 1920)


def test_more_than_the_sparsity_leaves_is_refused() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"min_density must leave room .* got 0\.1, which keeps 3 units of 1 "):
        prune(model, 0.7, min_density=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.5, "min_density": -0.1}, r"min_density must be in \[0, 1\], got -0.1"),
        (
            {"sparsity": 0.9, "min_density": 0.2},
            "must be at most 1 - sparsity, got 0.2 for a sparsity of 0.9",
        ),
        ({"sparsity": {"*": 0.5}, "min_density": 0.2}, "min_density must go with one sparsity for all targets"),
        ({"threshold": 0.5, "min_density": 0.2}, "min_density must go with one sparsity for all targets"),
    ],
)
def test_a_minimum_density_that_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune(nn.Linear(4, 4), **arguments)
    with pytest.raises(ValueError, match=message):
        Pruning(**arguments)
