"""Single weights as units, on their own or in groups that are compared among themselves (N:M)."""

import copy
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, TypeVar, final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import Self, override

from lightning_prune.models.layer_kinds import holds_experts
from lightning_prune.models.norms import no_norms
from lightning_prune.models.orientation import experts_are_transposed
from lightning_prune.models.parameters import Target, channel_dim
from lightning_prune.tensors.distributed import counts_here, flat_index, full_tensor, is_split, local, local_shard
from lightning_prune.tensors.ranking import Part, part_within, rank_within
from lightning_prune.tensors.sources import Placement, opened
from lightning_prune.units.gates import weight_times_gradient
from lightning_prune.units.scored import Norms, Values
from lightning_prune.units.units import Units

if TYPE_CHECKING:
    from lightning_prune.criteria.criterion import Criterion

Some = TypeVar("Some", bound=Units)

PART = 1 << 18  # elements: what is made of so many stays in the cache, and is worth the calls


def weight_of(parameter: nn.Parameter, grad_scale: float = 1.0) -> Tensor:
    """Return the local shard of a parameter, detached, at least float32, with its gradient divided by a scale."""
    weight = local(parameter) if isinstance(parameter, DTensor) else parameter.detach()
    weight = weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
    if parameter.grad is not None:
        grad = local(parameter.grad)
        grad = grad if grad.dtype in (torch.float32, torch.float64) else grad.float()
        weight.grad = grad if grad_scale == 1.0 else grad / grad_scale
    return weight


def by_rows(units: Some) -> Iterator[Some]:
    """Yield units a few rows of their weight at a time, which stay in the cache; whole on a GPU or of a shard."""
    weight = units.parameter
    if isinstance(weight, DTensor) or weight.device.type != "cpu" or weight.numel() <= PART:
        yield units
        return
    rows = max(1, PART * len(weight) // weight.numel())
    for begin in range(0, len(weight), rows):
        yield units.rows(slice(begin, begin + rows))


@final
class WeightUnits(Units):
    """Units of one weight each.

    Args:
        target: The parameter to prune.
        group: How many weights, that follow each other along the inputs, are compared with one another only.
        norms: Finds the norm behind every layer of the model that has one.
    """

    single: ClassVar[bool] = True

    def __init__(self, target: Target, group: int | None = None, norms: Norms = no_norms) -> None:
        parameter = target.parameter
        sharded = isinstance(parameter, DTensor)
        super().__init__(target.name, parameter, target.modules, channel_dim(target), parameter.numel(), sharded, norms)
        self.weights = {target.name: parameter}
        self.group = group
        self.stacked = parameter.ndim > 2 and holds_experts(parameter, target.modules)
        self.inputs = int(self.dim == 0)  # the first dimension beside the channels
        if self.stacked:
            self.inputs = 1 if experts_are_transposed(target.modules[0]) else 2

    @override
    def weight(self) -> Tensor:
        return weight_of(self.parameter, self.grad_scale)

    @override
    def sum(self, values: Values) -> Tensor:
        return values(self.weight())

    @override
    def mean(self, values: Values) -> Tensor:
        return values(self.weight())

    @override
    def per_weight(self, total: Tensor) -> Tensor:
        return total

    @override
    def maximum(self, values: Values) -> Tensor:
        return values(self.weight())

    @override
    def contribution(self) -> Tensor:
        return weight_times_gradient(self.weight())

    @override
    def index(self) -> Tensor:
        return flat_index(self.parameter)

    @override
    def parts(self) -> Iterator[Self]:
        return by_rows(self)

    def _elements(self, at: slice | Tensor) -> "WeightUnits":
        """Return single weights of the local shard, by flat position, as units of their own."""
        some = copy.copy(self)
        some.parameter = nn.Parameter(local(self.parameter).view(-1)[at], requires_grad=False)
        some.statistic = None if self.statistic is None else self.statistic.view(-1)[at]
        some.size, some.sharded = some.parameter.numel(), False
        return some

    @property
    @override
    def shares(self) -> dict[tuple[str, int], float]:
        return {(self.name, self.dim): 1.0 / self.size}

    @property
    @override
    def placement(self) -> Placement:
        counts = counts_here(self.parameter)
        return Placement(counts, self.index, self.full, self.local) if self.sharded else Placement(counts)

    @override
    def full(self, values: Tensor) -> Tensor:
        return full_tensor(values, self.parameter)

    @override
    def local(self, values: Tensor) -> Tensor:
        return local_shard(values, self.parameter).contiguous() if self.sharded else values

    @override
    def ranks(self, by_row: bool) -> bool:
        return by_row or self.group is not None

    @override
    def compared(self, scores: Tensor, kept: Tensor | None, by_row: bool) -> Tensor:
        if not (by_row or self.group):
            return scores
        found = scores.view(self.parameter.shape if not self.sharded else local(self.parameter).shape)
        found = found if kept is None else found.masked_fill(~kept, -torch.inf)
        return _rank(self, found)

    @override
    def stream(self, criterion: "Criterion") -> tuple[Tensor, Part]:
        weight = local(self.parameter)
        flat = all(values.is_contiguous() for values in (weight, self.statistic) if values is not None)
        if criterion.elementwise and flat:
            return weight, lambda at: criterion.scores(self._elements(at))
        return super().stream(criterion)

    @override
    def compared_stream(self, criterion: "Criterion", kept: Tensor | None) -> tuple[Tensor, Part]:
        if not self.ranks(criterion.by_row):
            return self.stream(criterion)
        shape, axis = local(self.parameter).shape, self.inputs
        if self.group is None or is_split(self.parameter, [axis]) or shape[axis] % self.group:
            return opened(lambda: self.compared(criterion.scores(self), kept, criterion.by_row))
        like, part = self.stream(criterion)
        stride = max(1, math.prod(shape[axis + 1 :]))
        return like.view(shape), part_within(like, part, self.group, stride, kept)

    @override
    def kept(self, masks: Mapping[str, Tensor]) -> Tensor | None:
        return masks.get(self.name)

    @override
    def masks(self, keep: Tensor) -> dict[str, Tensor]:
        return {self.name: keep.view(self.parameter.shape) if not self.sharded else keep}


def _rank(units: WeightUnits, scores: Tensor) -> Tensor:
    """Rank within groups, or within rows where there are none, along the dimensions beside the channels."""
    axes = [d for d in range(scores.ndim) if d != units.dim]
    if units.stacked or units.group is not None:
        axes = [units.inputs]  # a group lies inside a row, and each expert has rows of its own
    dims = len(axes)
    across = is_split(units.parameter, axes)
    last = list(range(-dims, 0))
    moved = (units.full(scores) if across else scores).movedim(axes, last)
    rows = moved.flatten(-dims)
    ranked = rank_within(rows, units.group or max(1, rows.shape[-1])).view(moved.shape).movedim(last, axes)
    return (local_shard(ranked, units.parameter) if across else ranked).contiguous()
