"""How else masks could be applied after a step: `python examples/benchmarks/mask_application.py`.

Optimizer steps on linear layers of 6 M weights, whose gradients stay the same, alternating in one process: without
masks, and with those of 90 % of the weights, applied in three ways. The package applies them after the whole step. Or
torch.compile makes the code that does. Or each tensor is masked right after its own part of the step, while it is in
the cache, for which every tensor needs an optimizer of its own. The clock is CPU time on one thread.

The table of docs/overhead.md is written from results/mask_application.json.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from marked import replace, table
from timing import alternate, describe, parser, quiet, ratio, write
from torch import Tensor, nn

from lightning_prune import prune
from lightning_prune.training.enforcement import MaskEnforcement

NAME = "mask_application"
PAGE = Path(__file__).parents[2] / "docs" / "overhead.md"
WAYS = ("after the step", "compiled", "tensor by tensor")
SIZES = {"12 layers of 0.5 M": (12, 724), "3 layers of 2 M": (3, 1414)}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD with momentum": partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    "Adam": partial(torch.optim.Adam, lr=1e-3),
    "Adam, fused": partial(torch.optim.Adam, lr=1e-3, fused=True),
}


def model_of(layers: int, width: int) -> nn.Module:
    """Return linear layers with gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def held(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Callable[[], None]:
    """Return a step of optimizers that apply masks as the package does."""
    enforcement = MaskEnforcement()
    enforcement.enforce(dict(model.named_parameters()), prune(model, 0.9))
    for optimizer in optimizers:
        enforcement.attach(optimizer)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return step


def compiled(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Return a step whose masks are applied by compiled code."""
    masks = prune(model, 0.9)
    pairs = [(parameter.detach(), masks[name]) for name, parameter in model.named_parameters()]

    @torch.compile
    def apply(weights: list[Tensor], kept: list[Tensor]) -> None:
        for weight, mask in zip(weights, kept, strict=True):
            weight.mul_(mask)

    weights, kept = map(list, zip(*pairs, strict=True))
    optimizer.register_step_post_hook(lambda *args: apply(weights, kept))
    return lambda: stepped(optimizer)


def stepped(optimizer: torch.optim.Optimizer) -> None:
    """Step."""
    optimizer.step()


def ways(layers: int, width: int, make: Callable[..., torch.optim.Optimizer]) -> dict[str, Callable[[], None]]:
    """Return a step with each way to apply the masks."""
    models = [model_of(layers, width) for _ in range(4)]
    alone = [make([parameter]) for parameter in models[3].parameters()]
    dense = make(models[0].parameters())
    return {
        "dense": lambda: stepped(dense),
        "after the step": held(models[1], [make(models[1].parameters())]),
        "compiled": compiled(models[2], make(models[2].parameters())),
        "tensor by tensor": held(models[3], alone),
    }


def main() -> None:
    """Keep the ratios to a dense step, and write the table."""
    rounds = parser(__doc__ or "").parse_args().rounds or 40
    quiet()
    torch.set_num_threads(1)
    rows = []
    for size, (layers, width) in SIZES.items():
        for name, make in OPTIMIZERS.items():
            seconds = alternate(ways(layers, width, make), rounds)
            row = {"model": size, "optimizer": name, "dense ms": round(1e3 * median(seconds["dense"]), 2)}
            row |= {way: round(ratio(found, seconds["dense"]), 3) for way, found in seconds.items() if way != "dense"}
            rows.append(row)
            print(row, flush=True)
    machine = describe(write(NAME, False, rows)["machine"])
    cells = [[str(row["model"]), str(row["optimizer"]), *(f"{row[way]:.2f}" for way in WAYS)] for row in rows]
    found = table(["model", "optimizer", *WAYS], cells)
    replace(PAGE, NAME, f"{found}\n\nMeasured on {machine}.")


if __name__ == "__main__":
    main()
