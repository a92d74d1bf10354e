"""Holding: parameters stay at their masks, because every optimizer applies them right after its step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_prune.tensors.distributed import local
from lightning_prune.tensors.masking import by_row, zero_pruned

_ENTRYWISE = (
    *(torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax),
    *(torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.Rprop, torch.optim.ASGD),
)
_TORCH = tuple(found for found in vars(torch.optim).values() if isinstance(found, type) and found is not Optimizer)
_ZERO_AT_FIRST = (
    *("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg"),
    *("acc_delta", "ax", "prev", "variance"),
)
# the first of these options of a group that it has; a scheduler may have changed the learning rate since
_OPTION_AT_FIRST = {"sum": ("initial_accumulator_value",), "step_size": ("initial_lr", "lr")}


class Holding:
    """Masks in force: on the parameters, after each step of the optimizers, and on gradients.

    Attributes:
        stepped: Whether an optimizer has stepped since somebody set this to False.
    """

    def __init__(self) -> None:
        self.stepped = False
        self._masks: dict[int, Tensor] = {}
        self._parameters: list[nn.Parameter] = []
        self._handles: dict[int, tuple[Optimizer, list[RemovableHandle]]] = {}

    def hold(self, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        """Put masks in force for these parameters (by name), and apply them now."""
        self._parameters = [parameters[name] for name in masks]
        self._masks = {id(parameters[name]): by_row(mask) for name, mask in masks.items()}
        self.apply()

    def holds(self, parameters: Sequence[nn.Parameter | None]) -> bool:
        """Return whether these very parameters are held, in this order."""
        return list(map(id, parameters)) == list(map(id, self._parameters))

    def apply(self) -> None:
        """Apply the masks to all parameters, also those that no optimizer has."""
        zero_pruned((local(parameter), mask) for parameter, mask in self._held())

    def change(self, masks: Mapping[nn.Parameter, Tensor]) -> None:
        """Replace the masks of some parameters from their next application on."""
        self._masks.update({id(parameter): mask for parameter, mask in masks.items()})

    def attach(
        self,
        optimizer: Optimizer,
        before: Callable[[Optimizer], None] | None = None,
        after: Callable[[Optimizer], None] | None = None,
    ) -> None:
        """Apply the masks after every step of this optimizer; idempotent.

        Args:
            optimizer: As torch knows it, without wrappers.
            before: What to do before every step, for training loops in which gradients exist when it begins.
            after: What to do right after every step, before the masks are applied; it may be called twice.

        Raises:
            TypeError: If the optimizer was not set up as a torch optimizer.
        """
        if id(optimizer) in self._handles:
            return
        try:
            handles = []
            if after is not None:
                handles.append(optimizer.register_step_post_hook(lambda stepped, args, kwargs: after(stepped)))
            handles.append(optimizer.register_step_post_hook(self._after_step))
            if before is not None:
                handles.append(optimizer.register_step_pre_hook(lambda stepping, args, kwargs: before(stepping)))
        except AttributeError as error:
            raise TypeError(
                f"optimizer must be set up by torch.optim.Optimizer.__init__, got {type(optimizer).__name__} without it"
            ) from error
        self._handles[id(optimizer)] = (optimizer, handles)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # its own parameters only: others may be part of a graph that is still to be differentiated. Counts nothing,
        # since it can fire twice in one step, or for a step that changed nothing.
        self.stepped = True
        zero_pruned((local(parameter), mask) for parameter, mask in self._of(optimizer))

    def mask_gradients(self, optimizer: Optimizer | None = None) -> None:
        """Zero the gradients of pruned entries: they must not count in a norm, nor in the line search of LBFGS.

        Args:
            optimizer: Of whose parameters; None means all.
        """
        held = self._held() if optimizer is None else self._of(optimizer)
        zero_pruned(_gradient(p.grad, m) for p, m in held if p.grad is not None)

    def release(self) -> None:
        """Apply the masks once more and remove every hook; idempotent."""
        self.apply()
        for _, handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles.clear()
        self._parameters, self._masks = [], {}

    def _held(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        return ((parameter, self._masks[id(parameter)]) for parameter in self._parameters)

    def _of(self, optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for group in optimizer.param_groups:  # read anew each time: groups may be added while training
            for parameter in group["params"]:
                mask = self._masks.get(id(parameter))
                if mask is not None:
                    yield parameter, mask


def _gradient(gradient: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the entries of a gradient and of its mask; of a sparse one, as embeddings give, those of its rows."""
    if gradient.layout != torch.sparse_coo:
        return local(gradient), mask
    return gradient._values(), mask[tuple(gradient._indices())]


def parameter_ids(optimizer: Optimizer) -> set[int]:
    """Return the ids of the parameters that an optimizer steps."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def entrywise(optimizer: Optimizer) -> bool:
    """Return whether an optimizer steps every entry of a parameter by itself, whatever the gradients of the others."""
    return type(optimizer) in _ENTRYWISE


def forget_entries(optimizer: Optimizer, parameter: nn.Parameter, changed: Tensor) -> None:
    """Reset what an optimizer remembers of the entries of a parameter where ``changed`` (bool): they start afresh.

    Optimizers of torch have the entries that they begin with. Of other optimizers only averages of gradients and copies
    of weights are reset, to zero: what else they keep may be a divisor. LBFGS forgets everything, since its curvature
    under other masks would lead pruned weights away from zero.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.state.clear()
        return
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
            fresh = _initial(optimizer, parameter, key, local(value))
            if fresh == 0.0:
                zero_pruned([(local(value), ~changed)])
            elif fresh is not None:
                local(value).masked_fill_(changed, fresh)


def _initial(optimizer: Optimizer, parameter: nn.Parameter, key: str, value: Tensor) -> float | None:
    """Return what entries of the state of an optimizer begin with; None if nobody knows."""
    if isinstance(optimizer, _TORCH) and key in _ZERO_AT_FIRST:
        return 0.0
    if isinstance(optimizer, _TORCH) and key in _OPTION_AT_FIRST:
        group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        return float(next(group[option] for option in _OPTION_AT_FIRST[key] if option in group))
    # mean squares, step sizes and the like are never negative, and a preconditioner is a symmetric matrix
    averages = value.numel() > 0 and bool(value.min() < 0) and not _is_symmetric(value)
    return 0.0 if averages else None


def _is_symmetric(matrix: Tensor) -> bool:
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
    return square and torch.allclose(matrix, matrix.T, rtol=1e-3, atol=1e-3 * float(matrix.abs().max()))


def forget_momentum(optimizer: Optimizer) -> None:
    """Zero the momentum, or the running mean of the gradients, of all parameters of an optimizer."""
    for state in optimizer.state.values():
        for key in ("momentum_buffer", "exp_avg"):
            if isinstance(state.get(key), Tensor):
                local(state[key]).zero_()
