"""Parts: what is left of the dimensions of parameters, when so many units of each target stay."""

from collections.abc import Mapping

from lightning_prune.units.units import Units

Place = tuple[str, int]  # the name of a parameter, and one of its dimensions
Parts = Mapping[Place, float]  # what is left of each, 0 to 1; all of those that are not named
Shares = Mapping[str, Mapping[Place, float]]  # by name of a target: the part of each that one unit takes


def parts_left(units: Mapping[str, Units], shares: Shares, keep: Mapping[str, int]) -> dict[Place, float]:
    """Return what is left of each dimension, 0 to 1, when so many units of each target stay."""
    parts: dict[Place, float] = {}
    for name, unit in units.items():
        for place, share in shares[name].items():
            parts[place] = parts.get(place, 1.0) - share * (unit.size - keep[name])
    return parts
