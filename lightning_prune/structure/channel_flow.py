"""Channel flow: groups of channels and heads from one forward pass, whatever operations lie between the weights."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_prune.models.forward import Inputs, call, tensors
from lightning_prune.models.kept_norms import takes_statistics
from lightning_prune.models.parameters import plain_name
from lightning_prune.models.preserving import cacheless, eager, evaluating
from lightning_prune.structure.following import Following, Place, Step
from lightning_prune.structure.groups import OUTPUTS, Graph, Role
from lightning_prune.structure.links import Key, Link, Mixed, linked
from lightning_prune.structure.probing import any_along, reach, touched

FEW = 4  # layers whose outputs are those of a model


class ChannelFlow:
    """Finds what the activations that each weight reads depend on.

    Args:
        model: A copy of the model without hooks, which is given random numbers.
        inputs: Its example inputs.
        heads: The number of heads of every attention; None to find it.
        through_norms: Whether channels are followed through norms that take statistics over them.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, heads: int | None = None, through_norms: bool = False) -> None:
        self.heads = heads
        self.links: list[Link] = []
        self.mixed: dict[Key, list[Mixed]] = {}
        self.attentions: dict[str, str] = {}
        _prepare(model)
        self.parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
        self.names = list(self.parameters)
        self.buffers = _statistics(model)
        self.kernels = {
            f"{plain_name(name)}.weight" for name, module in model.named_modules() if isinstance(module, _ConvNd)
        }
        if through_norms:
            _scale_alone(model)
        following = Following(model)
        undisturbed = torch.random.fork_rng(devices=[])
        with torch.enable_grad(), undisturbed, eager(), cacheless(model), evaluating(model), following:
            output = call(model, inputs)
        self.steps, self.attends = following.steps, following.attends
        self.outputs = [tensor for tensor in tensors(output) if tensor.requires_grad]
        self._listed = isinstance(output, list) and any(isinstance(one, Mapping) for one in output)

    @property
    def detects(self) -> bool:
        """Whether the outputs look like those of a detector: of many layers, or a dict for each sample."""
        leaves = [step.leaf for step in self.steps]
        hits = touched(self.outputs, leaves) if self.outputs and leaves else []
        return self._listed or sum(hit is not None for hit in hits) > FEW

    def graph(self, order: Mapping[str, int]) -> Graph:
        """Return the groups of channels and heads: every activation that a weight reads is followed back.

        Args:
            order: The position of every parameter and buffer in the model.
        """
        sources = [step.leaf for step in self.steps] + list(self.parameters.values())
        if self.outputs:
            self._mix(touched(self.outputs, sources), OUTPUTS)
        before: Step | None = None
        link: Link | None = None
        for step in (step for step in self.steps if step.values is not None):
            alike = before is not None and step.values is before.values and step.read == before.read
            if not alike or step.attention is not None:
                link = self._link(step, sources)
            if link is not None:  # several weights may read the same, such as queries, keys and values
                self._consume(link, step)
            before = step
        graph = linked(self.links, self.mixed, order, dict.fromkeys(step.produced.name for step in self.steps))
        return replace(graph, attentions=self.attentions)

    def _link(self, step: Step, sources: Sequence[Tensor]) -> Link | None:
        """Return, and note, the units of what a weight reads; None if there are none."""
        assert step.values is not None
        assert step.consumed is not None
        hits = touched([step.values], sources)
        live = [number for number, hit in enumerate(hits) if hit is not None]
        made = sum(number < len(self.steps) for number in live)
        if not made:
            return None
        dims = [self._dims(number) for number in live]
        count = step.values.shape[step.read]
        heads = self.heads if self.heads is not None and step.attention is not None else count
        if count % heads:
            self.attentions[step.attention or "the model"] = (
                f"the {count} channels that {step.consumed.name} reads cannot be divided evenly among {heads} heads"
            )
            self._mix(hits, f"the channels that {step.consumed.name} reads are those of heads")
            return None
        found = reach(step.values, step.read, [sources[n] for n in live], dims, made, count // heads)
        if found is None:
            self._mix(hits, f"{step.consumed.name} reads a mixture of its channels, as behind a norm over all of them")
            return None
        link = Link(count // found.size, found.size, step.attention)
        for (place, dim), unit in found.units.items():
            self._add(link, live[place], dim, unit)
            self._mix_index(live[place], dim, unit == -2, f"all units that {step.consumed.name} reads depend on it")
        self.links.append(link)
        return link

    def _consume(self, link: Link, step: Step) -> None:
        """Add to the units the columns of a weight that reads them."""
        assert step.consumed is not None
        units = torch.arange(link.count * link.size) // link.size
        link.add(step.consumed, units, self.parameters[step.consumed.name].shape[step.consumed.dim], "consumer")

    def _dims(self, number: int) -> list[int]:
        """Return the dimensions in which a source may hold channels."""
        if number < len(self.steps):
            step = self.steps[number]
            return [step.made % step.leaf.ndim]
        shape = self.parameters[self.names[number - len(self.steps)]].shape
        return [d for d, length in enumerate(shape) if length > 1]

    def _places(self, number: int, dim: int, attending: bool = False) -> Iterable[tuple[Place, Role]]:
        """Yield where the channels of a source lie."""
        if number >= len(self.steps):
            name = self.names[number - len(self.steps)]
            index = torch.arange(self.parameters[name].shape[dim])
            yield Place(name, dim, index), "producer" if dim == 0 and name in self.kernels else "dependent"
            yield from ((Place(buffer, 0, index), "dependent") for buffer in self.buffers.get(name, ()))
            return
        step = self.steps[number]
        yield step.produced, "dependent" if step.looks_up and attending else "producer"  # position biases
        if step.bias is not None:
            yield step.bias, "dependent"

    def _add(self, link: Link, number: int, dim: int, unit: Tensor) -> None:
        if not (unit >= 0).any():
            return
        for place, role in self._places(number, dim, link.attention is not None):
            parameter = self.parameters.get(place.name)
            length = len(unit) if parameter is None else parameter.shape[place.dim]
            link.add(place, unit, length, role)

    def _mix(self, hits: Sequence[Tensor | None], reason: str) -> None:
        """Note that channels cannot be told apart any more."""
        for number, hit in enumerate(hits):
            if hit is not None:
                for dim in self._dims(number):
                    self._mix_index(number, dim, any_along(hit, dim), reason)

    def _mix_index(self, number: int, dim: int, hit: Tensor, reason: str) -> None:
        for place, _ in self._places(number, dim):
            if hit.any():
                self.mixed.setdefault((place.name, place.dim), []).append((place.index.cpu()[hit.cpu()], reason))


def _prepare(model: nn.Module) -> None:
    """Give a model small positive numbers: gradients pass everywhere, as no ReLU6 or hard sigmoid saturates."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, _NormBase) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.zero_()
            module.running_var.fill_(1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_()
                if parameter.ndim != 2:  # factors, shifts and depthwise kernels, which may be zeros
                    parameter.copy_(torch.rand(parameter.shape, generator=generator) / 2 + 0.25)
        for module in model.modules():
            if isinstance(module, _ConvNd):  # of a depthwise one, the mean of what it reads
                module.weight.div_(module.weight[0].numel())


def _scale_alone(model: nn.Module) -> None:
    """Let norms pass the gradients of their factors and shifts alone, and not those of their statistics."""
    for module in model.modules():
        if takes_statistics(module):
            module.register_forward_hook(_scaled)


def _scaled(norm: Any, args: tuple[Any, ...], output: Any) -> Any:
    """Return the output of a norm with the gradients of a product."""
    if not args or not isinstance(output, Tensor) or args[0].shape[-1] != len(norm.weight):
        return output
    product = args[0] * norm.weight if getattr(norm, "bias", None) is None else args[0] * norm.weight + norm.bias
    return output.detach() + (product - product.detach())


def _statistics(model: nn.Module) -> Mapping[str, tuple[str, ...]]:
    """Return the buffers with statistics of the channels that a norm scales, by the name of its weight."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and module.running_mean is not None:
            prefix = plain_name(name) + "." if name else ""
            found[f"{prefix}weight"] = (f"{prefix}running_mean", f"{prefix}running_var")
    return found
