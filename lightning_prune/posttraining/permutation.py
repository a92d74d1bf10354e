"""Permutation: brings the rows of layers that have most inputs in common into one group, at no cost at run time."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_prune.criteria import Criterion, Loss, Magnitude
from lightning_prune.granularities import Weight
from lightning_prune.models.copying import copied
from lightning_prune.models.forward import Inputs, needed_example_of
from lightning_prune.models.parameters import find
from lightning_prune.posttraining.observing import check_data, observed_units
from lightning_prune.posttraining.row_order import best_order, kept_by_groups
from lightning_prune.structure.equivalence import equivalent_orders
from lightning_prune.structure.groups import Group
from lightning_prune.structure.surgery import reorder
from lightning_prune.structure.tracing import trace
from lightning_prune.validation.arguments import integer, number
from lightning_prune.validation.instances import flag, instance
from lightning_prune.validation.warning import warn

Model = TypeVar("Model", bound=nn.Module)

_log = logging.getLogger("lightning_prune")


def permute_rows(
    model: Model,
    example_inputs: Inputs = None,
    *,
    sparsity: float,
    rows: int = 16,
    criterion: Criterion = Magnitude(),
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    inplace: bool = False,
) -> Model:
    """Return the model with its channels in an order in which ``SharedFanIn(rows)`` keeps more of the weights.

    Rows that need the same inputs come into one group. The order of the channels of a hidden layer is free: the norms
    and the columns of the next layers follow, so that the outputs stay the same, the model stays of its class, and
    nothing is permuted at run time. That is compared in double precision and eval mode; channels whose order has an
    effect stay as they are, with a warning if all do. Permute before training or pruning: optimizers, masks and
    averages do not follow.

    Args:
        model: Any module.
        example_inputs: A tensor, a tuple of arguments or a dict of keyword arguments; None takes the
            ``example_input_array`` of a ``LightningModule``.
        sparsity: The sparsity that the layers are to have.
        rows: Output channels in a group.
        criterion: Scores the weights; that of the pruning to come.
        data: Batches for a criterion that needs forward passes or gradients.
        loss: A function of the model and a batch, for a criterion that needs gradients, as in ``prune``.
        inplace: Whether to permute the model itself rather than a copy. Parameters stay the same objects.

    Raises:
        ValueError: If an argument is out of range, the criterion needs data that are not given, or the model cannot be
            run or traced.
        ImportError: If torch-pruning is not installed.

    Reference: Tan et al., 2022, "Accelerating Sparse Convolution with Column Vector-Wise Sparsity", NeurIPS; Pool and
    Yu, 2021, "Channel Permutations for N:M Sparsity", NeurIPS.

    >>> import torch
    >>> from lightning_prune import SharedFanIn, prune
    >>> model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 1))
    >>> model[0].weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    >>> better = permute_rows(model, torch.randn(3, 2), sparsity=0.5, rows=2)
    >>> masks = prune(better, 0.5, granularity=SharedFanIn(rows=2), ignore=["2.*"])
    >>> bool((better[0].weight[masks["0.weight"]] == 1).all())
    True
    """
    instance("model", model, nn.Module)
    sparsity = number("sparsity", sparsity, "[0, 1)")
    rows, inplace = integer("rows", rows, 1), flag("inplace", inplace)
    instance("criterion", criterion, Criterion)
    check_data(criterion, data, loss)
    inputs = needed_example_of(model, example_inputs)
    units = observed_units(model, find(model, frozen=True), criterion, Weight(), data, loss)
    with torch.no_grad():
        scores = {unit.name: criterion.scores(unit).view(unit.parameter.shape).float().abs().cpu() for unit in units}
    groups = trace(model, inputs).groups
    parts = {group.name: (found, _kept(found, sparsity)) for group in groups if (found := _layers(group, scores))}
    made = [group for group in groups if group.name in parts]
    done = equivalent_orders(model, [(group, best_order(*parts[group.name], rows)) for group in made], inputs)
    if not done:
        warn(
            "permute_rows leaves the model as it is: it has no linear layer or convolution whose rows can be in "
            "another order, as those of the last layer, of recurrent layers and of fused experts cannot"
        )
    permuted = model if inplace else copied(model)
    reorder(permuted, done)
    for group, order in done if _log.isEnabledFor(logging.INFO) else ():
        layers, keep = parts[group.name]
        total = max(1e-30, sum(float(layer.sum()) for layer in layers))
        now, before = (kept_by_groups(layers, keep, way, rows) / total for way in (order, torch.arange(group.size)))
        _log.info("permute_rows: %s keeps %.1f%% of its scores instead of %.1f%%", group.name, 100 * now, 100 * before)
    return permuted


def _kept(layers: Sequence[Tensor], sparsity: float) -> list[int]:
    """Return how many inputs a group of rows keeps, for each layer."""
    return [max(1, round((1 - sparsity) * layer.shape[1])) for layer in layers]


def _layers(group: Group, scores: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the scores of the layers that produce a group, a row a unit; none if its units are not their rows."""
    made = [member for member in group.role("producer") if member.name in scores]
    layers = [scores[member.name].movedim(member.dim, 0).flatten(1) for member in made]
    rows = torch.arange(group.size)[:, None]
    in_rows = all(member.index.equal(rows) for member in made) and {len(layer) for layer in layers} == {group.size}
    return layers if in_rows and not group.owners else []
