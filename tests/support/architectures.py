"""Small networks of every common make, written as their users write them, each with an example input."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from models import Attention
from torch import Tensor, nn
from torch.nn.functional import gelu, max_pool2d, relu, relu6


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Basic(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.one, self.two = conv(inputs, outputs, 3, stride), conv(outputs, outputs)
        self.past = nn.Identity() if inputs == outputs and stride == 1 else conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.two(relu(self.one(x))) + self.past(x))


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = outputs // 2
        self.one, self.two, self.three = conv(inputs, inner, 1), conv(inner, inner, 3, stride), conv(inner, outputs, 1)
        self.past = nn.Identity() if inputs == outputs and stride == 1 else conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.three(relu(self.two(relu(self.one(x))))) + self.past(x))


class ResNet(nn.Module):
    def __init__(self, block: type[nn.Module] = Basic) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.blocks = nn.Sequential(block(8, 8, 1), block(8, 12, 2), block(12, 12, 1))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.blocks(relu(self.stem(x)))).flatten(1))


class Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = 2 * inputs
        self.widen, self.depthwise = conv(inputs, inner, 1), conv(inner, inner, 3, stride, groups=inner)
        self.narrow = conv(inner, outputs, 1)
        self.adds = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        out = self.narrow(relu6(self.depthwise(relu6(self.widen(x)))))
        return x + out if self.adds else out


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8, 3, 2)
        self.blocks = nn.Sequential(Inverted(8, 8, 1), Inverted(8, 12, 2), Inverted(12, 12, 1))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(relu6(self.stem(x))).mean((2, 3)))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(4))
        self.layers = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.fc = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = torch.cat([x, layer(relu(norm(x)))], 1)
        return self.fc(relu(self.norms[-1](x)).mean((2, 3)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = conv(3, 6), conv(6, 8), conv(8, 12)
        self.rise2, self.up2 = nn.ConvTranspose2d(12, 8, 2, 2), conv(16, 8)
        self.rise1, self.up1 = nn.ConvTranspose2d(8, 6, 2, 2), conv(12, 6)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = relu(self.down1(x))
        two = relu(self.down2(max_pool2d(one, 2)))
        x = relu(self.middle(max_pool2d(two, 2)))
        x = relu(self.up2(torch.cat([self.rise2(x), two], 1)))
        return self.out(relu(self.up1(torch.cat([self.rise1(x), one], 1))))


class VGG(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(8 * 4, 10), nn.Sigmoid(), nn.Linear(10, 5)),
        )


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.a, self.b = conv(6, 4, 1), nn.Sequential(conv(6, 4, 1), nn.ReLU(), conv(4, 6, 3))
        self.c = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(6, 4, 1))
        self.mix, self.fc = conv(14, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.stem(x))
        x = torch.cat([self.a(x), self.b(x), self.c(x)], 1)
        return self.fc(relu(self.mix(relu(x))).mean((2, 3)))


class CausalAttention(nn.Module):
    """Causal self-attention with one linear layer for queries, keys and values together."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n_head, self.size = heads, width // heads
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (part.view(batch, length, -1, self.size).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        scores = (q @ k.transpose(-2, -1)) / self.size**0.5
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
        return self.o(mixed.transpose(1, 2).reshape(batch, length, -1))


class Layer(nn.Module):
    def __init__(self, attention: type[nn.Module], width: int) -> None:
        super().__init__()
        self.attention, self.norm1, self.norm2 = attention(width, 4), nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 5, width))
        self.layers = nn.Sequential(Layer(Attention, width), Layer(Attention, width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.layers(x))[:, 0])


class GPT(nn.Module):
    def __init__(self, width: int = 16, words: int = 20) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(8, width)
        self.layers = nn.Sequential(Layer(CausalAttention, width), Layer(CausalAttention, width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.layers(x)))


class LSTM(nn.Module):
    """A recurrent network between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.lstm = nn.Linear(4, 6), nn.LSTM(6, 8, num_layers=2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(relu(self.inner(x)))[0][:, -1])


class Conv1d(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv1d(2, 8, 5, 2), nn.BatchNorm1d(8), nn.GELU(), nn.Conv1d(8, 8, 3, groups=8), nn.PReLU(8)),
            *(nn.Conv1d(8, 12, 3, groups=2), nn.ELU(), nn.Conv1d(12, 6, 1)),
            *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 5)),
        )


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8)


@dataclass(frozen=True)
class Case:
    """A network, its example input, and the weights whose channels cannot go."""

    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    stays: tuple[str, ...] = ("fc.weight",)


STREAM = [f"layers.{i}.{name}.weight" for i in range(2) for name in ("attention.o", "down")]
CASES = {
    "resnet_basic": Case(ResNet, images),
    "resnet_bottleneck": Case(lambda: ResNet(Bottleneck), images),
    "mobilenet": Case(MobileNet, images),
    "densenet": Case(DenseNet, images),
    "unet": Case(UNet, images, ("out.weight",)),
    "vgg": Case(VGG, images, ("9.weight",)),
    "inception": Case(Inception, images),
    "vit": Case(ViT, images, ("head.weight", "patches.weight", *STREAM)),
    "gpt": Case(GPT, lambda: torch.randint(20, (2, 8)), ("words.weight", "places.weight", *STREAM)),
    "lstm": Case(LSTM, lambda: torch.randn(2, 6, 4), ("head.2.weight",)),
    "conv1d": Case(Conv1d, lambda: torch.randn(2, 2, 32), ("10.weight",)),
}


def build(case: Case, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """Return the network with weights and statistics of no special value, and its input; no dropout, in train mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, inputs = case.model(), case.inputs()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return model, inputs
