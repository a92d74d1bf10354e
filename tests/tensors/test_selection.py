"""Exact selection: keys, k-th smallest, shares of several targets, and targets that lie in pieces on several ranks."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_prune.tensors.radix import Reduce, keys, kth
from lightning_prune.tensors.selection import Scores
from lightning_prune.tensors.sources import Placement, Source
from lightning_prune.tensors.streaming import StreamedScores

INF = float("inf")
CHUNK = 1 << 20  # scores are worked through in pieces of this size

deterministic = settings(derandomize=True, database=None, deadline=None, max_examples=150)


def streamed(scores: Mapping[str, Tensor]) -> StreamedScores:
    """Return scores as those of a large model: every one of these tests is about the streaming selection."""
    sources = {n: Source.computed(partial(torch.clone, s), s.numel(), tuple(s.shape)) for n, s in scores.items()}
    return StreamedScores(sources, bits=64 if any(s.dtype == torch.float64 for s in scores.values()) else 32)


def lowest(scores: Tensor, k: int) -> Tensor:
    return streamed({"w": scores}).lowest("w", k)


def stable(scores: Mapping[str, Tensor], k: int) -> dict[str, list[bool]]:
    """Reference: Python's sort is stable, exact, and holds -0.0 equal to 0.0."""
    flat = [(value, name, i) for name, s in scores.items() for i, value in enumerate(s.flatten().tolist())]
    picked: dict[str, list[bool]] = {name: [False] * s.numel() for name, s in scores.items()}
    for _, name, i in sorted(flat, key=lambda entry: entry[0])[:k]:
        picked[name][i] = True
    return picked


def selected(scores: Scores, k: int) -> dict[str, list[bool]]:
    counts = scores.counts(k)
    return {name: scores.lowest(name, counts[name]).flatten().tolist() for name in scores}


# ------------------------------------------------------------------------------------------------ keys


@pytest.mark.parametrize("bits", [32, 64])
def test_keys_order_as_the_floats(bits: int) -> None:
    ascending = [-INF, -3e38, -2.0, -1.0, -1e-40, 0.0, 1e-40, 1.0, 2.0, 3e38, INF]
    assert (keys(torch.tensor(ascending, dtype=torch.float64), bits).diff() > 0).all()


@pytest.mark.parametrize("bits", [32, 64])
def test_keys_hold_both_zeros_equal(bits: int) -> None:
    negative, positive = keys(torch.tensor([-0.0, 0.0]), bits).tolist()
    assert negative == positive


def test_keys_tell_neighbouring_floats_apart() -> None:
    one = torch.tensor([1.0, -1.0])
    for towards in (INF, -INF):
        assert (keys(one) != keys(torch.nextafter(one, torch.full_like(one, towards)))).all()


def test_keys_leave_the_scores_as_they_are() -> None:
    scores = torch.tensor([-0.0, -1.5, 2.0])
    keys(scores)
    assert scores.tolist() == [0.0, -1.5, 2.0]
    assert torch.signbit(scores).tolist() == [True, True, False]


# ------------------------------------------------------------------------------------------------ kth


@pytest.mark.parametrize(
    ("k", "expected"),
    # sorted: -5 -5 0 2 2 2 70000; (k-th key, how many of its equals are among the k, how many equals there are)
    [
        (1, (-5, 1, 2)),
        (2, (-5, 2, 2)),
        (3, (0, 1, 1)),
        (4, (2, 1, 3)),
        (5, (2, 2, 3)),
        (6, (2, 3, 3)),
        (7, (70000, 1, 1)),
    ],
)
@pytest.mark.parametrize("bits", [32, 64])
def test_kth_counts_its_equals(k: int, expected: tuple[int, int, int], bits: int) -> None:
    dtype = torch.int32 if bits == 32 else torch.int64
    parts = [torch.tensor(part, dtype=dtype) for part in ([2, -5, 70000], [], [2, 0], [-5, 2])]
    assert kth(lambda: parts, k, bits) == expected


@pytest.mark.parametrize(("bits", "dtype"), [(32, torch.int32), (64, torch.int64)])
def test_kth_reaches_both_ends_of_the_integers(bits: int, dtype: torch.dtype) -> None:
    ends = torch.tensor([torch.iinfo(dtype).max, torch.iinfo(dtype).min, 0], dtype=dtype)
    assert [kth(lambda: [ends], k, bits)[0] for k in (1, 2, 3)] == [ends.min(), 0, ends.max()]


@deterministic
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=40), st.data())
def test_kth_is_the_kth_of_a_sort(values: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    key, among, equal = kth(lambda: [torch.tensor(values)], k, 64)
    ordered = sorted(values)
    assert key == ordered[k - 1]
    assert among == ordered[:k].count(key)
    assert equal == ordered.count(key)


# ------------------------------------------------------------------------------------------------ one target


@pytest.mark.parametrize(
    ("scores", "order"),
    # `order` lists the flat positions from the first to go to the last: equal scores in flat order
    [
        pytest.param([3.0, -1.0, 2.0, -4.0], [3, 1, 2, 0], id="negative"),
        pytest.param([0.0, -0.0, 0.0, -0.0], [0, 1, 2, 3], id="both zeros are equal"),
        pytest.param([0.0, -1e-45, -0.0, 1e-45], [1, 0, 2, 3], id="zeros between the smallest numbers"),
        pytest.param([7.0, 7.0, 7.0], [0, 1, 2], id="all equal"),
        pytest.param([-2.0, -2.0, -3.0, -2.0], [2, 0, 1, 3], id="negative ties"),
        pytest.param([1.0, -INF, 0.5, -INF], [1, 3, 2, 0], id="minus infinity first"),
        pytest.param([INF, 1.0, 3e38], [1, 2, 0], id="infinity last"),
        pytest.param([5.0], [0], id="one"),
    ],
)
def test_every_k_picks_exactly_the_k_lowest(scores: list[float], order: list[int]) -> None:
    for k in range(len(scores) + 1):
        expected = [i in order[:k] for i in range(len(scores))]
        assert lowest(torch.tensor(scores), k).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_float_type_is_selected_exactly(dtype: torch.dtype) -> None:
    scores = torch.tensor([1.0, -0.5, 1.0078125, 0.25], dtype=dtype)  # 1.0078125: the next bfloat16 after 1
    assert lowest(scores, 3).tolist() == [True, True, False, True]
    assert lowest(scores, 2).tolist() == [False, True, False, True]


def test_float64_scores_that_are_one_float32_are_told_apart() -> None:
    scores = torch.tensor([1.0 + 3e-16, 1.0, 1.0 + 6e-16], dtype=torch.float64)
    assert len(set(scores.float().tolist())) == 1
    assert lowest(scores, 1).tolist() == [False, True, False]
    assert lowest(scores, 2).tolist() == [True, True, False]


def test_one_float64_target_makes_all_comparisons_exact() -> None:
    scores = streamed({"single": torch.tensor([1.0]), "double": torch.tensor([1.0 - 1e-12], dtype=torch.float64)})
    assert scores.counts(1) == {"single": 0, "double": 1}


@pytest.mark.parametrize(
    "scores",
    [
        pytest.param(torch.tensor([[4.0, 1.0], [3.0, 2.0], [0.0, 5.0]]).T, id="transposed"),
        pytest.param(torch.arange(12.0).flip(0)[::3], id="strided"),
        pytest.param(torch.tensor([2.0, 1.0]).expand(3, 2), id="expanded"),
        pytest.param(torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last), id="channels_last"),
    ],
)
def test_memory_layout_does_not_matter(scores: Tensor) -> None:
    for k in range(scores.numel() + 1):
        picked = lowest(scores, k)
        assert picked.shape == scores.shape
        assert picked.flatten().tolist() == stable({"w": scores}, k)["w"]


def test_a_scalar_and_an_empty_tensor_are_selected() -> None:
    assert lowest(torch.tensor(3.0), 1).item() is True
    assert lowest(torch.tensor(3.0), 0).item() is False
    assert lowest(torch.empty(0, 4), 0).shape == (0, 4)


def test_an_empty_target_among_others_gets_nothing() -> None:
    scores = streamed({"a": torch.tensor([2.0, 1.0]), "none": torch.empty(0), "b": torch.tensor([1.5])})
    assert scores.counts(2) == {"a": 1, "none": 0, "b": 1}
    assert scores.lowest("none", 0).tolist() == []


@pytest.mark.parametrize("k", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 36])
def test_ties_across_chunks_fall_in_flat_order(k: int) -> None:
    picked = lowest(torch.zeros(2 * CHUNK + 37), k)
    assert int(picked.sum()) == k
    assert picked[:k].all()


def test_more_scores_than_a_chunk_agree_with_a_stable_sort() -> None:
    torch.manual_seed(0)
    scores = torch.randint(-500, 500, (CHUNK + 37,)).float() / 7
    order = scores.argsort(stable=True)
    for k in (1, 12_345, CHUNK // 2, CHUNK + 36):
        expected = torch.zeros_like(scores, dtype=torch.bool)
        expected[order[:k]] = True
        assert torch.equal(lowest(scores, k), expected)


def test_scores_are_not_changed_by_a_selection() -> None:
    scores = torch.tensor([3.0, -0.0, 1.0])
    lowest(scores, 2)
    assert scores.tolist() == [3.0, 0.0, 1.0]


# ------------------------------------------------------------------------------------------------ several targets


def test_equal_scores_fall_in_the_order_of_the_targets_then_flat() -> None:
    scores = streamed({"b": torch.ones(2), "a": torch.ones(3)})
    assert [list(scores.counts(k).values()) for k in range(6)] == [[0, 0], [1, 0], [2, 0], [2, 1], [2, 2], [2, 3]]
    assert scores.lowest("a", scores.counts(3)["a"]).tolist() == [True, False, False]


def test_counts_and_lowest_by_hand() -> None:
    scores = streamed({"a": torch.tensor([[0.1, 0.9], [0.3, 0.3]]), "b": torch.tensor([0.3, 0.2, 0.3])})
    # sorted: a0 .1 | b1 .2 | a2 .3, a3 .3, b0 .3, b2 .3 | a1 .9
    assert [scores.counts(k)["a"] for k in range(8)] == [0, 1, 1, 2, 3, 3, 3, 4]
    assert [scores.counts(k)["b"] for k in range(8)] == [0, 0, 1, 1, 1, 2, 3, 3]
    counts = scores.counts(5)
    assert scores.lowest("a", counts["a"]).tolist() == [[True, False], [True, True]]
    assert scores.lowest("b", counts["b"]).tolist() == [True, True, False]


def test_lowest_does_not_depend_on_what_was_counted_before() -> None:
    scores = streamed({"a": torch.tensor([1.0, 1.0, 1.0]), "b": torch.tensor([1.0, 0.0])})
    scores.counts(3)  # leaves a share for each target, which another number must not use
    assert scores.lowest("a", 1).tolist() == [True, False, False]
    assert scores.lowest("b", 2).tolist() == [True, True]
    assert scores.lowest("b", 1).tolist() == [False, True]
    scores.counts(1)
    assert scores.lowest("a", 2).tolist() == [True, True, False]


@deterministic
@given(
    st.lists(
        st.lists(st.sampled_from([-INF, -2.5, -1.0, -0.0, 0.0, 1e-30, 1.0, 2.5]), max_size=9), min_size=1, max_size=4
    ),
    st.data(),
)
def test_selection_is_that_of_a_stable_sort(targets: list[list[float]], data: st.DataObject) -> None:
    scores = {f"t{i}": torch.tensor(values) for i, values in enumerate(targets)}
    k = data.draw(st.integers(0, sum(map(len, targets))))
    found = streamed(scores)
    assert sum(found.counts(k).values()) == k
    assert selected(found, k) == stable(scores, k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_random_scores_agree_with_a_stable_argsort(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    scores = {name: torch.randn(shape).to(dtype) for name, shape in {"a": (13, 7), "b": (50,), "c": (3, 4, 5)}.items()}
    flat = torch.cat([s.flatten() for s in scores.values()])
    order = flat.argsort(stable=True)
    for k in range(0, flat.numel() + 1, 17):
        expected = torch.zeros(flat.numel(), dtype=torch.bool)
        expected[order[:k]] = True
        found = selected(streamed(scores), k)
        assert [bit for picked in found.values() for bit in picked] == expected.tolist()


@pytest.mark.parametrize(("level", "expected"), [(-1.0, 1), (0.0, 2), (0.5, 4), (0.6, 6), (INF, 7)])
def test_below_counts_what_scores_strictly_less(level: float, expected: int) -> None:
    scores = streamed({"a": torch.tensor([0.5, -INF, 0.0, 9.0]), "b": torch.tensor([0.5, -0.0, -1.0])})
    assert scores.below(level) == expected


def test_below_compares_half_precision_scores_with_the_level_as_given() -> None:
    # 0.1000976562 is a bfloat16; 0.1002 is not, and rounds to it
    scores = streamed({"a": torch.tensor([0.1000976562, 0.2], dtype=torch.bfloat16)})
    assert scores.below(0.1002) == 1


@pytest.mark.parametrize("level", [0.1, 0.7])  # as float32, the one is greater and the other smaller
def test_below_compares_double_scores_with_the_level_as_given(level: float) -> None:
    scores = streamed({"a": torch.tensor([level - 1e-12, level, level + 1e-12], dtype=torch.float64)})
    assert scores.below(level) == 1


def test_scores_are_a_mapping_that_computes_on_demand() -> None:
    calls = []

    def compute() -> Tensor:
        calls.append(1)
        return torch.tensor([2.0, 1.0])

    scores = StreamedScores({"a": Source.computed(compute, 2, (1, 2))})
    assert (list(scores), len(scores), scores.sizes, scores.shapes) == (["a"], 1, {"a": 2}, {"a": (1, 2)})
    assert not calls
    assert scores["a"].tolist() == [2.0, 1.0]
    assert len(calls) == 1


# ------------------------------------------------------------------------------------------------ pruned already


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("score", [-INF, -1.0, -0.0, 0.0, 3e38, INF])
def test_the_key_of_what_is_pruned_is_the_lowest(dtype: torch.dtype, score: float) -> None:
    bits = 64 if dtype == torch.float64 else 32
    scores = torch.tensor([score, score, -INF], dtype=dtype)
    pruned, kept, lowest_score = keys(scores, bits, torch.tensor([False, True, True])).tolist()
    assert pruned < lowest_score
    assert kept == keys(scores, bits)[1]


def held(bits: int = 32) -> Scores:
    """Return scores of two targets with 2 pruned units, of which the scores would be the highest."""
    double = torch.float64 if bits == 64 else torch.float32
    a = torch.tensor([[9.0, 1.0], [-2.0, 3.0]], dtype=double)
    b = torch.tensor([0.5, 9.0, -2.0], dtype=double)
    return StreamedScores(
        {
            "a": Source.computed(lambda: a, 4, (2, 2), kept=torch.tensor([[False, True], [True, True]])),
            "b": Source.computed(lambda: b, 3, (3,), kept=torch.tensor([True, False, True])),
        },
        bits=bits,
    )


@pytest.mark.parametrize("bits", [32, 64])
def test_pruned_units_come_first(bits: int) -> None:
    scores = held(bits)
    # a0, b1 (pruned) | a2 -2, b2 -2 | b0 0.5 | a1 1 | a3 3
    assert [tuple(scores.counts(k).values()) for k in range(8)] == [
        *((0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (2, 3), (3, 3), (4, 3)),
    ]
    assert scores.lowest("a", 1).tolist() == [[True, False], [False, False]]
    assert scores.lowest("a", 2).tolist() == [[True, False], [True, False]]
    assert scores.lowest("b", 2).tolist() == [False, True, True]
    counts = scores.counts(4)
    assert scores.lowest("b", counts["b"]).tolist() == [False, True, True]


def test_pruned_units_are_below_every_level_and_show_as_minus_infinity() -> None:
    scores = held()
    assert [scores.below(level) for level in (-1e38, -2.0, -1.0, 0.6, INF)] == [2, 2, 4, 5, 7]
    assert scores["a"].tolist() == [[-INF, 1.0], [-2.0, 3.0]]


def test_what_is_pruned_of_more_units_than_a_chunk_comes_first() -> None:
    size = CHUNK + 100
    gone = torch.arange(0, size, 7)
    kept = torch.ones(size, dtype=torch.bool)
    kept[gone] = False
    scores = StreamedScores({"w": Source.computed(lambda: torch.arange(size).float() - 1e6, size, (size,), kept=kept)})
    picked = scores.lowest("w", gone.numel() + 3)
    assert picked[gone].all()
    assert (picked & kept).nonzero().flatten().tolist() == [1, 2, 3]


# ------------------------------------------------------------------------------------------------ several ranks

Pieces = Sequence[tuple[list[int], bool]]  # for each rank: the flat positions it holds, and whether it counts them


def on_ranks(world: int, work: Callable[[int, Reduce], list[list[bool]]]) -> list[list[list[bool]]]:
    """Run the work of every rank in a thread of its own; `reduce` waits for all and sums, as an all-reduce does."""
    barrier = threading.Barrier(world, timeout=20)
    slots: list[Tensor] = [torch.empty(0)] * world

    def reduce(rank: int, counts: Tensor) -> Tensor:
        slots[rank] = counts
        barrier.wait()
        assert len({part.shape for part in slots}) == 1, "ranks take part in different reductions"
        total = torch.stack(slots).sum(0)
        barrier.wait()
        return total

    def run(rank: int) -> list[list[bool]]:
        try:
            return work(rank, partial(reduce, rank))
        except threading.BrokenBarrierError:
            return []  # another rank has failed, and its error is the one to show
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        found = list(pool.map(run, range(world)))
    assert not barrier.broken, "ranks wait for each other"
    return found


def check_ranks(
    whole: Mapping[str, Tensor],
    pieces: Mapping[str, Pieces],
    ks: Sequence[int],
    kept: Mapping[str, Tensor] | None = None,
) -> None:
    """Select on ranks that hold pieces, and compare each piece with the selection of one process."""
    given = whole
    if kept is not None:
        whole = {name: scores.masked_fill(~kept[name], -INF) for name, scores in given.items()}
    world = len(next(iter(pieces.values())))
    expected = [stable(whole, k) for k in ks]
    alone = {k: streamed(whole).counts(k) for k in ks}

    def source(name: str, rank: int) -> Source:
        held, counts = pieces[name][rank]
        place = torch.tensor(held, dtype=torch.int64)
        left = kept[name][place] if kept is not None else None
        return Source.computed(
            lambda: given[name].flatten()[place], given[name].numel(), (), left, None, Placement(counts, lambda: place)
        )

    def work(rank: int, reduce: Reduce) -> list[list[bool]]:
        scores = StreamedScores({name: source(name, rank) for name in whole}, reduce)
        found = []
        for k in ks:
            counts = scores.counts(k)
            assert counts == alone[k]
            found.append([bit for name in whole for bit in scores.lowest(name, counts[name]).tolist()])
        return found

    for rank, found in enumerate(on_ranks(world, work)):
        wanted = [[one[name][place] for name in whole for place in pieces[name][rank][0]] for one in expected]
        assert found == wanted


WHOLE = {
    "a": torch.tensor([2.0, 1.0, 1.0, 0.0, 1.0, 3.0]),
    "b": torch.tensor([1.0, -1.0, 1.0, 1.0]),
}


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param({"a": [([0, 1, 2], True), ([3, 4, 5], True)], "b": [([0, 1], True), ([2, 3], True)]}, id="halves"),
        pytest.param({"a": [([0], True), ([1, 2, 3, 4, 5], True)], "b": [([0, 1, 2], True), ([3], True)]}, id="uneven"),
        pytest.param(
            {"a": [([0, 1, 2, 3, 4, 5], True), ([], True)], "b": [([], True), ([0, 1, 2, 3], True)]}, id="empty"
        ),
        pytest.param(
            {"a": [([0, 2, 4], True), ([1, 3, 5], True)], "b": [([1, 3], True), ([0, 2], True)]}, id="columns"
        ),
        pytest.param(
            {"a": [(list(range(6)), True), (list(range(6)), False)], "b": [([2, 3], True), ([0, 1], True)]},
            id="a copy and pieces",
        ),
        pytest.param(
            {
                "a": [([0, 1, 2], True), ([0, 1, 2], False), ([3, 4, 5], True), ([3, 4, 5], False)],
                "b": [([0, 1], True), ([0, 1], False), ([2, 3], True), ([2, 3], False)],
            },
            id="two copies of two pieces",
        ),
    ],
)
def test_ranks_select_what_one_process_selects(pieces: dict[str, Pieces]) -> None:
    check_ranks(WHOLE, pieces, range(11))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("pruned", [False, True])
def test_random_pieces_with_many_ties_are_selected_as_one(seed: int, pruned: bool) -> None:
    torch.manual_seed(seed)
    whole = {name: torch.randint(-2, 3, (size,)) / 2 for name, size in {"a": 23, "b": 1, "c": 40}.items()}
    pieces: dict[str, Pieces] = {}
    for name, scores in whole.items():
        holder = torch.randint(0, 3, (scores.numel(),))
        pieces[name] = [((holder == rank).nonzero().flatten().tolist(), True) for rank in range(3)]
    kept = {name: torch.rand(scores.shape) > 0.3 for name, scores in whole.items()} if pruned else None
    check_ranks(whole, pieces, range(seed, 65, 8), kept)  # with the eight seeds, every number


def test_a_target_that_every_rank_holds_whole_is_counted_once() -> None:
    def work(rank: int, reduce: Reduce) -> list[list[bool]]:
        here = rank == 0
        scores = StreamedScores(
            {"w": Source.computed(lambda: torch.tensor([1.0, 0.0, 1.0, 1.0]), 4, (4,), placement=Placement(here))},
            reduce,
        )
        assert scores.below(0.5) == 1
        assert scores.counts(3) == {"w": 3}
        return [scores.lowest("w", k).tolist() for k in (2, 3)]

    expected = [[True, True, False, False], [True, True, True, False]]
    assert on_ranks(2, work) == [expected, expected]


def test_below_counts_every_unit_once_over_ranks() -> None:
    whole = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])

    def work(rank: int, reduce: Reduce) -> list[list[bool]]:
        held = slice(0, 2) if rank < 2 else slice(2, 5)  # ranks 0 and 1 hold copies of one piece
        sources = {"w": Source.computed(lambda: whole[held], 5, (5,), placement=Placement(rank != 1))}
        assert StreamedScores(sources, reduce).below(0.35) == 3
        return []

    assert on_ranks(3, work) == [[], [], []]


# ------------------------------------------------------------------------------------------------ from a sample

SAMPLED = 300_000  # scores: of so many, a sample is looked at first

HARD = {
    "normal": lambda: torch.randn(SAMPLED),
    "mostly equal": lambda: torch.randn(SAMPLED).relu(),
    "few values": lambda: torch.randint(0, 4, (SAMPLED,)).double(),
    "sorted": lambda: torch.arange(SAMPLED).float() - SAMPLED / 2,
    "a sample sees the others": lambda: (torch.arange(SAMPLED) % 67 == 0).float().mul_(torch.rand(SAMPLED)),
    "heavy tails": lambda: torch.randn(SAMPLED).pow(9),
    "one value": lambda: torch.ones(SAMPLED),
}


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("distribution", HARD)
def test_many_scores_of_any_distribution_are_selected_exactly(distribution: str, pruned: bool) -> None:
    torch.manual_seed(2)
    whole = HARD[distribution]()
    kept = torch.rand(SAMPLED) > 0.5 if pruned else None
    order = (whole if kept is None else whole.masked_fill(~kept, -INF)).argsort(stable=True)
    parts = {"a": slice(0, 1000), "b": slice(1000, 1000), "c": slice(1000, SAMPLED)}
    sources = {}
    for name, part in parts.items():
        left = None if kept is None else kept[part]
        size = part.stop - part.start
        sources[name] = Source.computed(lambda part=part: whole[part], size, (size,), kept=left)  # type: ignore[misc]
    scores = StreamedScores(sources, bits=64 if whole.dtype == torch.float64 else 32)
    for k in (1, SAMPLED // 10, SAMPLED // 2, SAMPLED - 1000, SAMPLED - 1, SAMPLED):
        expected = torch.zeros(SAMPLED, dtype=torch.bool)
        expected[order[:k]] = True
        counts = scores.counts(k)
        assert torch.equal(torch.cat([scores.lowest(name, counts[name]) for name in parts]), expected), k


def test_many_scores_are_sampled_and_then_read_once() -> None:
    scores, asked = torch.randn(SAMPLED), []

    def part(at: slice | Tensor) -> Tensor:
        asked.append(scores[at].numel())
        return scores[at]

    source = Source(lambda: (scores, part), SAMPLED, (SAMPLED,))
    assert int(StreamedScores({"w": source}).lowest("w", SAMPLED // 2).sum()) == SAMPLED // 2
    assert sum(asked) < 1.1 * SAMPLED


@pytest.mark.parametrize("pruned", [False, True])
def test_random_pieces_of_many_scores_are_selected_as_one(pruned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_prune.tensors.streaming._FEW", 1)
    test_random_pieces_with_many_ties_are_selected_as_one(0, pruned)
    test_ranks_select_what_one_process_selects(
        {"a": [([0, 1, 2], True), ([3, 4, 5], True)], "b": [([0, 1], True), ([2, 3], True)]}
    )
