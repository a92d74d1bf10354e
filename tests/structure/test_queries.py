"""Single queries of grouped-query attention go, as many of each head of keys and values, and the outputs stay."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import GroupedAttention, Tiny, agrees, fit
from torch import nn

from lightning_prune import Head, Pruning, Random, load_shrunk, prune, save_shrunk, shrink, sparsegpt
from lightning_prune.structure.cut_record import CutRecord, cut_record_of

TOKENS = torch.randn(2, 3, 12, dtype=torch.float64)


class Net(Tiny):
    size = (3, 12)

    def build(self, dropout: float) -> nn.Sequential:
        return nn.Sequential(
            GroupedAttention(12, 6, 2), nn.Tanh(), GroupedAttention(12, 6, 2), nn.Flatten(), nn.Linear(36, 3)
        )


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(GroupedAttention(12, 6, 2), nn.Tanh(), GroupedAttention(12, 6, 2)).double()


def without(attention: Any, queries: list[int]) -> None:
    """Let nothing read some queries of an attention."""
    with torch.no_grad():
        attention.o.weight.view(12, 6, 2)[:, queries] = 0.0


def left(attention: Any) -> list[int]:
    """How many queries of each head of keys and values are read."""
    return attention.o.weight.view(12, 2, -1, 2).ne(0).any(3).any(0).sum(1).tolist()


def numbers(attention: Any) -> tuple[int, ...]:
    layers = [layer.out_features for layer in (attention.q, attention.k, attention.v)]
    return (*layers, attention.o.in_features, attention.num_heads, attention.num_kv_heads)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert torch.allclose(one(TOKENS), other(TOKENS), rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("given", [{}, {"scope": "global"}, {"criterion": Random()}, {"of": "parameters"}])
def test_every_head_of_keys_keeps_as_many_queries_and_the_outputs_stay(given: dict[str, Any]) -> None:
    model = net()
    prune(model, 0.3, granularity=Head(queries=True), example_inputs=TOKENS, **given)
    small = shrink(model, TOKENS)
    assert_same(small, model)
    for attention, smaller in zip(model[::2], small[::2], strict=True):
        first, second = left(attention)
        assert first == second
        assert numbers(smaller) == (4 * first, 4, 4, 4 * first, 2 * first, 2)
    assert sum(left(attention)[0] for attention in model[::2]) == (3 if given.get("of") else 4)


def test_the_lowest_of_each_head_of_keys_go() -> None:
    model = net()
    with torch.no_grad():
        for attention in model[::2]:
            attention.q.weight.copy_(torch.tensor([5.0, 1.0, 6.0, 9.0, 8.0, 7.0]).repeat_interleave(2).unsqueeze(1))
            attention.q.bias.fill_(1.0)
    prune(model, 1 / 3, granularity=Head(queries=True), example_inputs=TOKENS)
    for attention in model[::2]:
        kept = attention.o.weight.view(12, 6, 2).any(2).any(0)
        assert kept.tolist() == [True, False, True, True, True, False]
        assert attention.q.weight.view(6, -1).any(1).tolist() == kept.tolist()
        assert attention.q.bias.view(6, -1).any(1).tolist() == kept.tolist()
        assert attention.k.weight.all()
        assert attention.v.weight.all()


def test_where_heads_of_keys_differ_the_one_with_most_queries_decides() -> None:
    model = net()
    without(model[0], [0, 1, 4])  # 1 and 2 are left
    without(model[2], [1])  # 2 and 3
    small = shrink(model, TOKENS)
    assert numbers(small[0])[-2:] == (4, 2)
    assert numbers(small[2])[-2:] == (6, 2)
    assert_same(small, model)


def test_heads_of_keys_go_and_queries_of_others() -> None:
    model = net()
    without(model[0], [0, 1, 2, 4])
    small = shrink(model, TOKENS)
    assert numbers(small[0]) == (4, 2, 2, 4, 2, 1)
    assert_same(small, model)


def test_one_query_stays_and_minimum_counts_queries() -> None:
    for minimum, stays in ((1, 1), (3, 2), (6, 3)):
        model = net()
        granularity = Head(queries=True, minimum=minimum)
        prune(model, 0.99, granularity=granularity, min_density=0.0, example_inputs=TOKENS)
        assert [left(attention) for attention in model[::2]] == [[stays] * 2] * 2


def test_round_to_of_shrink_counts_queries() -> None:
    model = net()
    without(model[0], [0, 1, 3, 4])
    assert numbers(shrink(model, TOKENS, round_to=4)[0])[-2:] == (4, 2)


def test_they_go_step_by_step_while_training_and_are_held() -> None:
    model = Net()
    model.example_input_array = torch.randn(2, 3, 12)
    callback = Pruning(2 / 3, granularity=Head(queries=True), schedule="linear", interval="step", frequency=2)
    fit(model, callback, max_epochs=2)
    assert agrees(model, callback.masks)
    assert [left(attention) for attention in (model.net[0], model.net[2])] == [[1, 1]] * 2
    small = shrink(model)
    assert numbers(small.net[0]) == (4, 4, 4, 4, 2, 2)
    assert torch.allclose(small(model.example_input_array), model(model.example_input_array), atol=1e-6)


def test_a_run_ends_with_the_small_model() -> None:
    model = Net()
    model.example_input_array = torch.randn(2, 3, 12)
    fit(model, Pruning(1 / 3, granularity=Head(queries=True), shrink_at_end=True), max_epochs=2)
    assert [numbers(attention)[-2:] for attention in (model.net[0], model.net[2])] == [(4, 2)] * 2


def test_a_second_cut_and_the_file_have_the_numbers_of_both(tmp_path: Path) -> None:
    model = net()
    for sparsity in (1 / 3, 1 / 2):
        prune(model, sparsity, granularity=Head(queries=True), example_inputs=TOKENS)
        model = shrink(model, TOKENS)
    record = cut_record_of(model)
    assert record is not None
    assert record.queries == {"0": (3, 1), "2": (3, 1)}
    assert CutRecord.from_state_dict(record.state_dict()).queries == record.queries
    save_shrunk(model, tmp_path / "small.pt")
    again = load_shrunk(net(), tmp_path / "small.pt")
    assert numbers(again[0]) == numbers(model[0]) == (4, 4, 4, 4, 2, 2)
    assert torch.equal(again(TOKENS), model(TOKENS))
    with pytest.raises(ValueError, match=r"at least one head.*queries"):
        CutRecord.from_state_dict({**record.state_dict(), "queries": {"0": [1, 3]}})


def test_what_does_not_fit_is_refused() -> None:
    packed = nn.MultiheadAttention(12, 3, batch_first=True).double()
    with pytest.raises(ValueError, match=r"in_proj_weight: each of its queries has keys and values of its own: use"):
        prune(packed, 0.5, granularity=Head(queries=True), example_inputs=(TOKENS, TOKENS, TOKENS))
    with pytest.raises(ValueError, match=r"threshold must be None for Head\(.*queries=True.*within groups, got 0\.5"):
        Pruning(threshold=0.5, granularity=Head(queries=True))
    with pytest.raises(ValueError, match=r"granularity must be Weight\(\), .* got Head\(.*queries=True\)"):
        sparsegpt(net(), 0.5, data=[TOKENS], granularity=Head(queries=True), scope="local")
    with pytest.raises(TypeError, match="queries must be"):
        Head(queries=1)  # type: ignore[arg-type]


def test_attention_without_groups_is_left_out_beside_others() -> None:
    model = nn.Sequential(GroupedAttention(12, 6, 2), nn.Tanh(), GroupedAttention(12, 6, 6)).double()
    masks = prune(model, 1 / 3, granularity=Head(queries=True), example_inputs=TOKENS)
    assert set(masks) == {"0.q.weight", "0.q.bias", "0.o.weight"}
    small = shrink(model, TOKENS)
    assert [numbers(small[place])[-2:] for place in (0, 2)] == [(4, 2), (6, 6)]


def test_where_all_queries_share_one_head_of_keys_single_queries_go() -> None:
    model = nn.Sequential(GroupedAttention(12, 6, 1), nn.Tanh()).double()
    prune(model, 1 / 2, granularity=Head(queries=True), example_inputs=TOKENS)
    small = shrink(model, TOKENS)
    assert numbers(small[0]) == (6, 2, 2, 6, 3, 1)
    assert_same(small, model)
