"""Output neurons: those of the last layers are what a model returns, and are left out unless they are named."""

from collections.abc import Sequence

from torch import nn

from lightning_prune.granularities import Granularity
from lightning_prune.models.outputs import output_weights
from lightning_prune.models.parameters import weights_of
from lightning_prune.units.pooled import PooledUnits
from lightning_prune.units.units import Units

UNKNOWN = (
    "which layers make the outputs of the model is unknown, since it cannot be traced, so their neurons may be pruned: "
    "ignore those layers, or name the others in targets"
)


def without_outputs(
    units: Sequence[Units], model: nn.Module, granularity: Granularity
) -> tuple[list[Units], dict[str, str], bool]:
    """Return the units that are no outputs of a model, why the others are left out, and whether outputs are known.

    Coupled units never are outputs. All stay in a model of a single layer.

    Raises:
        ValueError: If there are no other units, nor frozen weights that may have some later.

    >>> from lightning_prune.granularities import Channel
    >>> from lightning_prune.models.parameters import find
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> units, _ = Channel().find_units(find(model), model)
    >>> [unit.name for unit in without_outputs(units, model, Channel())[0]]
    ['0.weight']
    """
    separate = [unit for unit in units if isinstance(unit, PooledUnits)]
    weights = set(weights_of(model))
    if not granularity.follows or len(weights) < 2 or not separate:
        return list(units), {}, True
    made = output_weights(model)
    if made is None:
        return list(units), {}, False
    outputs = {unit.name: "its neurons are outputs of the model" for unit in separate if unit.parameter in made}
    left = [unit for unit in units if unit.name not in outputs]
    frozen = any(not weight.requires_grad for weight in weights - made)
    if not left and not frozen:
        raise ValueError(
            f"targets must name {list(outputs)[:5]} to prune the outputs of the model, since {granularity} finds no "
            f"other unit, got none: or prune single weights, with Weight()"
        )
    return left, outputs, True
