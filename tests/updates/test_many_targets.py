"""A model of many small targets: each costs a few operations an update, and the masks are those of any other model."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Criterion, prune
from lightning_prune.tensors import radix
from lightning_prune.units.units import Units
from lightning_prune.updates import decision


@dataclass(frozen=True)
class Counted(Criterion):
    """Magnitude, and for which targets it is asked."""

    asked: list[str] = field(default_factory=list)

    def scores(self, units: Units) -> Tensor:
        self.asked.append(units.name)
        return units.mean(torch.abs)


def many(count: int = 300) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(30, 30, bias=False) for _ in range(count))


@pytest.mark.parametrize("scope", ["global", "local"])
def test_scores_of_many_small_targets_are_computed_once(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    criterion = Counted()
    masks = prune(many(), 0.7, criterion=criterion, scope=scope)  # type: ignore[arg-type]
    assert decision.HELD < 300 * 900
    assert criterion.asked == list(masks)
    monkeypatch.setattr(decision, "HELD", 0)
    streamed = prune(many(), 0.7, scope=scope)  # type: ignore[arg-type]
    assert all(torch.equal(mask, streamed[name]) for name, mask in masks.items())


def test_the_digits_of_small_tensors_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, histogram = [], radix._histogram
    monkeypatch.setattr(radix, "_histogram", lambda key, *rest: calls.append(key.numel()) or histogram(key, *rest))
    monkeypatch.setattr(radix, "_SMALL", 1000)
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 900, 99, 100, 2000, 0, 5, 1000, 1001, *[10] * 300]
    parts = [torch.randint(-50, 50, (size,), generator=generator, dtype=torch.int32) for size in sizes]
    total = torch.cat(parts)
    for k in (1, 700, len(total)):
        key, among, equal = radix.kth(lambda: parts, k, 32)
        assert key == total.kthvalue(k).values
        assert equal == int((total == key).sum())
        assert among == k - int((total < key).sum())
    assert len(calls) <= 3 * 2 * 11
    assert sum(calls) == 3 * 2 * len(total)
