"""Finished runs of a benchmark, a line of JSON each: what is there is not run again."""

import json
from pathlib import Path
from typing import Any


class Runs:
    """The finished runs in a file.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            self.rows = [json.loads(line) for line in path.read_text().splitlines()]

    def have(self, **wanted: Any) -> list[dict[str, Any]]:
        """Return the runs with these values."""
        return [row for row in self.rows if wanted.items() <= row.items()]

    def add(self, **row: Any) -> None:
        """Store a run."""
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
