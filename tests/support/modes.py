"""What the tests of ways to train share: a probe that looks into every forward pass, models of every kind, a loader
that resumes inside an epoch, and the end that every run must come to."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Channel, Entropy, Magnitude, Sensitivity

BATCHES, BATCH = 6, 4  # training batches an epoch, samples a batch
ADAM = partial(torch.optim.Adam, lr=0.01)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)

# a criterion of each kind: one that looks at the weights, one at the gradients, one at the forward passes
KINDS: dict[str, dict[str, Any]] = {
    "weights": {"criterion": Magnitude()},
    "gradients": {"criterion": Sensitivity(window=2), "granularity": Channel()},
    "forwards": {"criterion": Entropy(window=2), "granularity": Channel()},
}
# five updates at the steps 2, 4, 6, 8, 10 of 12, each after a window of two steps
GRADUAL: dict[str, Any] = {"sparsity": 0.5, "schedule": "linear", "start": 0, "end": 10, "frequency": 2}


def samples(size: tuple[int, ...], count: int = BATCHES * BATCH) -> TensorDataset:
    """Return fixed random inputs of a size, and a number to predict for each."""
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(count, *size, generator=generator)
    return TensorDataset(inputs, inputs.flatten(1)[:, :2].sum(1, keepdim=True))


class Regression(LightningModule):
    """Any network: every output is to be the number that belongs to the sample."""

    def __init__(
        self,
        net: nn.Module | None,
        size: tuple[int, ...] = (6,),
        optimizer: Callable[..., Optimizer] = ADAM,
    ) -> None:
        super().__init__()
        self.net = net
        self.size = size
        self.make_optimizer = optimizer
        self.batch_size = BATCH

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return (self(batch[0]).flatten(1) - batch[1]).square().mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(samples(self.size), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(samples(self.size, BATCH), batch_size=BATCH)

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()


def mlp() -> nn.Sequential:
    """Return linear layers of 48, 64 and 32 weights, with a norm."""
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters under the names that they have without ``torch.compile``."""
    return {name.replace("_orig_mod.", ""): parameter for name, parameter in model.named_parameters()}


class Probe:
    """While it is open, looks at the weights before every forward pass of every module.

    Attributes:
        forwards: How many forward passes it has seen.
        levels: The sparsity that the masks of all callbacks had, at each change.
        dense: The parameters that were seen with a weight that their mask prunes.
    """

    def __init__(self, model: nn.Module, *callbacks: Callback) -> None:
        self.model = model
        self.callbacks = callbacks
        self.forwards = 0
        self.levels: list[float] = []
        self.dense: set[str] = set()
        self._seen: list[Any] = []  # the masks of all callbacks, and what they prune
        self._pruned: dict[str, Tensor] = {}

    def __enter__(self) -> "Probe":
        self._handle = torch_module.register_module_forward_pre_hook(self._look)
        return self

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()

    @torch.compiler.disable
    @torch.no_grad()
    def _look(self, module: nn.Module, inputs: Any) -> None:
        self.forwards += 1
        if not self._seen or any(new.masks is not old for new, old in zip(self.callbacks, self._seen, strict=True)):
            self._masks_changed()
        parameters = plain_parameters(self.model)
        self.dense |= {name for name, pruned in self._pruned.items() if parameters[name][pruned].any()}

    def _masks_changed(self) -> None:
        self._seen = [callback.masks for callback in self.callbacks]
        self._pruned = {name: ~mask for masks in self._seen for name, mask in masks.items()}
        level = sum(map(int, map(torch.sum, self._pruned.values()))) / max(
            1, sum(map(torch.numel, self._pruned.values()))
        )
        if not self.levels or level != self.levels[-1]:
            self.levels.append(level)

    def assert_sparse(self, updates: int = 2) -> None:
        """No forward pass saw a weight that its mask prunes, and the masks changed this often at least."""
        assert not self.dense, self.dense
        assert self.forwards > 0, "no forward pass"
        assert self.levels == sorted(self.levels), self.levels
        assert len(self.levels) > updates, self.levels


def _channels_alive(model: nn.Module, name: str, weight: Tensor) -> Tensor:
    owner = model.get_submodule(name.rpartition(".")[0])
    dim = int(isinstance(owner, nn.modules.conv._ConvTransposeNd))
    return weight.movedim(dim, 0).flatten(1).any(1)


def assert_pruned(model: nn.Module, callback: Any, sparsity: float = 0.5) -> None:
    """Exactly round(sparsity * n) units of the targets are zero, those that the masks say, and nothing is NaN."""
    parameters = {name: parameter.detach() for name, parameter in plain_parameters(model).items()}
    assert all(parameter.isfinite().all() for parameter in parameters.values())
    masks = callback.masks
    pruned_entries = {name: parameters[name][~mask] for name, mask in masks.items()}
    assert not [name for name, entries in pruned_entries.items() if entries.any() or entries.signbit().any()]
    targets = {name: parameters[name] for name in masks if masks[name].ndim >= 2}
    for name, weight in targets.items():
        assert torch.equal(weight != 0, masks[name]), name
    total = sum(weight.numel() for weight in targets.values())
    pruned = sum(int((weight == 0).sum()) for weight in targets.values())
    assert abs(callback.sparsity_now - pruned / total) < 1e-6, (callback.sparsity_now, pruned / total)
    if isinstance(getattr(callback, "granularity", None), Channel):
        alive = torch.cat([_channels_alive(model, name, weight) for name, weight in targets.items()])
        total, pruned = alive.numel(), int((~alive).sum())
    assert pruned == round(sparsity * total), (pruned, total)


def assert_masked(model: nn.Module, callback: Any, sparsity: float = 0.5) -> None:
    """Masks prune exactly round(sparsity * n) weights, which are zero; one that is kept may still be zero, too."""
    parameters = {name: parameter.detach() for name, parameter in plain_parameters(model).items()}
    assert all(parameter.isfinite().all() for parameter in parameters.values())
    assert not [name for name, mask in callback.masks.items() if parameters[name][~mask].any()]
    total = sum(mask.numel() for mask in callback.masks.values())
    pruned = sum(int((~mask).sum()) for mask in callback.masks.values())
    assert pruned == round(sparsity * total) == round(callback.sparsity_now * total)


def leftovers(model: nn.Module, *optimizers: Optimizer) -> list[str]:
    """Return every hook on the modules, the parameters, the optimizers, and on all modules and optimizers at large."""
    modules = {f"module {name}": module for name, module in model.named_modules()}
    stepping = {f"optimizer {i}": optimizer for i, optimizer in enumerate(optimizers)}
    at_large = {"torch.nn": torch_module, "torch.optim": torch_optimizer}
    found = [
        f"{where}: {attribute}"
        for where, owner in {**modules, **stepping, **at_large}.items()
        for attribute, hooks in vars(owner).items()
        if attribute.endswith("_hooks") and isinstance(hooks, Mapping) and hooks
    ]
    for name, parameter in model.named_parameters():
        found += [f"parameter {name}"] if parameter._backward_hooks or parameter._post_accumulate_grad_hooks else []
    return found


def assert_nothing_left(trainer: Trainer, model: nn.Module, keys: list[str]) -> None:
    """No hook is left, and the state_dict has the plain model's keys."""
    found = leftovers(model, *trainer.optimizers)
    assert not found, found
    assert list(model.state_dict()) == keys, list(model.state_dict())


class StatefulLoader:
    """Batches in another order every epoch, from a place that it saves, so that a run resumes inside an epoch.

    Lightning says which epoch it is through a sampler, and restores the state only inside an epoch.
    """

    def __init__(self, size: tuple[int, ...] = (6,), batches: int = 4) -> None:
        self.data = samples(size, batches * BATCH).tensors
        self.batches = batches
        self.sampler = self
        self.epoch = 0
        self.place = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[Tensor]]:
        self.place %= self.batches
        generator = torch.Generator().manual_seed(self.epoch)
        order = torch.randperm(self.batches * BATCH, generator=generator).view(self.batches, BATCH)
        while self.place < self.batches:
            self.place += 1
            yield [tensor[order[self.place - 1]] for tensor in self.data]

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.place = state_dict["place"]
