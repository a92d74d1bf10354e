"""Examples: the inputs with which a training step calls its model, seen on a copy that nothing is left of."""

import copy
import inspect
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.compile import to_uncompiled
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_prune.models.copying import copied
from lightning_prune.models.forward import Inputs, inputs_of
from lightning_prune.models.preserving import eager


class _SeenError(Exception):
    """Ends a training step as soon as its inputs are known."""


def inputs_of_step(pl_module: LightningModule, batch: Any) -> Inputs:
    """Return the inputs with which ``training_step`` calls ``self``; failing that, the first part of the batch.

    Optimization by hand is not tried: it steps the optimizers of the model itself.

    Args:
        pl_module: The model, which is left as it is.
        batch: A batch of training.
    """
    seen: list[Inputs] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(_arguments(module, args, kwargs))
        raise _SeenError

    if pl_module.automatic_optimization:
        # suppressed inside of the others, since isolate_rng restores nothing after an error
        with isolate_rng(), eager(), torch.no_grad(), suppress(Exception):  # it runs the code of the user
            model: Any = silent_copy(pl_module)
            model.register_forward_pre_hook(look, with_kwargs=True)
            index = (0,) if len(inspect.signature(model.training_step).parameters) > 1 else ()
            model.training_step(copy.deepcopy(batch), *index)
    return seen[0] if seen else inputs_of(batch)


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """Return the arguments of a call as example inputs: a tuple of positional ones, or a dict."""
    if not kwargs:
        return args
    return {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs}


def silent_copy(pl_module: LightningModule) -> LightningModule:
    """Return a copy that logs nothing."""
    model = copied(pl_module)
    with suppress(ValueError):  # it is not compiled; the compiled methods are those of the module that was copied
        model = to_uncompiled(model)
    model.trainer = pl_module.trainer
    for module in model.modules():
        if hasattr(type(module), "log_dict"):  # a LightningModule, of either namespace
            vars(module).update(log=_nothing, log_dict=_nothing)
    return model


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Log nothing."""
