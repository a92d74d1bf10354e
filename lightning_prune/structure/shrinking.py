"""Shrinking: removes dead channels and heads from a model, once a check shows that its outputs stay the same."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.masks import Masks
from lightning_prune.models.copying import copied, hookless_copy, unwrapped
from lightning_prune.models.forward import Inputs, fitting, needed_example_of
from lightning_prune.models.kept_norms import keep_channels, kept_channels, norms_and_routers
from lightning_prune.models.parameters import named_parameters
from lightning_prune.models.sizes import Size
from lightning_prune.structure.blocks import children_of_containers, find_blocks, is_zero
from lightning_prune.structure.checkpoints import travel_along
from lightning_prune.structure.configs import tell_configs
from lightning_prune.structure.cut_record import CutRecord, record_cut
from lightning_prune.structure.equivalence import equivalent_cuts, equivalent_removals
from lightning_prune.structure.expert_groups import expert_graph
from lightning_prune.structure.groups import Graph, Group
from lightning_prune.structure.hidden_width import stated_width
from lightning_prune.structure.queries import cut_queries
from lightning_prune.structure.streams import find_streams
from lightning_prune.structure.surgery import Decision, cut, dead_units, kept_by
from lightning_prune.structure.tracing import trace
from lightning_prune.structure.unremoved import warn_of_unremoved
from lightning_prune.validation.arguments import integer
from lightning_prune.validation.instances import by_name, flag, instance, sequence_of

Model = TypeVar("Model", bound=nn.Module)

_log = logging.getLogger("lightning_prune")


def shrink(
    model: Model,
    example_inputs: Inputs = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    round_to: int = 1,
    inplace: bool = False,
    optimizers: Sequence[Optimizer] = (),
    averages: Sequence[nn.Module] = (),
) -> Model:
    """Return the model without its dead channels, heads and blocks: smaller and faster, same classes and outputs.

    A channel is dead if everything that produces it is zero (its weights, bias and norm), or every weight that reads
    it; a residual block if all of its weights are zero. Before anything is changed, the outputs with and without the
    dead channels are compared in double precision and eval mode. Channels that cannot be removed stay, as zeros, and a
    warning names them. Parameters, FLOPs and the channels of each layer, before and after, are logged by the logger
    ``lightning_prune`` at the level INFO.

    Args:
        model: Any module; a ``LightningModule`` keeps its ``load_from_checkpoint``.
        example_inputs: A tensor, a tuple of arguments or a dict of keyword arguments; None takes the
            ``example_input_array`` of a ``LightningModule``.
        masks: Masks by parameter name, applied first.
        round_to: Keep a multiple of this many channels, padded with dead ones where there are enough.
        inplace: Whether to shrink the model itself rather than a copy. Parameters stay the same objects.
        optimizers: The optimizers of the model, which go on with the smaller parameters; only in place.
        averages: Copies of the model with averaged weights, also in an ``AveragedModel``, to shrink likewise; only in
            place.

    Raises:
        ValueError: If an argument is out of range, or the model cannot be run or traced.
        ImportError: If torch-pruning is not installed.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> _ = nn.init.zeros_(model[2].weight[:, 1:])
    >>> shrink(model, torch.randn(2, 4))
    Sequential(
      (0): Linear(in_features=4, out_features=1, bias=True)
      (1): ReLU()
      (2): Linear(in_features=1, out_features=2, bias=True)
    )
    """
    instance("model", model, nn.Module)
    round_to = integer("round_to", round_to, 1)
    inplace = flag("inplace", inplace)
    optimizers = sequence_of("optimizers", optimizers, Optimizer)
    averages = sequence_of("averages", averages, nn.Module)
    masks = Masks({} if masks is None else by_name("masks", masks, Tensor))
    if not inplace and (optimizers or averages):
        raise ValueError(
            f"inplace must be True if optimizers or averages are given, since they hold the model itself, got {inplace}"
        )
    inputs = needed_example_of(model, example_inputs)
    kept = what_to_keep(model, inputs, masks, round_to, [unwrapped(average) for average in averages])
    before = Size.of(model, inputs) if _log.isEnabledFor(logging.INFO) else None  # which takes a forward pass
    shrunk = model if inplace else copied(model)
    masks.apply(shrunk)
    cut_all(shrunk, kept, optimizers, averages)
    if before is not None:
        _log.info("shrink: %s", before.then(Size.of(shrunk, inputs)))
    return shrunk


def what_to_keep(
    model: nn.Module,
    inputs: Inputs,
    masks: Masks,
    round_to: int = 1,
    averages: Sequence[nn.Module] = (),
) -> CutRecord:
    """Return what is kept of a model without its dead units, and warn of dead units that stay.

    The model is left as it is.

    Args:
        model: Any module.
        inputs: Example inputs.
        masks: Masks to apply first.
        round_to: Keep a multiple of this many units, padded with dead ones where there are enough.
        averages: Models with the same parameters, in which the units must be dead as well.
    """
    copies = [hookless_copy(each) for each in (model, *averages)]
    for copy in copies:
        masks.apply(copy)
    first, *others = copies
    inputs = fitting(inputs, first)
    blocks = CutRecord(removed=tuple(_removable_blocks(copies, inputs)))
    for copy in copies if blocks.removed else ():
        cut(copy, blocks)
    graph = _graph(first, others, inputs, bool(blocks.removed))
    queries = cut_queries(copies, graph, inputs, round_to)
    graph = _graph(first, others, inputs, True) if queries.places else graph
    done = _removable(first, graph, inputs, round_to, others)
    experts = kept_by(first, [decision for decision in done if decision[0].router is not None])
    if experts.places:  # first, since what else is dead lies in fewer places then
        for copy in copies:
            cut(copy, experts)
        graph = _graph(first, others, inputs, True)
        done = _removable(first, graph, inputs, round_to, others)
    warn_of_unremoved(first, graph, done, bool(blocks.removed or queries.places or experts.places))
    kept = kept_by(first, done)
    if streams := [decision for decision in done if decision[0].norms]:
        kept = replace(kept, hidden=stated_width(first, kept, streams, inputs))
    return blocks.then(queries).then(experts).then(kept)


def _graph(model: nn.Module, averages: Sequence[nn.Module], inputs: Inputs, otherwise: bool) -> Graph:
    """Return what can be cut: with residual streams, if norms take their statistics over what is left of them.

    Args:
        model: A copy of the model.
        averages: Copies of its averages, whose norms are told the same.
        inputs: Example inputs.
        otherwise: Whether there is something else to cut, so that a model that cannot be traced is no error.
    """
    over = kept_channels(model)
    for average in averages if over else ():
        norms = norms_and_routers(average)
        for name, kept in over.items():
            keep_channels(norms[name], kept)
    try:
        graph = trace(model, inputs)
    except (ImportError, ValueError):
        if not otherwise and not over:
            raise
        graph = Graph(())
    graph = graph.with_streams(expert_graph(model, over))
    by_norms = over.keys() - {group.router for group in graph.groups}
    return graph.with_streams(find_streams(model, inputs)) if by_norms else graph


def cut_all(
    model: nn.Module, kept: CutRecord, optimizers: Sequence[Optimizer] = (), averages: Sequence[nn.Module] = ()
) -> None:
    """Cut a model, its averages and the states of its optimizers in place, and record the cut on the models."""
    for each in (model, *map(unwrapped, averages)):
        cut(each, kept, optimizers)
        tell_configs(each, kept)
        record_cut(each, kept)
        travel_along(each)


def _removable_blocks(models: Sequence[nn.Module], inputs: Inputs) -> list[str]:
    """Return the names of the residual blocks whose weights are zero in all models, and that can be taken out."""
    dead = [{name for name, block in children_of_containers(model) if is_zero(block)} for model in models]
    if not set.intersection(*dead):
        return []
    found, _ = find_blocks(models[0], inputs, is_zero)
    found = [name for name in found if all(name in names for names in dead)]
    for model in models:
        found = equivalent_removals(model, found, inputs)
    return found


def _removable(
    model: nn.Module, graph: Graph, inputs: Inputs, round_to: int, others: Sequence[nn.Module]
) -> list[Decision]:
    """Return what can be removed of all models: units with no producer or no consumer left.

    Where that fails, only the latter.
    """
    parameters = [named_parameters(each) for each in (model, *others)]
    unread = {group.name: dead_units(parameters, group.role("consumer")) for group in graph.groups}
    dead, over = {}, kept_channels(model)
    for group in graph.groups:
        produced = [m for m in (*group.role("producer"), *group.role("dependent")) if m.name in parameters[0]]
        dead[group.name] = dead_units(parameters, produced) | unread[group.name]
        if group.compared_by:  # those that are compared have an effect, even if they are zero
            dead[group.name] = unread[group.name] = dead[group.name] & ~_normalized(group, over)
    first = [(group, _rounded(~dead[group.name], 1 if group.compared_by else round_to)) for group in graph.groups]
    first = [decision for decision in first if not decision[1].all()]
    done = equivalent_cuts(model, first, inputs)
    kept = {group.name for group, _ in done}
    again = [(group, _rounded(~unread[group.name], round_to)) for group, _ in first if group.name not in kept]
    again = [decision for decision in again if not decision[1].all()]
    done = equivalent_cuts(model, [*done, *again], inputs) if again else done
    for other in (*others, model) if others else ():
        done = equivalent_cuts(other, done, inputs)
    return done


def _normalized(group: Group, over: Mapping[str, Tensor]) -> Tensor:
    """Return over which units (bool) any norm takes its statistics, or among which a router chooses."""
    everything = torch.ones(group.size, dtype=torch.bool)
    norms = [member for member in group.members if member.name in group.compared_by]
    seen = [over[norm.name].cpu()[norm.index].any(1) if norm.name in over else everything for norm in norms]
    return torch.stack(seen).any(0)


def _rounded(keep: Tensor, round_to: int) -> Tensor:
    """Return a decision that keeps a multiple of ``round_to`` units, at least one, by keeping the first dead ones."""
    wanted = min(len(keep), max(1, -(-int(keep.sum()) // round_to)) * round_to)
    spared = (~keep).nonzero().squeeze(1)[: max(0, wanted - int(keep.sum()))]
    return keep.index_fill(0, spared, True)
