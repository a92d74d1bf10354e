"""Marked text: what benchmarks write into pages, between two lines that name it."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev


def replace(path: Path, name: str, text: str) -> None:
    """Replace the text between the markers of that name in a page.

    Raises:
        ValueError: If the page does not have each of the two markers exactly once.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    page = path.read_text()
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"{path.name} must have the lines {begin} and {end} once each")
    path.write_text(f"{page.partition(begin)[0]}{begin}\n{text}\n{end}{page.partition(end)[2]}")
    print(f"{path.name}: {name} written")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation as a cell of a table."""
    return f"{mean(values):.1f} ± {stdev(values):.1f}"
