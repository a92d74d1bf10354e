"""Units: what is scored and pruned together, of one weight or of all weights that are coupled."""

from lightning_prune.units.units import Units, make_units

__all__ = ["Units", "make_units"]
