"""Surgery: cuts units out of the parameters and buffers of a model, and tells its layers of their new sizes."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.graph import HEADS, WIDTHS, Group, Member
from lightning_prune.targets import named_parameters, plain_name

Keep = Mapping[tuple[str, int], Tensor]  # by name and dimension: which places (bool) are kept


def kept_places(model: nn.Module, decisions: Iterable[tuple[Group, Tensor]]) -> dict[tuple[str, int], Tensor]:
    """Return which places are kept in every dimension of every tensor that decisions on units (bool) cut."""
    shapes = {name: tensor.shape for name, tensor in named_tensors(model).items()}
    places: dict[tuple[str, int], Tensor] = {}
    for group, keep in decisions:
        for member in group.members:
            key = (member.name, member.dim)
            kept = places.setdefault(key, torch.ones(shapes[member.name][member.dim], dtype=torch.bool))
            kept[member.index[~keep.cpu()].flatten()] = False
    return places


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer once, under its plain name."""
    return {plain_name(name): tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def zero_units(tensors: Mapping[str, Tensor], members: Iterable[Member]) -> Tensor:
    """Return which units (bool) are zero in all of these members."""
    found = [entries(tensors[m.name] != 0, m).any(1).cpu() for m in members]
    return ~torch.stack(found).any(0)


def entries(tensor: Tensor, member: Member) -> Tensor:
    """Return the entries of each unit in a tensor, a row a unit."""
    return tensor.movedim(member.dim, 0)[member.index.to(tensor.device)].flatten(1)


@torch.no_grad()
def silence(model: nn.Module, decisions: Iterable[tuple[Group, Tensor]]) -> None:
    """Zero, in place, the entries of parameters that belong to units which are not kept (bool, True = kept)."""
    parameters = named_parameters(model)
    for (name, dim), kept in kept_places(model, decisions).items():
        if name in parameters:
            parameters[name].index_fill_(dim, (~kept).nonzero().squeeze(1).to(parameters[name].device), 0.0)


@torch.no_grad()
def cut(model: nn.Module, decisions: Iterable[tuple[Group, Tensor]], optimizers: Iterable[Optimizer] = ()) -> None:
    """Remove from a model, in place, the units that are not kept (bool, True = kept).

    Parameters stay the same objects, so that optimizers and everything else that holds them go on with them.

    Args:
        model: The model that the groups were found in, or a copy of it.
        decisions: Groups, each with what is kept of it.
        optimizers: Those of the model, whose states are cut as well.
    """
    decisions = list(decisions)
    heads = {group.owner: (group.size, int(keep.sum())) for group, keep in decisions if group.owner is not None}
    tensors = named_tensors(model)
    for (name, dim), kept in kept_places(model, decisions).items():
        tensor = tensors[name]
        shape = tensor.shape
        for state in [optimizer.state.get(tensor, {}) for optimizer in optimizers]:
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == shape:
                    state[key] = _select(value, dim, kept)
        grad, tensor.grad = tensor.grad, None  # it has to be of the shape of the data at every moment
        tensor.data = _select(tensor.data, dim, kept)
        tensor.grad = None if grad is None else _select(grad, dim, kept)
    for name, module in model.named_modules():
        tell(module)
        if plain_name(name) in heads:
            _tell_heads(module, *heads[plain_name(name)])


def _select(tensor: Tensor, dim: int, kept: Tensor) -> Tensor:
    return tensor.index_select(dim, kept.nonzero().squeeze(1).to(tensor.device))


def tell(module: nn.Module) -> None:
    """Set the sizes that a layer states to those that its parameters have."""
    if isinstance(module, nn.modules.conv._ConvNd):
        _tell_convolution(module)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        sized = module.running_mean if module.running_mean is not None else module.weight
        module.num_features = module.num_features if sized is None else len(sized)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, nn.LSTM):
        weights = dict(module.named_parameters())
        module.input_size = weights["weight_ih_l0"].shape[1]
        module.hidden_size = weights["weight_hh_l0"].shape[1]
        module.flatten_parameters()


def _tell_convolution(module: nn.modules.conv._ConvNd) -> None:
    outputs = int(module.transposed)
    if module.groups == module.in_channels == module.out_channels:
        module.groups = module.weight.shape[0]  # one filter for each channel
    module.out_channels = module.weight.shape[outputs] * (module.groups if module.transposed else 1)
    module.in_channels = module.weight.shape[1 - outputs] * (1 if module.transposed else module.groups)


def _tell_heads(module: nn.Module, before: int, now: int) -> None:
    for name in HEADS:
        if getattr(module, name, None) == before:
            setattr(module, name, now)
    for name in WIDTHS:
        width = getattr(module, name, None)
        if isinstance(width, int) and width % before == 0:
            setattr(module, name, width // before * now)
