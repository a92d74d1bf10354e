"""Units: one target as a criterion sees it, in units of a granularity."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial

import torch
from torch import Tensor, nn

from lightning_prune.granularities import Channel, Granularity, Weight
from lightning_prune.models.norms import following_norms, no_norms
from lightning_prune.models.parameters import Target, channel_dim, named_parameters
from lightning_prune.tensors.distributed import (
    counts_here,
    flat_index,
    full_tensor,
    is_sharded,
    is_split,
    local,
    local_shard,
    over_ranks,
)
from lightning_prune.tensors.ranking import part_within, rank_within
from lightning_prune.tensors.selection import Source
from lightning_prune.units.gates import affine_of, among, weight_of, weight_times_gradient
from lightning_prune.validation.instances import by_name, function, instance

Values = Callable[[Tensor], Tensor]

_PART = 1 << 18  # entries: what is made of so many stays in the cache, and is worth the calls


class Units:
    """The units of one target: what a criterion scores, and what one decision prunes together.

    Args:
        target: The parameter to prune.
        granularity: How its entries form units.
        followers: Parameters with one entry per output channel that die with it (bias, norm), by name.
        norms: Finds the norm behind every layer of the model that has one, by ``following_norms``.

    Attributes:
        name: Qualified name of the parameter.
        statistic: What the criterion has observed so far; None before the first observation.
        steps: Number of optimizer steps (or batches) observed.
        module: The one of its modules whose forward pass is observed at this moment.
        grad_scale: What the gradients are multiplied by at this moment (a gradient scaler's factor).

    >>> from lightning_prune.granularities import Channel
    >>> weight = nn.Parameter(torch.tensor([[1.0, -2.0], [0.0, 5.0]]))
    >>> units = Units(Target("weight", weight, (nn.Linear(2, 2),)), Channel())
    >>> units.mean(torch.abs)
    tensor([1.5000, 2.5000])
    """

    def __init__(
        self,
        target: Target,
        granularity: Granularity,
        followers: Mapping[str, nn.Parameter] | None = None,
        norms: Callable[..., Mapping[nn.Module, nn.Module]] = no_norms,
    ) -> None:
        instance("target", target, Target)
        self.name = target.name
        self.parameter = target.parameter
        self.modules = target.modules
        self.granularity = instance("granularity", granularity, Granularity)
        self.followers = by_name("followers", {} if followers is None else followers, nn.Parameter)
        self._norms = norms
        if norms is not dict:
            function("norms", norms)
        self._rows_here = slice(None)  # which of the channels these are
        self.dim = channel_dim(target)
        self.size = granularity.count(self.parameter.shape, self.dim)
        self.statistic: Tensor | None = None
        self.steps = 0
        self.module: nn.Module | None = None
        self.grad_scale = 1.0

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The weights whose zeros count as sparsity, by name."""
        return {self.name: self.parameter}

    @property
    def shares(self) -> dict[tuple[str, int], float]:
        """The part, 0 to 1, that one unit takes of a dimension of a parameter, by name and dimension."""
        return {(self.name, self.dim): 1.0 / self.size, **{(name, 0): 1.0 / self.size for name in self.followers}}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters whose gradients a criterion may look at."""
        return [self.parameter, *self.followers.values()]

    def bound(self, keep: int) -> int:
        """Return how many units really stay where so many are to be kept."""
        return keep

    @property
    def channels(self) -> int:
        """The number of output channels of the whole weight."""
        return self.parameter.shape[self.dim]

    def norms(self) -> list[nn.Module]:
        """Return the norms over the output channels that follow the weight's layers."""
        found = self._norms()
        return list(dict.fromkeys(found[module] for module in self.modules if module in found))

    def outputs(self) -> list[nn.Module]:
        """Return the modules that put out what goes into the activation after each of the weight's layers.

        That is the norm, where one follows a layer in front of any activation, and the layer itself elsewhere.
        """
        found = self._norms(across=False)
        return [found.get(module, module) for module in self.modules]

    def factors(self) -> Tensor | None:
        """Return the absolute value of the factor that a norm has for each unit; None where no norm has factors."""
        found = [norm.weight for norm in self.norms() if isinstance(norm.weight, nn.Parameter)]
        if not found:
            return None
        factors = full_tensor(local(found[0]), found[0]).abs().to(self.parameter.device)
        return self.mean(lambda weight: self.spread(factors))

    def weight(self) -> Tensor:
        """Return this rank's piece of the weight, detached, at least float32; ``grad`` is its unscaled gradient."""
        return weight_of(self.parameter, self.grad_scale)

    def sum(self, values: Values) -> Tensor:
        """Return the sum over each unit of what ``values`` gives for the weight, entry by entry."""
        return self._pool(values(self.weight()))

    def mean(self, values: Values) -> Tensor:
        """Return the mean over each unit of what ``values`` gives for the weight, entry by entry."""
        return self.per_weight(self.sum(values))

    def per_weight(self, total: Tensor) -> Tensor:
        """Return sums over units as means over their weights."""
        return total if self.size == self.parameter.numel() else total / self._weights_per_unit

    def maximum(self, values: Values) -> Tensor:
        """Return the largest, over each unit, of what ``values`` gives for the weight, at least 0."""
        found = values(self.weight())
        if not self.granularity.spans:
            return found
        most = found.new_zeros(self.size).scatter_reduce_(0, self._numbers().reshape(-1), found.reshape(-1), "amax")
        return over_ranks(most, "max") if is_sharded(self.parameter) else most

    def _numbers(self) -> Tensor:
        """Return for each entry of this rank's piece of the weight which unit it belongs to."""
        number = torch.arange(self.size, device=self.parameter.device)
        return local_shard(self.granularity.expand(number, self.parameter.shape, self.dim), self.parameter)

    def contribution(self) -> Tensor:
        """Return ``sum p * dL/dp`` over the gate of each unit: minus the first-order change of the loss without it.

        The gate of a channel is what scales it last: factor and shift of the norm that follows its layer, or else its
        row of weights and its bias. The rows in front of a batch norm will not do: the loss does not depend on their
        scale, so that their own sum vanishes. Units that are no channels are their own gates.

        Raises:
            ValueError: If a norm that normalises by the batch follows, and has no trainable factors.
        """
        gates, behind = self._gates()
        found = [self._of_gate(gate)[self._rows_here] for gate in gates]
        first = found.pop() if behind else self.sum(weight_times_gradient)
        return sum(found, start=first)

    def _gates(self) -> tuple[list[nn.Parameter], bool]:
        """Return parameters with an entry per channel that belong to its gate, and whether a norm has all of it."""
        if not self.granularity.follows:
            return [], False
        found, followers = self._norms(), list(self.followers.values())
        norms = [found.get(module) for module in self.modules]
        gates = [affine_of(norm, followers, self.name) if norm else [] for norm in norms]
        owned = [own for norm in norms if norm for own in norm.parameters(recurse=False)]
        behind = bool(gates) and all(gates)
        biases = [] if behind else [follower for follower in followers if not among(follower, owned)]
        return [own for affine in gates for own in affine] + biases, behind

    def _of_gate(self, gate: nn.Parameter) -> Tensor:
        """Return ``p * dL/dp`` of a whole parameter, on the device of the weight."""
        return full_tensor(weight_times_gradient(weight_of(gate, self.grad_scale)), gate).to(self.parameter.device)

    def spread(self, channels: Tensor) -> Tensor:
        """Return one number per output channel as a value for every entry of this rank's piece of the weight."""
        shape = [-1 if d == self.dim else 1 for d in range(self.parameter.ndim)]
        return local_shard(channels.view(shape).expand(self.parameter.shape), self.parameter)

    @property
    def held(self) -> int:
        """The number of units that this rank scores."""
        return local(self.parameter).numel() if self.split else self.size

    def index(self) -> Tensor:
        """Return the position (int64), in the whole target, of every unit that this rank scores."""
        if self.granularity.spans:
            return torch.arange(self.size, device=self.parameter.device)
        return flat_index(self.parameter)

    def add(self, values: Tensor) -> Tensor:
        """Add these values to the statistic, in place, and return it."""
        return values.clone() if self.statistic is None else self.statistic.add_(values)

    def parts(self) -> Iterator["Units"]:
        """Yield these units in order, a few rows of the weight at a time, which stay in the cache; else all at once."""
        weight = local(self.parameter)
        apart = not self.granularity.spans or (isinstance(self.granularity, Channel) and self.dim == 0)
        if not apart or is_sharded(self.parameter) or weight.device.type != "cpu" or weight.numel() <= _PART:
            yield self
            return
        rows = max(1, _PART * len(weight) // weight.numel())
        for begin in range(0, len(weight), rows):
            yield self._rows(slice(begin, begin + rows))

    def _rows(self, at: slice) -> "Units":
        """Return the units of some rows of the weight as units of their own, with their gradients."""
        some = copy.copy(self)
        some._rows_here = at
        some.parameter = nn.Parameter(self.parameter.detach()[at], requires_grad=False)
        some.parameter.grad = None if self.parameter.grad is None else self.parameter.grad[at]
        some.statistic = None if self.statistic is None else self.statistic[at]
        some.size = self.granularity.count(some.parameter.shape, self.dim)
        if some.size < some.parameter.numel():
            some._weights_per_unit = self._weights_per_unit[at]
        return some

    @property
    def split(self) -> bool:
        """Whether every rank scores other units: those of its own piece."""
        return is_sharded(self.parameter) and not self.granularity.spans

    def whole(self, values: Tensor) -> Tensor:
        """Return values of this rank's units as values of all units; all ranks must call it."""
        return full_tensor(values, self.parameter) if self.split else values

    def piece(self, values: Tensor) -> Tensor:
        """Return values of all units as values of this rank's units."""
        return local_shard(values, self.parameter).contiguous() if self.split else values

    def source(
        self, scores: Callable[["Units"], Tensor], kept: Tensor | None, several: bool, entrywise: bool = False
    ) -> Source:
        """Return where the scores of these units come from; units that are pruned already come first.

        Args:
            scores: Gives a finite score for each unit that this rank scores.
            kept: Which units are not pruned yet; None means all.
            several: Whether counters are summed over ranks, so that only one rank may count a unit.
            entrywise: Whether ``scores`` may be asked for single weights as if they were all.
        """
        owner = counts_here(self.parameter if self.split else torch.empty(0))
        weight = local(self.parameter)
        flat = all(values.is_contiguous() for values in (weight, self.statistic) if values is not None)
        pieces = entrywise and flat and isinstance(self.granularity, Weight)
        return Source(
            compute=partial(scores, self),
            size=self.size,
            shape=tuple(self.parameter.shape),
            counts=owner or not several,
            index=self.index if self.split else None,
            kept=kept,
            part=(lambda at: scores(self._entries(at))) if pieces else None,
            like=weight if pieces else None,
            whole=self.whole,
            piece=self.piece,
        )

    def _entries(self, at: slice | Tensor) -> "Units":
        """Return single weights of this rank's piece, by flat position, as units of their own."""
        some = copy.copy(self)
        some.parameter = nn.Parameter(local(self.parameter).view(-1)[at], requires_grad=False)
        some.statistic = None if self.statistic is None else self.statistic.view(-1)[at]
        some.size = some.parameter.numel()
        return some

    def ranks(self, by_row: bool) -> bool:
        """Whether units are compared within groups or rows, by float64 scores."""
        return self.granularity.group is not None or (by_row and not self.granularity.spans)

    def compared(self, source: Source, by_row: bool) -> Source:
        """Return scores that compare units with those of their group or row only, if they are to be."""
        if not self.ranks(by_row):
            return source
        shape, group = local(self.parameter).shape, self.granularity.group
        axis = int(self.dim == 0)  # the first beside the channels
        if group is not None and not is_split(self.parameter, [axis]) and shape[axis] % group == 0:
            stride = max(1, math.prod(shape[axis + 1 :]))
            within = partial(part_within, size=group, stride=stride, kept=source.kept)
            return replace(source, compute=lambda: source.compute().view(shape), within=within)
        ranked = partial(self._ranked, source.compute, source.kept)
        return replace(source, compute=ranked, raw=source.compute, part=None, like=None)

    def _ranked(self, scores: Callable[[], Tensor], kept: Tensor | None) -> Tensor:
        """Return scores that compare units with those of their group or row only; pruned ones are the lowest of it."""
        found = scores().view(local(self.parameter).shape)
        found = found if kept is None else found.masked_fill(~kept, -torch.inf)
        group = self.granularity.group  # lies inside a row
        return self._rank(found, self.parameter.ndim - 1 if group is None else 1, group)

    def _rank(self, scores: Tensor, dims: int, size: int | None) -> Tensor:
        """Rank within groups of that size, None for all, along the first dimensions beside the channels."""
        axes = [d for d in range(scores.ndim) if d != self.dim][:dims]
        split = is_split(self.parameter, axes)
        last = list(range(-dims, 0))
        moved = (full_tensor(scores, self.parameter) if split else scores).movedim(axes, last)
        rows = moved.flatten(-dims)
        ranked = rank_within(rows, size or max(1, rows.shape[-1])).view(moved.shape).movedim(last, axes)
        return (local_shard(ranked, self.parameter) if split else ranked).contiguous()

    def kept(self, masks: Mapping[str, Tensor]) -> Tensor | None:
        """Return which units (bool) the masks keep; None where no mask is held yet."""
        mask = masks.get(self.name)
        if mask is None or not self.granularity.spans:
            return mask
        return self._pool(mask.float()) > 0

    def masks(self, keep: Tensor) -> dict[str, Tensor]:
        """Return the masks, of this rank's pieces, that follow from a decision on units (bool, True = kept)."""
        shape = self.parameter.shape if self.granularity.spans else keep.shape
        mask = self.granularity.expand(keep, shape, self.dim)
        masks = {self.name: local_shard(mask, self.parameter).contiguous() if self.granularity.spans else mask}
        for name, follower in self.followers.items():
            masks[name] = local_shard(keep, follower).clone()
        return masks

    @cached_property
    def _weights_per_unit(self) -> Tensor:
        one = torch.ones((), device=self.parameter.device).expand(self.parameter.shape)
        return self.granularity.pool(one, self.dim)

    def _pool(self, values: Tensor) -> Tensor:
        """Pool the values of this rank's piece; units that may lie on several ranks are summed, and whole on each."""
        if not (is_sharded(self.parameter) and self.granularity.spans):
            return self.granularity.pool(values, self.dim)
        total = values.new_zeros(self.size)
        if counts_here(self.parameter):
            total.scatter_add_(0, self._numbers().reshape(-1), values.reshape(-1))
        return over_ranks(total)


def make_units(found: Sequence[Target], model: nn.Module, granularity: Granularity) -> list[Units]:
    """Return the units of every target, with the parameters of the model that follow them."""
    norms = cache(partial(following_norms, model))  # traces the model: only if somebody asks
    if not granularity.follows:
        return [Units(target, granularity, norms=norms) for target in found]
    names = {parameter: name for name, parameter in named_parameters(model).items()}
    return [Units(target, granularity, _followers(target, norms(), names), norms) for target in found]


def _followers(
    target: Target, norms: Mapping[nn.Module, nn.Module], names: Mapping[nn.Parameter, str]
) -> dict[str, nn.Parameter]:
    """Return the trainable parameters with one entry for each output channel: the layer's bias, its norm's affine."""
    attribute = target.name.rpartition(".")[2]
    candidates = []
    for owner in target.modules:
        if "weight" in attribute:
            candidates.append(getattr(owner, attribute.replace("weight", "bias"), None))
        if norm := norms.get(owner):
            candidates += [norm.weight, getattr(norm, "bias", None)]
    length = target.parameter.shape[channel_dim(target)]
    return {
        names[parameter]: parameter
        for parameter in candidates
        if isinstance(parameter, nn.Parameter) and parameter.requires_grad and tuple(parameter.shape) == (length,)
    }
