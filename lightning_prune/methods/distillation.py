"""Distillation: a teacher, such as the model before it was pruned, helps to train the pruned one."""

import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.methods.gradient_injection import Joining, gradient_at, outputs_of
from lightning_prune.methods.teacher import MANY, Teacher, find_layer, warn_if_it_learns
from lightning_prune.training.compat import Callback
from lightning_prune.training.representation import call_text
from lightning_prune.validation import states
from lightning_prune.validation.arguments import integer, number
from lightning_prune.validation.instances import text
from lightning_prune.validation.values import shown

_RULES = {"teacher": states.optional(states.table(states.ANY))}


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0, dim: int = -1) -> Tensor:
    """Return ``T**2 * KL(teacher || student)`` of the distributions softmax(logits / T), in nats.

    The mean over all dimensions but that of the classes. The factor keeps the gradients of one size whatever T is.

    Args:
        student: Logits, any shape.
        teacher: Logits, the same shape.
        temperature: T, above 0; the higher, the more the small probabilities count.
        dim: The dimension of the classes.

    Reference: Hinton et al., 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.

    >>> logits = torch.tensor([[2.0, 0.0]])
    >>> round(divergence(logits, logits).item(), 4), round(divergence(logits, -logits).item(), 4)
    (0.0, 1.5232)
    """
    wanted, found = ((logits / temperature).log_softmax(dim) for logits in (teacher, student))
    return temperature**2 * (wanted.exp() * (wanted - found)).sum(dim).mean()


class Distillation(Callback):
    """Train the model towards the outputs of a teacher, beside its own loss and without a change to its code.

    The gradients become those of ``(1 - weight) * loss + weight * distance``: the loss that ``training_step`` returns
    is left as it is, and the gradient of the distance joins in where it flows back through the model's output. The
    distance is ``divergence`` of the logits, or the mean squared error of the outputs of a ``layer``. The teacher runs
    once for each forward pass of the model, on the same inputs, without gradients and in evaluation mode. It is not
    part of the model: neither its ``state_dict`` nor its optimizers know it. ``distillation/loss`` logs the distance.

    Since only gradients are joined, the value of the loss stays that of ``training_step``: the line search of an LBFGS
    compares values without the distance. In manual optimization, what a ``training_step`` divides its loss by, such as
    a number of batches to accumulate, does not divide the distance: a smaller ``weight`` makes up for it.

    Args:
        teacher: Who teaches: "dense", the model before its first weight is pruned, trained before the run or by then,
            which travels in the checkpoint; or a module that takes the same inputs; or the path of a checkpoint (or
            ``state_dict``) of this model.
        temperature: Divides the logits of both; above 0.
        weight: Share of the distance in the loss, in (0, 1]; with 1 the labels have no say.
        layer: Name, inside the network, of the layer whose output is matched instead of the logits; "" is the network
            itself, for outputs that are no logits.
        network: Name, inside the LightningModule, of the network that ``training_step`` calls where it does not call
            ``self(...)``.
        dim: The dimension of the classes in the logits.

    Raises:
        ValueError: If an argument is out of range; when training starts, if a name, a path or the teacher does not fit
            the model; in the first batch, if the network is not called or its output does not fit the teacher's.

    Reference: Hinton et al., 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531; for layers,
    Romero et al., 2015, "FitNets: Hints for Thin Deep Nets", arXiv:1412.6550.

    >>> Distillation(temperature=4.0).teacher
    'dense'
    """

    def __init__(
        self,
        teacher: str | nn.Module = "dense",
        temperature: float = 2.0,
        weight: float = 0.5,
        layer: str | None = None,
        network: str = "",
        dim: int = -1,
    ) -> None:
        super().__init__()
        if not isinstance(teacher, str | Path | nn.Module):
            raise ValueError(f'teacher must be "dense", a module or the path of a checkpoint, got {shown(teacher)}')
        self.teacher = teacher
        self.temperature = number("temperature", temperature, "(0, inf)")
        self.weight = number("weight", weight, "(0, 1]")
        self.layer = None if layer is None else text("layer", layer, "the name of a layer")
        self.network = text("network", network, "the name of a network inside the model")
        self.dim = integer("dim", dim)
        self._teacher = Teacher(teacher, self.network)
        self._running: weakref.ref[nn.Module] | None = None  # the model of the run that a trainer is in, of any kind
        self._joining: Joining | None = None
        self._backwards = 0
        self._distances: list[Tensor] = []
        self._losses: list[Tensor] = []  # of the dense model, the first ones and the last ones

    @override
    def __repr__(self) -> str:
        return call_text(self)

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(layer=self.layer, network=self.network)

    # ------------------------------------------------------------------------------------------------ teacher

    def on_before_pruning(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the model for the teacher while it is dense; called by the callback that is about to prune it."""
        if self._teacher.watch(pl_module):
            warn_if_it_learns(self._losses)
            self._losses = []

    # ------------------------------------------------------------------------------------------------ lesson

    def _teach(
        self, trainer: Trainer, args: tuple[Any, ...], kwargs: dict[str, Any], found: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the gradients, with respect to the outputs found, of their distance to those of the teacher."""
        teacher = self._teacher.module
        assert teacher is not None
        with torch.no_grad(), outputs_of(teacher.get_submodule(self.layer or "")) as wanted:
            teacher(*args, **kwargs)
        if [output.shape for output in wanted] != [output.shape for output in found]:
            shapes = f"{[tuple(output.shape) for output in wanted]} and {[tuple(output.shape) for output in found]}"
            raise ValueError(f"outputs of teacher and model must have the same shapes, got {shapes}")
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        share = self.weight / len(found) / trainer.accumulate_grad_batches
        gradients = []
        for output, target in zip(found, wanted, strict=True):
            distance, gradient = gradient_at(output, partial(self._distance, wanted=target))
            self._distances.append(distance)
            gradients.append(share * gradient if scaler is None else scaler.scale(share * gradient))
        return gradients

    def _distance(self, found: Tensor, wanted: Tensor) -> Tensor:
        if self.layer is not None:
            return nn.functional.mse_loss(found, wanted.to(found.dtype))
        if found.ndim == 0 or found.shape[self.dim] < 2:
            raise ValueError(
                f"logits must have at least two classes in dimension {self.dim}, got the shape {tuple(found.shape)}: "
                f'layer="" matches outputs that are no logits'
            )
        return divergence(found, wanted.to(found.dtype), self.temperature, self.dim)

    # ------------------------------------------------------------------------------------------------ hooks

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._running = weakref.ref(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._let_go()
        network = find_layer(pl_module, "network", self.network)
        watched = find_layer(network, "layer", self.layer or "")
        self._teacher.appoint(trainer, pl_module)
        if isinstance(self.teacher, nn.Module):
            find_layer(self.teacher, "layer", self.layer or "")
            if {*map(id, self.teacher.parameters())}.intersection(map(id, pl_module.parameters())):
                raise ValueError('teacher must not share parameters with the model: copy it, or use teacher="dense"')

        def active() -> bool:
            return self._teacher.module is not None and bool(trainer.training)

        self._joining = Joining(network, watched, partial(self._teach, trainer), active)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._teacher.module is None:
            self._losses.append(loss.detach().clone())
            del self._losses[MANY:-MANY]
        if self._joining is not None and self._teacher.module is not None and loss.requires_grad:
            self._joining.open = True
            self._backwards += 1
            loss.register_hook(lambda gradient: gradient * (1 - self.weight))

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._joining is not None:
            self._joining.open = False

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        distances, self._distances = self._distances, []
        if self._joining is not None and self._backwards:
            if not self._joining.joined:
                raise ValueError(self._complaint(pl_module))
            name = "distillation/loss" + (f"/{self.layer}" if self.layer else "")
            pl_module.log(name, torch.stack(distances).mean(), on_step=True, on_epoch=False, batch_size=1)
            self._joining.passes = self._joining.joined = self._backwards = 0

    def _complaint(self, pl_module: LightningModule) -> str:
        assert self._joining is not None
        if self._joining.passes:
            return f"the loss must depend on the output that is matched, got no gradient of it (layer={self.layer!r})"
        called = f"self.{self.network}(...)" if self.network else "self(...)"
        names = [name for name, _ in pl_module.named_children()]
        return f"training_step must call {called}, got no call: network names what it calls, such as one of {names}"

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._let_go()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go()
        self._running = None

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go()
        self._running = None

    def _let_go(self) -> None:
        if self._joining is not None:
            self._joining.close()
        self._joining, self._distances, self._losses, self._backwards = None, [], [], 0
        if self._teacher.module is not None:
            self._teacher.module.cpu()

    # ------------------------------------------------------------------------------------------------ state

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"version": states.VERSION, "teacher": self._teacher.saved()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states.check("Distillation", state_dict, _RULES, list(_RULES))
        self._let_go()
        self._teacher.load(state_dict["teacher"], self._running)

    def __getstate__(self) -> dict[str, Any]:
        # a copy keeps the teacher, and nothing that is tied to this process or to the model
        state = {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}
        return {**state, "_joining": None, "_running": None, "_distances": [], "_losses": [], "_backwards": 0}
