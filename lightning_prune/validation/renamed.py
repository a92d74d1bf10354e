"""Renamed arguments: what an argument of another library is called here."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")

_ELSEWHERE = {"amount": "sparsity"}  # in torch.nn.utils.prune and Lightning's ModelPruning


def explain_renamed(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Return a function whose error for an argument that is called otherwise here says so.

    >>> @explain_renamed
    ... def halve(model, sparsity=0.5):
    ...     return sparsity
    >>> halve(None, amount=0.9)
    Traceback (most recent call last):
    TypeError: halve() got an unexpected keyword argument 'amount': it is called sparsity here
    """
    known = inspect.signature(function).parameters
    names = {name: here for name, here in _ELSEWHERE.items() if here in known and name not in known}
    if not names:
        return function

    @wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        for name in names.keys() & kwargs.keys():
            unexpected = f"{function.__qualname__}() got an unexpected keyword argument {name!r}"
            raise TypeError(f"{unexpected}: it is called {names[name]} here")
        return function(*args, **kwargs)

    return call
