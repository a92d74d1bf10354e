"""Damage: states of which one thing is deleted, cut off, or something else."""

import copy
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

WRONG: tuple[Any, ...] = (None, "x", -1, 10**9, 10**30, 0.5, math.nan, math.inf, True, [], [None], {}, {"x": "y"}, b"")


def places(part: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything in a state."""
    if path:
        yield path
    for key, value in part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ():
        yield from places(value, (*path, key))


def damaged(state: dict[str, Any], path: tuple[Any, ...], chance: random.Random) -> dict[str, Any]:
    """Return a copy of a state in which one thing is deleted, cut off, or something else."""
    whole = part = copy.deepcopy(state)
    for key in path[:-1]:
        part = part[key]
    found, how = part[path[-1]], chance.randrange(4)
    if how == 0:
        del part[path[-1]]
    elif how == 1 and isinstance(found, Tensor) and "statistics" not in path:
        part[path[-1]] = chance.choice([found[:-1] if found.ndim else found[None], found.int(), torch.tensor(math.nan)])
    else:
        part[path[-1]] = chance.choice(WRONG)
    return whole


def refusal(act: Callable[..., object], *args: Any, **kwargs: Any) -> str | None:
    """Return the message of the ValueError that this raises; None where it raises none."""
    try:
        act(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return None
