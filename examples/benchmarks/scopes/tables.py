"""The tables of the comparison of scopes, from the runs that are there."""

from collections.abc import Mapping, Sequence
from typing import Any

from marked import spread, table
from variants import CRITERIA, SCOPES

Runs = Mapping[tuple[Any, ...], float]
KEY = ("data", "criterion", "network", "level", "variant", "seed")


def make_tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table for each criterion and set of images of which at least two seeds have been run completely."""
    runs = {tuple(row.get(name) for name in KEY): row["accuracy"] for row in rows}
    wanted = [(images, criterion) for images in dict.fromkeys(row["data"] for row in rows) for criterion in CRITERIA]
    return "\n\n".join(filter(None, (_table(images, criterion, runs) for images, criterion in wanted)))


def _table(images: str, criterion: str, runs: Runs) -> str:
    lines = [_line(images, criterion, network, level, runs) for network, level in _places(images, criterion, runs)]
    header = ["FLOPs removed", "seeds", "dense", *(f"{name}; with the floor" for name in SCOPES)]
    kept = [line for line in lines if line]
    return f"**{images}, {criterion}**\n\n{table(header, kept)}" if kept else ""


def _places(images: str, criterion: str, runs: Runs) -> list[tuple[str, float]]:
    found = ((key[2], key[3]) for key in runs if key[:2] == (images, criterion))
    return sorted(dict.fromkeys(found), key=lambda place: (["CNN", "ResNet", "MobileNet"].index(place[0]), place[1]))


def _line(images: str, criterion: str, network: str, level: float, runs: Runs) -> list[str]:
    names = [name + suffix for name in SCOPES for suffix in ("", ", floor")]
    found = {name: _by_seed(runs, images, criterion, network, level, name) for name in names}
    seeds = sorted(set.intersection(*(set(accuracies) for accuracies in found.values())))
    if len(seeds) < 2:
        return []
    dense = _by_seed(runs, images, None, network, None, "dense")
    cells = {name: spread([accuracies[seed] for seed in seeds]) for name, accuracies in found.items()}
    pairs = [f"{cells[name]}; {cells[name + ', floor']}" for name in SCOPES]
    return [f"{network}, {level:.0%}", str(len(seeds)), spread([dense[seed] for seed in seeds]), *pairs]


def _by_seed(runs: Runs, *place: Any) -> dict[int, float]:
    return {key[-1]: accuracy for key, accuracy in runs.items() if key[:-1] == place}
