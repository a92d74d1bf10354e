"""Sizes of a model: parameters, FLOPs, blocks and the channels of every layer, to tell what a cut has taken out."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_prune.models.copying import hookless_copy
from lightning_prune.models.flops import dense_flops
from lightning_prune.models.forward import Inputs, fitting
from lightning_prune.models.orientation import is_transposed
from lightning_prune.models.parameters import named_parameters, plain_name
from lightning_prune.models.summary import shortened, table

_LINES = 19  # of layers


@dataclass(frozen=True)
class Size:
    """The size of a model.

    Args:
        parameters: The number of its parameters.
        flops: Those of a forward pass; None if they could not be counted.
        channels: The number of output channels of every layer.
        blocks: The number of children of every ``ModuleList`` and ``Sequential``.
    """

    parameters: int
    flops: int | None
    channels: Mapping[str, int]
    blocks: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs) -> "Size":
        """Return the size of a model, whose FLOPs are those of a forward pass of these inputs; it is left as it is."""
        parameters = sum(parameter.numel() for parameter in named_parameters(model).values())
        try:
            copy = hookless_copy(model)
            flops = sum(dense_flops(copy, fitting(inputs, copy)).values())
        except Exception:  # of any type, from any layer: a model that is being cut must not be lost for its FLOPs
            return cls(parameters, None, channels(model), blocks(model))
        return cls(parameters, flops, channels(model), blocks(model))

    def then(self, later: "Size") -> str:
        """Return what has become of it, as text.

        >>> before, after = Size(100, 2000, {"conv1": 16, "conv2": 32}), Size(60, 1000, {"conv1": 16, "conv2": 15})
        >>> print(before.then(after))
        parameters 100 -> 60 (-40.0%), FLOPs 2,000 -> 1,000 (-50.0%), channels:
          conv2  32 -> 15
        """
        parts = [f"parameters {_change(self.parameters, later.parameters)}"]
        if self.flops and later.flops is not None:
            parts.append(f"FLOPs {_change(self.flops, later.flops)}")
        fewer = changed_channels(self.blocks, later.blocks)
        parts += [f"blocks of {name or 'the model'} {before} -> {after}" for name, (before, after) in fewer.items()]
        # the layers of blocks are called by other numbers where some are taken out
        same = {
            n: c for n, c in self.channels.items() if not any(n.startswith(f"{block}.") or not block for block in fewer)
        }
        changed = changed_channels(same, later.channels)
        if not changed:
            return ", ".join(parts) + ("" if fewer else "; no layer has fewer channels")
        cells = [(f"  {name}", f"{before:,} -> {after:,}") for name, (before, after) in changed.items()]
        return "\n".join([f"{', '.join(parts)}, channels:", *map(str.rstrip, shortened(table(cells), _LINES))])


def channels(model: nn.Module) -> dict[str, int]:
    """Return the number of output channels of every layer with a weight; of an embedding, the length of a vector.

    >>> channels(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 3)))
    {'0': 8, '2': 4}
    """
    found = {}
    for prefix, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None and "weight" in own and not is_lazy(parameter) and parameter.ndim >= 2:
                name = plain_name(f"{prefix}.{own}" if prefix else own)
                found[name.removesuffix(".weight")] = parameter.shape[int(outputs_second(module))]
    return found


def blocks(model: nn.Module) -> dict[str, int]:
    """Return the number of children of every container of blocks.

    >>> blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    {'': 2}
    """
    containers = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential))
    return {plain_name(name): len(module) for name, module in containers}


def outputs_second(module: nn.Module) -> bool:
    """Return whether the second dimension of a layer's weight, and not the first, is that of its output channels.

    >>> outputs_second(nn.Linear(2, 3)), outputs_second(nn.Embedding(10, 3))
    (False, True)
    """
    convolution = isinstance(module, nn.modules.conv._ConvNd) and module.transposed
    return convolution or is_transposed(module) or isinstance(module, nn.Embedding)


def changed_channels(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Return the numbers of channels, before and after, of the layers in which they differ.

    >>> changed_channels({"a": 4, "b": 8}, {"a": 4, "b": 3})
    {'b': (8, 3)}
    """
    return {name: (count, after[name]) for name, count in before.items() if after.get(name, count) != count}


def _change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} ({after / max(1, before) - 1:+.1%})"
