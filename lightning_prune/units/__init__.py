"""Units: what is scored and pruned together, of one weight or of all weights that are coupled."""

from lightning_prune.units.finding import make_units
from lightning_prune.units.units import Units

__all__ = ["Units", "make_units"]
