"""What is compared on the Cubist Spiral: methods of this package, other libraries, and what the paper found."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cubist import DENSE, WIDTH, on_paths
from lightning import LightningModule, Trainer
from methods import METHODS
from peers import TorchPruning
from torch import Tensor, nn

from lightning_prune import SNIP, Criterion, LotteryTicket, MagnitudePruning, PruningAtInit, Units

TARGETS = (95.0, 99.5)  # accuracy in percent
LEVELS = (20, 26, 33, 40, 50, 65, 90, 130)  # weights that stay, of 560
NEURONS = {2 * width * width + 3 * width: width for width in (2, 3, 4, 5, 6, 7, 8)}  # in each hidden layer, of 16
BEGIN = 50  # the search for the least number of weights begins there
SMALL = {"dense, 3-3-3": (3, 3, 3), "dense, 7-3-3": (7, 3, 3)}  # the smallest that the paper found for the two targets
ROUNDS = 4  # of lottery tickets, so five trainings as in the paper


@dataclass(frozen=True)
class OnPaths(Criterion):
    """The magnitude of a weight, and zero without a path through it from an input to the output.

    Args:
        layers: The weights of a network by name, in the order of its layers.
    """

    layers: dict[str, nn.Parameter] = field(default_factory=dict, repr=False)

    def scores(self, units: Units) -> Tensor:
        """Return the scores of the weights of one layer."""
        used = on_paths([weight.detach() for weight in self.layers.values()])
        mine = used[list(self.layers).index(units.name)]
        return units.mean(lambda weight: weight.abs() * mine)


class PathPruning(MagnitudePruning):
    """Gradual magnitude pruning in which weights without a path go first."""

    def __init__(self, sparsity: float) -> None:
        super().__init__(sparsity)
        self.criterion = OnPaths()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Show the criterion the network."""
        found = {name: weight for name, weight in pl_module.named_parameters() if weight.ndim > 1}
        self.criterion.layers.update(found)
        super().setup(trainer, pl_module, stage)


OWN: dict[str, Callable[[float, int], Any]] = {
    "gradual, on paths": lambda sparsity, seed: PathPruning(sparsity),
    "SNIP, 100 rounds": lambda sparsity, seed: PruningAtInit(sparsity, SNIP(), rounds=100),
    "LotteryTicket": lambda sparsity, seed: LotteryTicket(sparsity, ROUNDS),
    "LotteryTicket, learning rate": lambda sparsity, seed: LotteryTicket(sparsity, ROUNDS, "learning_rate"),
    "Torch-Pruning, neurons": lambda sparsity, seed: TorchPruning(sparsity, (2,)),
}
BOTH = {**METHODS, **OWN}
GRADUAL = ("gradual", "gradual, ERK", "gradual, uniform", "gradual, LAMP", "gradual, Fisher", "gradual, on paths")
FROM_START = ("SNIP", "SNIP, 100 rounds", "GraSP", "SynFlow", "RigL", "SET")
TICKETS = ("LotteryTicket", "LotteryTicket, learning rate")
RANDOM = ("static", "one-shot, random")
OTHERS = ("ModelPruning, gradual", "fasterai, gradual", "torch.nn.utils.prune, one-shot", "Torch-Pruning, neurons")
NAMES = (*GRADUAL, "one-shot", "ADMM", "ACDC", *FROM_START, *OTHERS, "neurons, L2", *RANDOM, *TICKETS)


def levels_of(method: str) -> tuple[int, ...]:
    """Return the numbers of weights to which a method prunes, from few to many."""
    return tuple(NEURONS) if "neurons" in method else LEVELS


def sparsity_of(method: str, weights: int) -> float:
    """Return the fraction of weights, or of the neurons of each layer, that goes so that this many weights stay."""
    return 1 - NEURONS[weights] / WIDTH if "neurons" in method else 1 - weights / DENSE
