"""A model that every parallel layout shards in its own way, and its training on several ranks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from models import QUIET
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

Layout = Literal["one", "ddp", "fsdp", "tp", "fsdp+tp"]
BATCH = 8  # samples an optimizer step, over all ranks


# ------------------------------------------------------------------------------------------------ model


def rank() -> int:
    """Return the rank of this process; 0 where there is one only."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def ranks() -> int:
    """Return the number of processes that belong together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def mesh_size(layout: Layout) -> tuple[int, int]:
    """Return over how many of the ranks data and tensors are parallel."""
    tensors = 2 if "tp" in layout else 1
    return ranks() // tensors, tensors


class Net(LightningModule):
    """Linear layers of 40, 5, 6 and 24 weights, or, where tensors are parallel, of 48, 24, 12 and 9 weights.

    Over two ranks the rows of the first are divided into 3 and 2, and the one row of the second leaves a rank empty.
    Where tensors are parallel, the first is divided by rows, the second by columns, the third is a copy on every rank
    and the last is a plain one. A norm follows the layer in the middle.
    """

    def __init__(self, layout: Layout = "one", tensors: bool = False, samples: int = 64) -> None:
        super().__init__()
        self.layout = layout
        self.tensors = tensors
        self.samples = samples
        self.net: nn.Sequential | None = None

    def configure_model(self) -> None:
        if self.net is not None:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(*(_parallel_layers() if self.tensors else _layers()))
        if self.layout in ("tp", "fsdp+tp"):
            mesh = self.device_mesh["tensor_parallel"]
            parallelize_module(self.net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
            distribute_module(self.net[4], mesh, None, _replicate, _localise)
        if self.layout in ("fsdp", "fsdp+tp"):
            parts = [] if self.tensors else [self.net[0], self.net[-1]]  # the others lie in the group of the root
            for module in (*parts, self.net):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1][:, : self.net[-1].out_features])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(7)
        inputs = torch.randn(self.samples, 8, generator=generator)
        data = TensorDataset(inputs, inputs.sin().cumsum(1))
        copies, tensors = mesh_size(self.layout)
        # in the order of the ranks: the samples of one step together are those that a single process has in it
        sampler = DistributedSampler(data, copies, rank() // tensors, shuffle=False)
        return DataLoader(data, BATCH // copies, sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        return self.train_dataloader()


def _layers() -> list[nn.Module]:
    behind = [nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4)]
    return [nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1, bias=False), nn.Linear(1, 6), *behind]


def _parallel_layers() -> list[nn.Module]:
    behind = [nn.LayerNorm(4), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)]
    return [nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4), *behind]


def _replicate(module: nn.Module, inputs: tuple[Tensor], mesh: Any) -> DTensor:
    return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)


def _localise(module: nn.Module, output: DTensor, mesh: Any) -> Tensor:
    return output.to_local().clone()  # FSDP2 warns of views


def build(layout: Layout, tensors: bool = False) -> Net:
    """Return a model without a Trainer, in its layout."""
    model = Net(layout, tensors)
    if layout in ("fsdp", "tp", "fsdp+tp"):
        names = ("data_parallel", "tensor_parallel")
        model._device_mesh = init_device_mesh("cpu", mesh_size(layout), mesh_dim_names=names)
    model.configure_model()
    return model


def strategy(layout: Layout, sharded: bool = True) -> Strategy | str:
    """Return Lightning's strategy for a layout.

    Args:
        layout: How the model lies on the ranks.
        sharded: Whether each rank saves its own piece of a checkpoint.
    """
    if layout == "one":
        return "auto"
    if layout == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    size = mesh_size(layout)
    return ModelParallelStrategy(*size, save_distributed_checkpoint=sharded, process_group_backend="gloo")


def fit(
    model: Net, *callbacks: Callback, sharded: bool = True, ckpt_path: Path | None = None, **trainer_kwargs: Any
) -> Trainer:
    """Fit a model in the layout that it asks for; every rank has to call this."""
    settings = {
        **QUIET,
        "max_epochs": 1,
        "limit_val_batches": 0,
        "devices": ranks(),
        "strategy": strategy(model.layout, sharded),
        "use_distributed_sampler": False,
        **trainer_kwargs,
    }
    trainer = Trainer(**settings, callbacks=list(callbacks))
    trainer.fit(model, ckpt_path=ckpt_path)
    return trainer


# ------------------------------------------------------------------------------------------------ results


def reshard(model: nn.Module) -> None:
    """Put every parameter that a forward pass has put together back in pieces."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """Return a copy of a parameter with the pieces of all ranks."""
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor.clone()


def whole_mask(mask: Tensor, parameter: Tensor) -> Tensor:
    """Return the mask of which every rank holds a piece, as torch puts the pieces of the parameter together."""
    if not isinstance(parameter, DTensor):
        return mask.clone()
    assert mask.shape == parameter.to_local().shape
    spread = DTensor.from_local(
        mask, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )
    return spread.full_tensor()


def result(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the weights and masks of all ranks together."""
    reshard(model)
    parameters = dict(model.named_parameters())
    return {
        "weights": {name: whole(parameter) for name, parameter in parameters.items()},
        "masks": {name: whole_mask(mask, parameters[name]) for name, mask in masks.items()},
    }
