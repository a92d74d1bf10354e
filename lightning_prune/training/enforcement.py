"""Mask enforcement: parameters stay at their masks, because every optimizer applies them right after its step."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_prune.tensors.distributed import local
from lightning_prune.tensors.masking import by_row, zero_pruned

_ELEMENTWISE = (
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


class MaskEnforcement:
    """Keeps parameters at their masks: now, after each step of the optimizers, and in gradients.

    A copy enforces nothing, since the parameters and the optimizers are not copied.

    Attributes:
        stepped: Whether an optimizer has stepped since somebody set this to False.
    """

    def __init__(self) -> None:
        self.stepped = False
        self._masked: dict[int, tuple[nn.Parameter, Tensor]] = {}  # by the id of the parameter
        self._hooks: dict[int, tuple[Optimizer, list[RemovableHandle]]] = {}

    def __reduce__(self) -> tuple[type["MaskEnforcement"], tuple[()]]:
        return MaskEnforcement, ()

    def enforce(self, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        """Enforce masks on these parameters (by name) from now on."""
        self._masked, pairs = {}, []
        for name, mask in masks.items():
            parameter, rows = parameters[name], by_row(mask)
            self._masked[id(parameter)] = (parameter, rows)
            pairs.append((local(parameter), rows))
        zero_pruned(pairs)

    def covers(self, parameters: Sequence[nn.Parameter | None]) -> bool:
        """Return whether these very parameters are masked, in this order."""
        return list(map(id, parameters)) == list(self._masked)

    def apply(self) -> None:
        """Apply the masks to all parameters, also those that no optimizer has."""
        zero_pruned([(local(parameter), mask) for parameter, mask in self._masked.values()])

    def replace(self, masks: Mapping[nn.Parameter, Tensor]) -> None:
        """Replace the masks of some parameters from their next application on."""
        for parameter, mask in masks.items():
            self._masked[id(parameter)] = (parameter, mask)

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
        if id(optimizer) in self._hooks:
            return
        try:
            handles = []
            if after is not None:
                handles.append(optimizer.register_step_post_hook(lambda stepped, args, kwargs: after(stepped)))
            handles.append(optimizer.register_step_post_hook(self.after_step))
            if before is not None:
                handles.append(optimizer.register_step_pre_hook(lambda stepping, args, kwargs: before(stepping)))
        except AttributeError as error:
            raise TypeError(
                f"optimizer must be set up by torch.optim.Optimizer.__init__, got {type(optimizer).__name__} without it"
            ) from error
        self._hooks[id(optimizer)] = (optimizer, handles)

    def after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Apply the masks to the parameters of an optimizer that has stepped: its post-step hook.

        Counts nothing, since it can be called twice in one step, or for a step that changed nothing.
        """
        # its own parameters only: others may be part of a graph that is still to be differentiated
        self.stepped = True
        zero_pruned((local(parameter), mask) for parameter, mask in self._of(optimizer))

    def mask_gradients(self, optimizer: Optimizer | None = None) -> None:
        """Zero the gradients of pruned elements: they must not count in a norm, nor in the line search of LBFGS.

        Args:
            optimizer: Of whose parameters; None means all.
        """
        masked = self._masked.values() if optimizer is None else self._of(optimizer)
        zero_pruned(_gradient(p.grad, m) for p, m in masked if p.grad is not None)

    def release(self) -> None:
        """Apply the masks once more and remove every hook; idempotent."""
        self.apply()
        for _, handles in self._hooks.values():
            for handle in handles:
                handle.remove()
        self._hooks, self._masked = {}, {}

    def _of(self, optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for group in optimizer.param_groups:  # looked up each time: groups may be added while training
            for parameter in group["params"]:
                if id(parameter) in self._masked:
                    yield self._masked[id(parameter)]


def _gradient(gradient: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the elements of a gradient and of its mask; of a sparse one, as embeddings give, those of its rows."""
    if gradient.layout != torch.sparse_coo:
        return local(gradient), mask
    return gradient._values(), mask[tuple(gradient._indices())]


def parameter_ids(optimizer: Optimizer) -> set[int]:
    """Return the ids of the parameters that an optimizer steps."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def is_elementwise(optimizer: Optimizer) -> bool:
    """Return whether an optimizer steps every element by its own gradient alone."""
    return type(optimizer) in _ELEMENTWISE


def reset_changed(
    optimizers: Iterable[Optimizer],
    parameters: Mapping[str, nn.Parameter],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
) -> None:
    """Reset the optimizers' state of the elements that come or go with new masks; with a first mask, those that go."""
    for name, mask in after.items():
        changed = mask ^ before[name] if name in before else ~mask
        for optimizer in optimizers if changed.any() else ():
            reset_elements(optimizer, parameters[name], changed)


def reset_elements(optimizer: Optimizer, parameter: nn.Parameter, changed: Tensor) -> None:
    """Reset the optimizer's state of the elements of a parameter where ``changed`` (bool).

    Optimizers of torch get the values that they start with. Of other optimizers only averages of gradients and copies
    of weights are reset, to zero: what else they keep may be a divisor. The state of LBFGS is cleared, since its
    curvature under other masks would lead pruned weights away from zero.
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
    """Return what elements of the state of an optimizer start with; None if that is unknown."""
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


def reset_momentum(optimizer: Optimizer) -> None:
    """Zero the momentum, or the running mean of the gradients, of all parameters of an optimizer."""
    for state in optimizer.state.values():
        for key in ("momentum_buffer", "exp_avg"):
            if isinstance(state.get(key), Tensor):
                local(state[key]).zero_()
