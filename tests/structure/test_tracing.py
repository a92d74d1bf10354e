"""Tracing: which of the two ways to follow channels serves a model, and that they agree."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch_pruning
from torch import Tensor, nn

from lightning_prune import Channel, prune, shrink
from lightning_prune.structure import dependencies, tracing
from lightning_prune.structure.dependencies import coupled
from lightning_prune.structure.grouping import ROOTS
from lightning_prune.structure.groups import Graph


class Detector(nn.Module):
    """A depthwise-separable backbone with boxes and scores of several scales, joined as in SSD.

    Args:
        scales: How many maps have heads of their own.
        listed: Whether there is a dict for each sample, instead of two tensors.
        activation: What follows each batch norm.
    """

    def __init__(self, scales: int = 3, listed: bool = False, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), activation())
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.BatchNorm2d(8), activation(), nn.Conv2d(8, 8, 1))
            for _ in range(scales)
        )
        self.boxes = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=1) for _ in range(scales))
        self.scores = nn.ModuleList(nn.Conv2d(8, 5, 3, padding=1) for _ in range(scales))
        self.listed = listed

    def forward(self, images: Tensor) -> object:
        features, boxes, scores = self.stem(images), [], []
        for stage, box, score in zip(self.stages, self.boxes, self.scores, strict=True):
            features = stage(features)
            boxes.append(box(features).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)))
            scores.append(score(features).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 5)))
        found = torch.cat(boxes, 1), torch.cat(scores, 1).softmax(-1)
        if not self.listed:
            return found
        return [{"boxes": box, "scores": score} for box, score in zip(*found, strict=True)]


IMAGES = torch.rand(2, 3, 16, 16)


def content(graph: Graph) -> dict[str, list[tuple[str, int, str, list[list[int]]]]]:
    """Return the members of each group, by its name."""
    return {
        group.name: [(member.name, member.dim, member.role, member.index.tolist()) for member in group.members]
        for group in graph.groups
    }


@pytest.mark.parametrize(
    "detector",
    [partial(Detector, 3), partial(Detector, 1, True), partial(Detector, 5, activation=nn.ReLU6)],
    ids=["many layers", "a dict for each sample", "an activation that saturates"],
)
def test_a_detector_is_traced_by_its_forward_pass_alone(
    detector: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = detector().eval()
    expected = tracing._depending(model, IMAGES, None)

    def slow(*args: object) -> None:
        raise AssertionError("torch-pruning takes minutes where many outputs are joined")

    monkeypatch.setattr(tracing, "_depending", slow)
    found = tracing.trace(model, IMAGES)
    assert content(found) == content(expected)
    assert found.left_out.keys() == expected.left_out.keys()
    prune(model, 0.5, granularity=Channel(coupled=True), example_inputs=IMAGES)
    small = shrink(model, IMAGES)
    assert small.stem[0].out_channels == 4


class Splitting(nn.Module):
    """Halves the channels of each map and joins three of them, as YOLO does; with five heads."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(3 if i == 0 else 12, 8, 1) for i in range(5))
        self.halves = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(5))
        self.heads = nn.ModuleList(nn.Conv2d(12, 4, 1) for _ in range(5))

    def forward(self, images: Tensor) -> Tensor:
        features, found = images, []
        for convolution, half, head in zip(self.convolutions, self.halves, self.heads, strict=True):
            one, other = convolution(features).chunk(2, 1)
            features = torch.cat([one, other, half(other)], 1)
            found.append(head(features).flatten(2))
        return torch.cat(found, 2)


@pytest.mark.parametrize("build", [Splitting, lambda: Detector(2)], ids=["channels that are split", "few outputs"])
def test_other_convolutional_nets_are_traced_by_torch_pruning(
    build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = build().eval(), []
    expected = tracing._depending(model, IMAGES, None)
    monkeypatch.setattr(tracing, "_depending", lambda *args: asked.append(args) or expected)
    assert tracing.trace(model, IMAGES) is expected
    assert len(asked) == 1


def test_a_model_without_a_known_multiplication_has_no_groups() -> None:
    assert tracing.trace(nn.GRU(4, 4), torch.rand(1, 2, 4)).groups == ()


class Partial(nn.Module):
    """Adds each map to the first channels of the next, which is wider, as ReXNet does."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        widths = range(3, 4 + depth)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairwise(widths))
        self.heads = nn.ModuleList(nn.Linear(widths[-1], 2) for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        for convolution in self.convolutions:
            wide = convolution(images)
            images = torch.cat([wide[:, : images.shape[1]] + images, wide[:, images.shape[1] :]], 1)
        return sum(head(images.mean((2, 3))) for head in self.heads)


class Separable(nn.Module):
    """A depthwise convolution, a flattened map and a layer that two others add to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8 * 64, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        return self.head((features + self.pointwise(self.depthwise(features).relu())).flatten(1))


@pytest.mark.parametrize(
    "build",
    [Splitting, Detector, Separable, lambda: Partial(2)],
    ids=["channels that are split", "many outputs", "separable", "partial sums"],
)
def test_one_walk_couples_what_torch_pruning_couples(build: Callable[[], nn.Module]) -> None:
    model = build().eval()
    graph = torch_pruning.DependencyGraph().build_dependency(model, IMAGES)
    groups = graph.get_all_groups(root_module_types=ROOTS)
    expected = [[(item.dep.target.module, item.idxs, item.root_idxs) for item in group] for group in groups]
    found = [[(module, *channels) for module, _, *channels in items] for items in coupled(model, IMAGES, ROOTS)]

    def of_layers(items: list[tuple[object, list[int], list[int]]]) -> list[tuple[str, list[tuple[int, int]]]]:
        names = {module: name for name, module in model.named_modules()}
        return sorted((names[module], sorted(zip(*idx, strict=True))) for module, *idx in items if module in names)

    assert [of_layers(items) for items in found] == [of_layers(items) for items in expected]
    assert max(len(of_layers(items)) for items in found) > 3


def test_the_walk_goes_over_each_channel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, mapped = Counter(), dependencies._mapped

    def counted(channels: list[Any], edge: object) -> list[Any]:
        counts.update((id(edge), channel) for channel in channels)
        return mapped(channels, edge)

    monkeypatch.setattr(dependencies, "_mapped", counted)
    first = coupled(Partial(6).eval().requires_grad_(), IMAGES, (nn.Conv2d,))[0]
    assert len(first) > 6
    assert set(counts.values()) == {1}


class Rolling(nn.Module):
    """Calls a layer twice and adds its outputs in another order, which Torch-Pruning places outside of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        other = self.twice(inputs + 1)
        return self.head(self.twice(inputs) + torch.cat([other[:, 4:], other[:, :4]], 1))


def test_a_walk_that_leaves_a_layer_ends() -> None:
    graph = tracing._depending(Rolling(), torch.rand(2, 4), None)
    assert graph.groups == ()
    assert set(graph.left_out) == {"twice.weight", "head.weight"}
