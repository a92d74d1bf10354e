"""Kept norms: norms that take their statistics over the channels that are left, as the smaller model will.

Routers choose among the experts that are left in the same way.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_prune.models.experts import COUNTS, as_before, expert_layers, routes
from lightning_prune.models.layer_kinds import is_norm
from lightning_prune.models.parameters import plain_name

_OTHERS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)  # which normalise channels apart, or by groups


class KeptChannels:
    """The forward hook of a norm that lets it see the channels that are left alone; the others come out as zeros.

    The norm itself runs, with the entries of its parameters for these channels: whatever its class, this is what it
    computes once the others are cut. Copies of the module have the hook, too.

    Args:
        kept: Which channels (bool) are left.

    >>> norm = nn.LayerNorm(3)
    >>> keep_channels(norm, torch.tensor([True, False, True]))
    >>> norm(torch.tensor([2.0, 7.0, 4.0])).detach().round(decimals=2)
    tensor([-1.,  0.,  1.])
    """

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept
        self.index = kept.nonzero().squeeze(1)

    def __call__(self, norm: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return what the norm makes of the channels that are left, among zeros; or what the router chooses."""
        if not args:
            raise ValueError(f"the {type(norm).__name__} must be called with its input as a positional argument")
        values, *others = args
        if self.index.device != values.device:  # the model has moved
            self.index = self.index.to(values.device)
        if routes(norm):
            return as_before(self._small(norm).forward(values, *others), output, self.index)
        made: Tensor = self._small(norm).forward(values.index_select(-1, self.index), *others)
        return output.new_zeros(output.shape).index_copy(-1, self.index, made.to(output.dtype))

    def _small(self, norm: nn.Module) -> Any:
        """Return the norm, or router, as it is for what is left; its tensors are parts of those that it has."""
        small = object.__new__(type(norm))
        attributes, count = vars(small), len(self.kept)
        attributes.update(vars(norm), _parameters={}, _buffers={})
        for name, tensor in (*norm._parameters.items(), *norm._buffers.items()):
            if tensor is not None and tensor.shape[:1] == (count,):
                tensor = tensor.index_select(0, self.index)
            attributes[name] = tensor
        if "normalized_shape" in attributes:
            attributes["normalized_shape"] = (len(self.index),)
        attributes.update({name: len(self.index) for name in COUNTS if attributes.get(name) == count})
        return small

    @classmethod
    def of(cls, norm: nn.Module) -> Self | None:
        """Return the hook of a norm, if it has one."""
        return next((hook for hook in norm._forward_hooks.values() if isinstance(hook, cls)), None)


def takes_statistics(module: nn.Module) -> bool:
    """Return whether a module looks like a norm over all channels: a LayerNorm or RMSNorm of any library.

    >>> takes_statistics(nn.LayerNorm(4)), takes_statistics(nn.LayerNorm((3, 4))), takes_statistics(nn.BatchNorm1d(4))
    (True, False, False)
    """
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 1 or isinstance(module, _OTHERS) or any(True for _ in module.children()):
        return False
    alike = all(p is None or p.shape == weight.shape for p in module._parameters.values())
    return is_norm(module) and alike


def keep_channels(norm: nn.Module, kept: Tensor) -> None:
    """Let a norm take its statistics over the channels that are kept (bool), instead of those of before."""
    forget_channels(norm)
    if not kept.all():
        norm.register_forward_hook(KeptChannels(kept), prepend=True)  # whoever looks at the output sees this one


def forget_channels(norm: nn.Module) -> None:
    """Let a norm take its statistics over all channels again."""
    for key, hook in list(norm._forward_hooks.items()):
        if isinstance(hook, KeptChannels):
            del norm._forward_hooks[key]


def norms_and_routers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the norms over all channels of a model, and the routers to experts, by the name of their weight."""
    return {**norms_by_weight(model), **{f"{each.router_name}.weight": each.router for each in expert_layers(model)}}


def norms_by_weight(model: nn.Module) -> dict[str, nn.Module]:
    """Return the norms over all channels of a model, by the name of their weight.

    >>> list(norms_by_weight(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))))
    ['1.weight']
    """
    found = ((f"{name}.weight" if name else "weight", module) for name, module in model.named_modules())
    return {plain_name(name): module for name, module in found if takes_statistics(module)}


def kept_channels(model: nn.Module) -> dict[str, Tensor]:
    """Return which channels (bool) norms take their statistics over, where these are not all, by names of weights.

    Likewise which experts routers choose among.

    >>> model = nn.Sequential(nn.LayerNorm(2), nn.LayerNorm(2))
    >>> keep_channels(model[0], torch.tensor([True, False]))
    >>> kept_channels(model)
    {'0.weight': tensor([ True, False])}
    """
    hooks = {name: KeptChannels.of(norm) for name, norm in norms_and_routers(model).items()}
    return {name: hook.kept for name, hook in hooks.items() if hook is not None}


def check_weights_suffice(model: nn.Module) -> None:
    """Reject a model whose weights alone are not all of it.

    Raises:
        ValueError: If norms take their statistics over some of their channels, or routers choose among some experts.
    """
    if found := list(kept_channels(model)):
        raise ValueError(
            f"the model must be shrunk before its weights are saved alone, since norms take their statistics over the "
            f"channels that are left, or routers choose among the experts that are left, as of {found[:3]}: save "
            f"shrink(model, example_inputs)"
        )


def follow_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Let norms take their statistics over the channels that masks of their weights keep, and routers choose likewise.

    >>> model = nn.Sequential(nn.LayerNorm(2))
    >>> follow_masks(model, {"0.weight": torch.tensor([True, False])})
    >>> kept_channels(model)
    {'0.weight': tensor([ True, False])}
    """
    changed = False
    for name, norm in norms_and_routers(model).items():
        if name in masks:
            hook, kept = KeptChannels.of(norm), masks[name].flatten(1).any(1) if masks[name].ndim > 1 else masks[name]
            before = torch.ones_like(kept) if hook is None else hook.kept.to(kept.device)
            if not kept.equal(before):
                keep_channels(norm, kept)
                changed = True
    if changed and "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # compiled code does not see hooks that have changed
