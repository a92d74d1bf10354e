"""Metrics: sparsity, mask overlap and cost of a masked model, for any LightningModule that logs with torchmetrics.

Pass ``compute_groups=False`` to a ``MetricCollection`` of these: by default it merges metrics with equal states after
the first update, such as the sparsities of two dense parts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat
from typing_extensions import override

from lightning_prune.models import summary as report
from lightning_prune.models.flops import dense_flops, sparse_flops
from lightning_prune.models.forward import example_of
from lightning_prune.models.parameters import named_parameters
from lightning_prune.tensors.distributed import counts_here, is_sharded, local, over_ranks
from lightning_prune.validation.arguments import patterns
from lightning_prune.validation.instances import by_name, flag, instance


class _Ratio(Metric):
    """The abstract base of fractions that are counted layer by layer; a subclass calls ``count``."""

    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    counts: list[Tensor]

    def __init__(
        self, targets: Sequence[str] = (), ignore: Sequence[str] = (), layers: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.targets = patterns("targets", targets)
        self.ignore = patterns("ignore", ignore)
        self.layers = flag("layers", layers)
        self.names: list[str] = []
        # a list, since the number of layers is not known yet; every rank adds the counts of the full parameters,
        # so that the fraction is the same with and without a reduction
        self.add_state("counts", default=[], dist_reduce_fx="cat")

    def count(self, counts: Mapping[str, tuple[int, int]]) -> None:
        """Add the parts and totals of one update, by name."""
        self.names = list(counts)
        self.counts.append(torch.tensor(list(counts.values()), dtype=torch.int64, device=self.device))

    @override
    def compute(self) -> Tensor | dict[str, Tensor]:
        parts, totals = dim_zero_cat(self.counts).view(-1, len(self.names), 2).sum(0).unbind(1)
        total = _fraction(parts.sum(), totals.sum())
        if not self.layers:
            return total
        return {"total": total, **dict(zip(self.names, _fraction(parts, totals), strict=True))}

    @override
    def plot(self, val: Any = None, ax: Any = None) -> Any:
        return self._plot(val, ax)


def _fraction(part: Tensor, total: Tensor) -> Tensor:
    return torch.where(total > 0, part / total, 1.0)


class Sparsity(_Ratio):
    """The fraction of zeros, 0 to 1, among the prunable weights of a model, averaged over updates.

    Args:
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out, in the same form.
        layers: Whether ``compute`` returns a dict with the sparsity of every layer in addition to the "total".
        **kwargs: Arguments of ``torchmetrics.Metric``.

    >>> model = nn.Linear(4, 2)
    >>> _ = nn.init.eye_(model.weight)
    >>> metric = Sparsity()
    >>> metric.update(model)
    >>> metric.compute()
    tensor(0.7500)
    """

    @override
    def update(self, model: nn.Module) -> None:
        """Count the zeros of a model; a collective if parameters are sharded."""
        instance("model", model, nn.Module)
        self.count({row.name: (row.zeros, row.weights) for row in report.rows(model, self.targets, self.ignore)})


class MaskOverlap(_Ratio):
    """How similar successive masks are, 0 to 1: the Jaccard index of the kept weights.

    That is the number of weights that both masks keep over the number that either keeps, summed over updates before the
    division, and 1 before the second update. The last masks survive ``reset``, so that one update an epoch compares
    epochs; they take a byte a weight.

    Args:
        targets: Globs (or "re:" and a regular expression) on parameter names; () is every prunable weight.
        ignore: Names to leave out, in the same form.
        layers: Whether ``compute`` returns a dict with the overlap of every layer in addition to the "total".
        **kwargs: Arguments of ``torchmetrics.Metric``.

    Reference: Paganini and Forde, 2020, "On Iterative Neural Network Pruning, Reinitialization, and the Similarity of
    Masks", arXiv:2001.05050.

    >>> metric = MaskOverlap()
    >>> model = nn.Linear(2, 2)
    >>> for weight in ([[1.0, 2.0], [3.0, 0.0]], [[1.0, 0.0], [3.0, 4.0]]):
    ...     model.weight.data = torch.tensor(weight)
    ...     metric.update(model)
    >>> metric.compute()
    tensor(0.5000)
    """

    def __init__(
        self, targets: Sequence[str] = (), ignore: Sequence[str] = (), layers: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(targets, ignore, layers, **kwargs)
        self._last: dict[str, Tensor] = {}

    @override
    def update(self, model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
        """Compare with the last masks; a collective if parameters are sharded.

        Args:
            model: The masked model.
            masks: Its masks, such as those of a callback; without a mask, the nonzero weights count as kept.
        """
        instance("model", model, nn.Module)
        masks = {} if masks is None else by_name("masks", masks, Tensor)
        found = {target.name: target.parameter for target in report.counted(model, self.targets, self.ignore)}
        kept = {name: masks[name].clone() if name in masks else local(p) != 0 for name, p in found.items()}
        self.count({name: _both_and_either(mask, self._last.get(name), found[name]) for name, mask in kept.items()})
        self._last = kept


def _both_and_either(mask: Tensor, last: Tensor | None, parameter: Tensor) -> tuple[int, int]:
    """Return how many elements both masks keep and how many either keeps; zeros before there is a last mask."""
    if last is None:
        return 0, 0
    last = last.to(mask.device)
    counts = torch.stack([(mask & last).sum(), (mask | last).sum()])
    both, either = (over_ranks(counts * counts_here(parameter)) if is_sharded(parameter) else counts).tolist()
    return both, either


class _Amount(Metric):
    """The abstract base of amounts that every rank computes in full; a subclass calls ``add``."""

    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0

    total: Tensor
    updates: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", default=torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("updates", default=torch.tensor(0), dist_reduce_fx="sum")

    def add(self, amount: float) -> None:
        """Add the amount of one update."""
        self.total += amount
        self.updates += 1

    @override
    def compute(self) -> Tensor:
        return self.total / self.updates

    @override
    def plot(self, val: Any = None, ax: Any = None) -> Any:
        return self._plot(val, ax)


class ActiveParameters(_Amount):
    """The number of nonzero parameters, including biases and norms, averaged over updates.

    Args:
        **kwargs: Arguments of ``torchmetrics.Metric``.

    >>> model = nn.Linear(4, 2, bias=False)
    >>> _ = nn.init.eye_(model.weight)
    >>> int(ActiveParameters()(model))
    2
    """

    @override
    def update(self, model: nn.Module) -> None:
        """Count the parameters of a model; a collective if parameters are sharded."""
        instance("model", model, nn.Module)
        self.add(sum(p.numel() - report.zeros(p) for p in named_parameters(model).values()))


class ActiveFLOPs(_Amount):
    """The FLOPs of a forward pass that skips every product with a zero, averaged over updates.

    These are the dense FLOPs of each layer by torch's ``flop_counter`` (a multiply-add is two), times the density of
    its weight; products of activations count in full. It is what a perfect sparse kernel computes, not a prediction of
    speed. Do not update it inside a ``training_step``, where criteria observe the forward passes.

    Args:
        inputs: An example: a tuple of positional arguments, a dict of keyword arguments, or the only argument; None is
            the ``example_input_array`` of the LightningModule.
        **kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: At an update, if there is no example.

    >>> model = nn.Linear(4, 2)
    >>> _ = nn.init.eye_(model.weight)
    >>> int(ActiveFLOPs(torch.zeros(1, 4))(model))
    4
    """

    def __init__(self, inputs: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.inputs = inputs

    @override
    def update(self, model: nn.Module) -> None:
        """Count the FLOPs of the example; a collective if parameters are sharded."""
        instance("model", model, nn.Module)
        inputs = example_of(model, self.inputs)
        if inputs is None:
            raise ValueError(f"inputs must be given since {type(model).__name__} has no example_input_array, got None")
        dense, parameters = dense_flops(model, inputs), named_parameters(model)
        density = {name: 1 - report.zeros(parameters[name]) / parameters[name].numel() for name in dense if name}
        self.add(sparse_flops(dense, density))
