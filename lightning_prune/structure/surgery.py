"""Surgery: cuts units out of the parameters and buffers of a model, and updates the sizes that its layers state."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.models.experts import expert_layers, state_counts
from lightning_prune.models.kept_norms import KeptChannels, keep_channels, norms_and_routers, takes_statistics
from lightning_prune.models.orientation import is_transposed, tell_transposed
from lightning_prune.models.parameters import named_parameters, plain_name
from lightning_prune.structure.cut_record import CutRecord, select
from lightning_prune.structure.depth import remove_blocks
from lightning_prune.structure.groups import HEADS, QUERIES, WIDTHS, Group, Member
from lightning_prune.validation.warning import warn

Decision = tuple[Group, Tensor]  # which units (bool) of a group are kept
Order = tuple[Group, Tensor]  # in which order (int64) the units of a group come


def kept_by(model: nn.Module, decisions: Iterable[Decision]) -> CutRecord:
    """Return what is kept of a model after decisions on its units."""
    decisions = list(decisions)
    shapes = {name: tensor.shape for name, tensor in named_tensors(model).items()}
    places: dict[tuple[str, int], Tensor] = {}
    for group, keep in decisions:
        for member in group.members:
            key = (member.name, member.dim)
            kept = places.setdefault(key, torch.ones(shapes[member.name][member.dim], dtype=torch.bool))
            kept[member.index[~keep.cpu()].flatten()] = False
    counts = [(group, group.size // group.parts, int(keep.sum()) // group.parts) for group, keep in decisions]
    heads = {owner: (size, now) for group, size, now in counts if group.parts == 1 for owner in group.owners}
    queries = {owner: (size, now) for group, size, now in counts if group.parts > 1 for owner in group.owners}
    return CutRecord(places, heads, queries=queries)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer once, by its plain name."""
    return {plain_name(name): tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def dead_units(models: Iterable[Mapping[str, Tensor]], members: Sequence[Member]) -> Tensor:
    """Return which units (bool) are zero in all of these members and in the tensors of all models."""
    found = [unit_weights(tensors[m.name].detach() != 0, m).any(1).cpu() for tensors in models for m in members]
    return ~torch.stack(found).any(0) if found else torch.tensor(False)


def unit_weights(tensor: Tensor, member: Member) -> Tensor:
    """Return the elements of each unit in a tensor, a row a unit."""
    return tensor.movedim(member.dim, 0)[member.index.to(tensor.device)].flatten(1)


@torch.no_grad()
def zero_units(model: nn.Module, decisions: Iterable[Decision]) -> None:
    """Zero, in place, the weights of units that are not kept."""
    parameters = named_parameters(model)
    for (name, dim), kept in kept_by(model, decisions).places.items():
        if name in parameters:
            parameters[name].index_fill_(dim, (~kept).nonzero().squeeze(1).to(parameters[name].device), 0.0)


@torch.no_grad()
def reorder(model: nn.Module, orders: Iterable[Order]) -> None:
    """Put, in place, the units of groups into other orders; parameters stay the same objects."""
    tensors = named_tensors(model)
    for group, order in orders:
        for member in group.members:
            tensor = tensors[member.name]
            places = torch.arange(tensor.shape[member.dim])
            places[member.index.flatten()] = member.index[order].flatten()
            tensor.copy_(tensor.index_select(member.dim, places.to(tensor.device)))


@torch.no_grad()
def cut(model: nn.Module, kept: CutRecord, optimizers: Iterable[Optimizer] = ()) -> None:
    """Cut a model down, in place, to what is kept of it.

    Parameters stay the same objects, so that optimizers and other holders go on working.

    Args:
        model: Any module with tensors of these names and lengths.
        kept: What is kept.
        optimizers: The optimizers of the model; their states are cut as well.

    Raises:
        ValueError: If the model does not fit; it is left as it was.
    """
    optimizers, tensors = list(optimizers), named_tensors(model)
    kept.check(tensors)
    experts = list(expert_layers(model))
    before = {layer.count for layer in experts}
    for (name, dim), places in kept.places.items():
        tensor = tensors[name]
        for optimizer in optimizers:
            _cut_state(optimizer, tensor, dim, places)
        grad, tensor.grad = tensor.grad, None  # a gradient must always have the shape of the data
        tensor.data = select(tensor.data, dim, places)
        tensor.grad = None if grad is None else select(grad, dim, places)
    _cut_norms(model, kept)
    state_counts(model, experts, before)
    for module in model.modules():
        update_sizes(module)
    for name, module in model.named_modules():  # from the sizes of their layers
        if plain_name(name) in kept.heads:
            _update_heads(module, *kept.heads[plain_name(name)], HEADS)
        if plain_name(name) in kept.queries:
            _scale(module, ("num_key_value_groups",), *kept.queries[plain_name(name)])
            _update_heads(module, *kept.queries[plain_name(name)], QUERIES)
    if kept.removed:
        remove_blocks(model, kept.removed, optimizers)


def _cut_norms(model: nn.Module, kept: CutRecord) -> None:
    """Let norms that take their statistics over some channels find these where they are now."""
    for name, norm in norms_and_routers(model).items():
        hook = KeptChannels.of(norm)
        if hook is not None and (name, 0) in kept.places:
            keep_channels(norm, select(hook.kept, 0, kept.places[name, 0]))


def _cut_state(optimizer: Optimizer, parameter: Tensor, dim: int, places: Tensor) -> None:
    """Cut an optimizer's state of a parameter, element-wise or row-wise; a state of another shape is dropped."""
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.state.clear()  # one history for all parameters
        optimizer._numel_cache = None
        return
    state = optimizer.state.get(parameter, {})
    for key, value in list(state.items()):
        if not isinstance(value, Tensor) or value.numel() <= 1:
            continue
        fits = value.ndim == parameter.ndim
        if not fits or any(a not in (b, 1) for a, b in zip(value.shape, parameter.shape, strict=True)):
            warn(
                f"{type(optimizer).__name__} loses its state of a parameter that was cut: {key!r} must have the shape "
                f"of the parameter, {tuple(parameter.shape)}, or 1 along some dimensions, got {tuple(value.shape)}"
            )
            optimizer.state.pop(parameter)
            return
        if value.shape[dim] == parameter.shape[dim]:
            state[key] = select(value, dim, places)


def update_sizes(module: nn.Module) -> None:
    """Set the sizes that a layer states to those of its parameters."""
    if is_transposed(module):
        tell_transposed(module)
    elif isinstance(module, nn.modules.conv._ConvNd):
        _update_convolution(module)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        sized = module.running_mean if module.running_mean is not None else module.weight
        module.num_features = module.num_features if sized is None else len(sized)
    elif isinstance(module, nn.LSTM):
        weights = dict(module.named_parameters())
        module.input_size = weights["weight_ih_l0"].shape[1]
        module.hidden_size = weights["weight_hh_l0"].shape[1]
        module.flatten_parameters()
    else:
        _update_others(module)


def _update_others(module: Any) -> None:
    if isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif takes_statistics(module) and hasattr(module, "normalized_shape"):
        module.normalized_shape = tuple(module.weight.shape)


def _update_convolution(module: nn.modules.conv._ConvNd) -> None:
    outputs = int(module.transposed)
    if module.groups == module.in_channels == module.out_channels:
        module.groups = module.weight.shape[0]  # depthwise: one filter a channel
    module.out_channels = module.weight.shape[outputs] * (module.groups if module.transposed else 1)
    module.in_channels = module.weight.shape[1 - outputs] * (1 if module.transposed else module.groups)


def _update_heads(module: Any, before: int, now: int, names: Sequence[str]) -> None:
    _scale(module, (*names, *WIDTHS), before, now)
    code = getattr(type(module).forward, "__code__", None)
    reads = set() if code is None else set(code.co_names)
    if "config" in reads and reads.intersection(HEADS):  # the other attentions may have other numbers of heads
        module.config = copy.copy(module.config)
        _scale(module.config, names, before, now)
    queries, keys = getattr(module, "q_proj", None), getattr(module, "k_proj", None)
    if hasattr(module, "num_key_value_groups") and isinstance(queries, nn.Linear) and isinstance(keys, nn.Linear):
        module.num_key_value_groups = queries.out_features // keys.out_features


def _scale(owner: Any, names: Iterable[str], before: int, now: int) -> None:
    """Scale the numbers that an object states; a unit may be several heads of queries and one of keys and values."""
    for name in names:
        number = getattr(owner, name, None)
        if isinstance(number, int) and number % before == 0:
            setattr(owner, name, number // before * now)
