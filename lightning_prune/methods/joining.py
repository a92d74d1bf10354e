"""Joining: parameters that an optimizer steps in the place of a weight are in its group, right behind it."""

from collections.abc import Mapping

from torch import nn
from torch.optim import Optimizer


def join(optimizer: Optimizer, parts: Mapping[nn.Parameter, Mapping[str, nn.Parameter]]) -> None:
    """Put new parameters behind the weight that they stand for, to be stepped with its options; idempotent.

    Args:
        optimizer: Has some of the weights.
        parts: The new parameters of each weight, by what they add to its name.
    """
    for group in optimizer.param_groups:
        known = {id(parameter) for parameter in group["params"]}
        names = group.get("param_names") or [""] * len(group["params"])
        joined: list[tuple[nn.Parameter, str]] = []
        for parameter, name in zip(group["params"], names, strict=True):
            joined.append((parameter, name))
            for part, new in parts.get(parameter, {}).items():
                if id(new) not in known:
                    joined.append((new, f"{name}.{part}"))
        group["params"][:] = [parameter for parameter, _ in joined]
        if "param_names" in group:
            group["param_names"][:] = [name for _, name in joined]
