"""Building: a model from its class, from a function that builds it, or as it is."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import nn

from lightning_prune.validation.values import shown

Model = TypeVar("Model", bound=nn.Module)


def check_builds(model: object) -> None:
    """Reject what is neither a model nor builds one.

    Raises:
        TypeError: If it is not.
    """
    if not callable(model):
        raise TypeError(f"model must be a class, a function that builds a model, or a model, got {shown(model)}")


def built(model: Model | Callable[..., Model], **kwargs: Any) -> Model:
    """Return a model that is given, or what a class or a function returns for these arguments.

    Raises:
        TypeError: If that is no model.

    >>> built(nn.Linear, in_features=2, out_features=1)
    Linear(in_features=2, out_features=1, bias=True)
    """
    found = model if isinstance(model, nn.Module) else model(**kwargs)
    if not isinstance(found, nn.Module):
        raise TypeError(f"model must return a Module, got {shown(model)}, which returned {shown(found)}")
    return cast(Model, found)
