"""Graph: which channels of which parameters live and die together, read from Torch-Pruning's dependency graph."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.models.copying import copied
from lightning_prune.models.forward import Inputs, call, convert, tensors
from lightning_prune.models.parameters import plain_name
from lightning_prune.models.preserving import eager
from lightning_prune.structure.groups import HEADS, Direction, Graph, Group, Item, Member, Role
from lightning_prune.validation.values import shown

_ROOTS = (nn.modules.conv._ConvNd, nn.Linear, nn.LSTM, nn.Embedding)
_CHANNELWISE = (nn.modules.batchnorm._NormBase,)
_ACROSS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


class UnsupportedError(Exception):
    """Why the channels of a group cannot be removed."""


def trace(model: nn.Module, inputs: Inputs, heads: int | None = None) -> Graph:
    """Return the groups of channels and of attention heads of a model; the model is left as it is.

    Args:
        model: Any module whose outputs depend on its parameters by autograd.
        inputs: Example inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.
        heads: The number of heads of attentions built of linear layers; None reads it from their module.

    Raises:
        ImportError: If torch-pruning is not installed.
        ValueError: If the model cannot be run or traced.

    Reference: Fang et al., 2023, "DepGraph: Towards Any Structural Pruning", arXiv:2301.12900.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> [(member.name, member.dim, member.role) for member in trace(model, torch.randn(2, 4)).groups[0].members]
    [('0.weight', 0, 'producer'), ('0.bias', 0, 'dependent'), ('2.weight', 1, 'consumer')]
    """
    require_torch_pruning()
    try:  # recurrent layers leave another trace on other devices and in other types
        plain = copied(model).cpu().float()
        traced, found, groups = _dependencies(plain, convert(inputs, torch.device("cpu"), torch.float32))
    except Exception:  # it runs the user's forward, which may insist on a device or a type
        try:
            traced, found, groups = _dependencies(copied(model), inputs)
        except Exception as error:
            recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
            unknown = {type(module).__name__ for module in recurrent if module.mode != "LSTM" or module.proj_size}
            why = f"{error!r}, perhaps since it does not know {sorted(unknown)}" if unknown else repr(error)
            raise ValueError(
                f"the model must run on example_inputs and be traceable by torch-pruning, got {why} for {shown(inputs)}"
            ) from error
    reader = _Reader(traced, heads)
    result = packed_heads(traced)
    left_out: dict[str, str] = {}
    for group in groups:
        items = [
            (item.dep.target.module, _direction(found, item), list(item.idxs), list(item.root_idxs)) for item in group
        ]
        try:
            result.append(reader.group(items))
        except UnsupportedError as reason:
            left_out.update({name: str(reason) for name in reader.made(items)})
    return Graph(tuple(sorted(result, key=lambda group: reader.order[group.name])), left_out)


def _dependencies(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Any, list[Any]]:
    """Return the model, whose parameters it lets be trained, its dependency graph, and the groups of that."""
    model.requires_grad_()
    for module in model.modules():
        module._forward_hooks.clear()
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):  # keys and values would count as outputs
            config.use_cache = False  # of this copy
    with warnings.catch_warnings(), torch.enable_grad(), torch.random.fork_rng(devices=[]), eager():
        warnings.simplefilter("ignore")
        graph = require_torch_pruning().DependencyGraph()
        found = graph.build_dependency(model, inputs, forward_fn=_outputs, verbose=False)
        return model, found, list(found.get_all_groups(root_module_types=_ROOTS))


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return what a model puts out that can be traced."""
    return [tensor for tensor in tensors(call(model, inputs)) if tensor.grad_fn is not None]


def require_torch_pruning() -> Any:
    """Return the module ``torch_pruning``.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError("coupled channels need torch-pruning: pip install 'lightning-prune[shrink]'") from error
    return torch_pruning


def packed_heads(model: nn.Module) -> list[Group]:
    """Return the heads of every ``nn.MultiheadAttention``: they need no trace.

    >>> packed_heads(nn.MultiheadAttention(8, 2))[0].size
    2
    """
    reader = _Reader(model)
    found = [module for module in reader.modules if isinstance(module, nn.MultiheadAttention)]
    return [_packed(module, reader) for module in found]


def _packed(module: nn.MultiheadAttention, reader: "_Reader") -> Group:
    rows = _by_head(module.embed_dim, module.num_heads)
    three = torch.cat([rows + part * module.embed_dim for part in range(3)], 1)
    apart = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    makers = [(weight, rows) for weight in apart] if module.in_proj_weight is None else [(module.in_proj_weight, three)]
    members = [Member(reader.names[weight], 0, index, "producer") for weight, index in makers]
    if module.in_proj_bias is not None:
        members.append(Member(reader.names[module.in_proj_bias], 0, three, "dependent"))
    for bias in (module.bias_k, module.bias_v):
        if bias is not None:
            members.append(Member(reader.names[bias], 2, rows, "dependent"))
    members.append(Member(reader.names[module.out_proj.weight], 1, rows, "consumer"))
    return _group(members, reader.order, reader.modules[module])


def _direction(found: Any, item: Any) -> Direction:
    handler = item.dep.handler
    out, into = found.is_out_channel_pruning_fn(handler), found.is_in_channel_pruning_fn(handler)
    return "both" if out and into else "out" if out else "in"


class _Reader:
    """Turns the items of a dependency group into members of a group, by the types of the layers."""

    def __init__(self, model: nn.Module, heads: int | None = None) -> None:
        self.heads = heads
        self.modules = {module: plain_name(name) for name, module in model.named_modules()}
        self.names: dict[Tensor, str] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self.names.setdefault(tensor, plain_name(name))
        self.order = {name: place for place, name in enumerate(self.names.values())}
        self.owners = {p: module for module in model.modules() for p in module.parameters(recurse=False)}

    def made(self, items: Iterable[Item]) -> list[str]:
        """Return the weights whose output channels the items cut."""
        found = [m for m, direction, *_ in items if direction != "in" and isinstance(m, _ROOTS)]
        weights = (getattr(module, "weight", getattr(module, "weight_ih_l0", None)) for module in found)
        return [self.names[weight] for weight in weights if weight is not None]

    def group(self, items: Sequence[Item]) -> Group:
        """Return the group that the items describe.

        Raises:
            UnsupportedError: If its units cannot be removed.
        """
        layers = [item for item in items if self._is_layer(item[0])]
        if not any(direction == "in" for _, direction, *_ in layers):
            raise UnsupportedError("its channels are outputs of the model")
        for module, *_ in layers:
            owner = self.owners.get(module) if isinstance(module, nn.Parameter) else module
            if isinstance(owner, _ACROSS):
                raise UnsupportedError(f"{type(owner).__name__} takes statistics over its channels")
        attention = self._attention(layers)
        if attention is not None:
            return self._heads(*attention)
        units = _units(layers)
        members: dict[tuple[str, int], Member] = {}
        for module, direction, places, roots in layers:
            for tensor, dim, index, role in _places(module, direction, _rows(places, roots, units)):
                if int(index.max()) >= tensor.shape[dim]:
                    raise UnsupportedError(f"they reach {self.names[tensor]} in a way that torch-pruning does not know")
                _add(members, Member(self.names[tensor], dim, index, role))
        return _group(members.values(), self.order)

    def _is_layer(self, module: Any) -> bool:
        return module in self.modules or isinstance(module, nn.Parameter)

    def _attention(self, layers: Sequence[Item]) -> tuple[nn.Module, list[nn.Linear], nn.Linear, int] | None:
        """Return the attention, its projections, its output layer and its number of heads, if the layers are one."""
        makers = [module for module, direction, *_ in layers if direction == "out"]
        readers = [module for module, direction, *_ in layers if direction == "in"]
        if len(readers) != 1 or not all(isinstance(layer, nn.Linear) for layer in (*makers, *readers)):
            return None
        parents = {self.modules[layer].rpartition(".")[0] for layer in (*makers, *readers)}
        parent = next((module for module, name in self.modules.items() if {name} == parents), None)
        stated = [getattr(parent, name) for name in HEADS if isinstance(getattr(parent, name, None), int)]
        found = stated if self.heads is None else [self.heads]
        if parent is None or not found or sum(layer.out_features for layer in makers) != 3 * readers[0].in_features:
            return None
        return parent, sorted(makers, key=list(self.modules).index), readers[0], found[0]

    def _heads(self, parent: nn.Module, makers: list[nn.Linear], reader: nn.Linear, heads: int) -> Group:
        width = reader.in_features
        if width % heads or any(layer.out_features % width for layer in makers):
            raise UnsupportedError(f"its {width} channels are no whole number for each of the {heads} heads")
        rows = _by_head(width, heads)
        members: dict[tuple[str, int], Member] = {}
        for layer in makers:
            index = torch.cat([rows + begin for begin in range(0, layer.out_features, width)], 1)
            _add(members, Member(self.names[layer.weight], 0, index, "producer"))
            if layer.bias is not None:
                _add(members, Member(self.names[layer.bias], 0, index, "dependent"))
        _add(members, Member(self.names[reader.weight], 1, rows, "consumer"))
        return _group(members.values(), self.order, self.modules[parent])


def _group(members: Iterable[Member], order: Mapping[str, int], owner: str | None = None) -> Group:
    kept = sorted(members, key=lambda member: (member.role != "producer", order[member.name]))
    if kept[0].role != "producer":
        raise UnsupportedError("no layer makes its channels")
    return Group(kept[0].name, tuple(kept), owner)


def _by_head(width: int, heads: int) -> Tensor:
    return torch.arange(width).view(heads, -1)


def _add(members: dict[tuple[str, int], Member], member: Member) -> None:
    """Add a member; one that lies in the same dimension of the same tensor is joined with it."""
    old = members.get((member.name, member.dim))
    if old is not None and not old.index.equal(member.index):
        joined = torch.cat([old.index, member.index], 1)
        member = Member(member.name, member.dim, joined, old.role)
    members[member.name, member.dim] = member


def _units(layers: Iterable[Item]) -> list[list[int]]:
    """Return which channels of the first layer form each unit: those that meet at one place anywhere are one."""
    parent: dict[int, int] = {}

    def find(channel: int) -> int:
        while parent.setdefault(channel, channel) != channel:
            channel = parent[channel]
        return channel

    for module, direction, places, roots in layers:
        if any(root is None for root in roots) or len(places) != len(roots):
            raise UnsupportedError(f"{type(module).__name__} reads them in a way that is not known")
        modulus = _modulus(module, direction)
        first: dict[int, int] = {}
        for place, root in zip(places, roots, strict=True):
            one, other = find(root), find(first.setdefault(place % modulus if modulus else place, root))
            parent[max(one, other)] = min(one, other)
    units: dict[int, list[int]] = {}
    for channel in sorted(parent):
        units.setdefault(find(channel), []).append(channel)
    return list(units.values())


def _modulus(module: Any, direction: Direction) -> int:
    """Return the number of channels in a group of a grouped convolution; 0 for everything else."""
    if not isinstance(module, nn.modules.conv._ConvNd) or module.groups == 1 or direction == "both":
        return 0
    if module.transposed or module.groups == module.in_channels:
        raise UnsupportedError("they go through a grouped convolution that cannot be cut")
    return (module.in_channels if direction == "in" else module.out_channels) // module.groups


def _rows(places: Sequence[int], roots: Sequence[int], units: Sequence[Sequence[int]]) -> Tensor:
    """Return the places of each unit in one layer, a row a unit."""
    of = {channel: unit for unit, channels in enumerate(units) for channel in channels}
    found: list[list[int]] = [[] for _ in units]
    for place, root in zip(places, roots, strict=True):
        found[of[root]].append(place)
    if len({len(row) for row in found}) != 1:
        raise UnsupportedError("a layer reads more of some channels than of others")
    return torch.tensor([sorted(row) for row in found])


def _places(module: Any, direction: Direction, index: Tensor) -> Iterator[tuple[Tensor, int, Tensor, Role]]:
    """Yield the tensors of a layer that channels at these places cut: tensor, dimension, places, role."""
    if isinstance(module, nn.Parameter):
        last = max(d for d, length in enumerate(module.shape) if length > 1)
        yield module, last, index, "dependent"
    elif isinstance(module, nn.LSTM):
        yield from _lstm(module, direction, index)
    elif isinstance(module, nn.Embedding):
        yield module.weight, 1, index, "producer"
    elif isinstance(module, _CHANNELWISE) or (isinstance(module, nn.PReLU) and module.num_parameters > 1):
        tensors = (getattr(module, name, None) for name in ("weight", "bias", "running_mean", "running_var"))
        yield from ((tensor, 0, index, "dependent") for tensor in tensors if tensor is not None)
    elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        yield from _weighing(module, direction, index)
    elif not isinstance(module, nn.PReLU):
        raise UnsupportedError(f"{type(module).__name__} cannot be cut")


def _weighing(
    module: nn.Linear | nn.modules.conv._ConvNd, direction: Direction, index: Tensor
) -> Iterator[tuple[Tensor, int, Tensor, Role]]:
    # of a depthwise convolution, transposed or not, the first dimension has both
    outputs = int(getattr(module, "transposed", False) and direction != "both")
    if direction == "in":
        modulus = _modulus(module, direction)
        yield module.weight, 1 - outputs, (index % modulus).unique(dim=1) if modulus else index, "consumer"
    else:
        yield module.weight, outputs, index, "producer"
        if module.bias is not None:
            yield module.bias, 0, index, "dependent"


def _lstm(module: nn.LSTM, direction: Direction, index: Tensor) -> Iterator[tuple[Tensor, int, Tensor, Role]]:
    if module.bidirectional or module.proj_size:
        raise UnsupportedError("they go through an LSTM with two directions or a projection")
    weights = dict(module.named_parameters())
    if direction == "in":
        yield weights["weight_ih_l0"], 1, index, "consumer"
        return
    gates = torch.cat([index + gate * module.hidden_size for gate in range(4)], 1)
    for layer in range(module.num_layers):
        yield weights[f"weight_ih_l{layer}"], 0, gates, "producer"
        yield weights[f"weight_hh_l{layer}"], 0, gates, "producer"
        yield weights[f"weight_hh_l{layer}"], 1, index, "consumer"
        if layer:
            yield weights[f"weight_ih_l{layer}"], 1, index, "consumer"
        if module.bias:
            yield weights[f"bias_ih_l{layer}"], 0, gates, "dependent"
            yield weights[f"bias_hh_l{layer}"], 0, gates, "dependent"
