"""Features: a layer's output is its weight times the windows of its input, for every kind of layer."""

import pytest
import torch
from torch import nn

from lightning_prune.models.layer_inputs import input_of, is_readable, squares, windows

LAYERS = [
    (nn.Linear(5, 3), (4, 5)),
    (nn.Linear(5, 3), (4, 2, 5)),
    (nn.Linear(5, 3), (5,)),
    (nn.Conv1d(4, 6, 3, stride=2, dilation=2), (5, 4, 17)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 3), groups=2), (5, 4, 9, 8)),
    (nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="circular"), (5, 4, 9, 8)),
    (nn.Conv2d(4, 6, (4, 2), padding="same", dilation=(2, 4)), (5, 4, 9, 8)),
    (nn.Conv2d(4, 6, 3, padding="valid", padding_mode="replicate"), (5, 4, 9, 8)),
    (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", groups=4), (4, 9, 8)),
    (nn.Conv3d(2, 3, (2, 1, 3), padding=1), (2, 2, 4, 5, 6)),
]


@pytest.mark.parametrize(("layer", "size"), LAYERS, ids=str)
@torch.no_grad()
def test_an_output_is_the_weight_times_a_window(layer: nn.Module, size: tuple[int, ...]) -> None:
    x = torch.randn(size)
    out = layer(x) - (
        layer.bias if isinstance(layer, nn.Linear) else layer.bias.view(-1, *[1] * (layer.weight.ndim - 2))
    )
    seen = windows(layer, x)
    groups, columns = seen.shape[-layer.weight.ndim], layer.weight[0].numel()
    rows = layer.weight.view(groups, -1, columns)
    found = torch.einsum("...gc,grc->...gr", seen.flatten(1 - layer.weight.ndim), rows).flatten(-2)
    expected = out if isinstance(layer, nn.Linear) else out.view(-1, *out.shape[1 - layer.weight.ndim :]).movedim(1, -1)
    torch.testing.assert_close(found.reshape(-1), expected.reshape(-1), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_read_is_told_apart() -> None:
    readable = [nn.Linear(2, 2), nn.Conv3d(1, 1, 1), nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2)]
    assert all(map(is_readable, readable))
    others = [nn.ConvTranspose2d(1, 1, 1), nn.GRU(2, 2), nn.Bilinear(2, 2, 2), nn.Embedding(2, 2), nn.PReLU()]
    assert not any(map(is_readable, others))


def test_an_input_is_read_at_full_width() -> None:
    assert input_of((torch.ones(2, dtype=torch.bfloat16),), "weight").dtype == torch.float32
    assert input_of((torch.ones(2, dtype=torch.float64),), "weight").dtype == torch.float64
    with pytest.raises(ValueError, match=r"layer of 'fc\.weight' must be called with a tensor .* got keywords only"):
        input_of((), "fc.weight")
    with pytest.raises(ValueError, match="got list"):
        input_of(([torch.ones(2)],), "fc.weight")


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("batch", [(), (1,), (3,)], ids=str)
def test_squares_of_a_convolution_are_those_of_every_window(mode: str, batch: tuple[int, ...]) -> None:
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode=mode)
    image = torch.randn(*batch, 4, 7, 7)
    total, count = squares(layer, (image,), layer.weight, "weight")
    seen = windows(layer, image.double()).flatten(0, 2)  # samples and positions
    assert count.unique().tolist() == [len(seen)]
    torch.testing.assert_close(total, seen.square().sum(0), rtol=1e-6, atol=0)
