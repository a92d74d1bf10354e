"""Experts: layers with several of them and a router, and routers that choose among the experts that are left."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.models.layer_kinds import holds_experts
from lightning_prune.models.parameters import plain_name

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # as models and configs call them
_CHOSEN = ("top_k", "topk", "num_experts_per_tok", "num_experts_per_token", "k")
_GROUPS, _GROUPS_CHOSEN = ("num_group", "n_group", "n_groups", "num_expert_group"), ("topk_group", "top_k_group")


@dataclass(frozen=True)
class ExpertLayer:
    """Experts whose matrices lie one behind the other, and the router that chooses among them.

    Args:
        name: The name of the module that holds the experts.
        experts: That module.
        router_name: The name of the router.
        router: The router: a module with a row of its weight for each expert.
        parent: The module that holds both.
    """

    name: str
    experts: nn.Module
    router_name: str
    router: nn.Module
    parent: nn.Module

    @property
    def count(self) -> int:
        """The number of experts."""
        return len(stacks_of(self.experts)[0])

    @property
    def chosen(self) -> int:
        """How many experts a token takes, as far as a module says so; 1 otherwise."""
        return self._stated(_CHOSEN)

    @property
    def groups(self) -> int:
        """In how many groups its experts are, of which a token takes some first; 1 for none."""
        number = self._stated(_GROUPS)
        return number if self.count % number == 0 else 1

    @property
    def least(self) -> int:
        """How many experts a token needs: two of each group at least, by which groups are compared."""
        if self.groups == 1:
            return self.chosen
        return self.groups * max(2, -(-self.chosen // self._stated(_GROUPS_CHOSEN)))

    def _stated(self, names: Sequence[str]) -> int:
        stated = [getattr(m, name, None) for m in (self.router, self.parent, self.experts) for name in names]
        return next((number for number in stated if type(number) is int and number > 0), 1)


def stacks_of(experts: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a module that hold the matrices of several experts."""
    return [parameter for parameter in experts.parameters(recurse=False) if holds_experts(parameter, [experts])]


def expert_layers(model: nn.Module) -> Iterator[ExpertLayer]:
    """Yield the layers of a model that have experts and one router beside them."""
    for name, parent in model.named_modules():
        inner = {f"{name}.{child}" if name else child: module for child, module in parent.named_children()}
        for own, experts in inner.items():
            counts = {len(stack) for stack in stacks_of(experts)}
            routers = [
                (n, m)
                for n, m in inner.items()
                if routes(m) and m is not experts and len(m.get_parameter("weight")) in counts
            ]
            if len(counts) == 1 == len(routers):
                yield ExpertLayer(plain_name(own), experts, plain_name(routers[0][0]), routers[0][1], parent)


def routes(module: nn.Module) -> bool:
    """Return whether a module may be a router: its weight has a row for each expert."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2


def as_before(made: Any, full: Any, index: Tensor) -> Any:
    """Return what a router with fewer experts has put out, with the numbers and the places of all experts.

    >>> as_before(torch.tensor([1]), torch.tensor([0]), torch.tensor([0, 2]))
    tensor([2])
    >>> as_before(torch.tensor([[0.5, 0.25]]), torch.zeros(1, 3), torch.tensor([0, 2]))
    tensor([[0.5000,   -inf, 0.2500]])
    """
    if isinstance(made, tuple | list):
        return type(made)(as_before(one, other, index) for one, other in zip(made, full, strict=True))
    if not isinstance(made, Tensor):
        return made
    if not made.is_floating_point():
        return index[made]
    if made.shape == full.shape:  # of the experts that were chosen
        return made
    return made.new_full(full.shape, -torch.inf).index_copy(-1, index, made)


def state_counts(model: nn.Module, layers: Sequence[ExpertLayer], before: Collection[int]) -> None:
    """Let modules state how many experts they have, after a cut.

    Args:
        model: The model.
        layers: Its layers that have experts.
        before: How many these had.
    """
    for layer in layers:
        _state([layer.experts, layer.router, layer.parent], None, layer.count)
    counts = {layer.count for layer in layers}
    if len(before) == 1 == len(counts):  # so that the model, too, may state one number
        _state(model.modules(), *before, *counts)


def _state(modules: Iterable[nn.Module], before: int | None, count: int) -> None:
    for module in modules:
        for name in COUNTS:
            stated = vars(module).get(name)
            if type(stated) is int and before in (None, stated):
                setattr(module, name, count)
