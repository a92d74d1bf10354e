"""Draws the badges of the README from the project's own files: run it after a release."""

from importlib.util import find_spec
from pathlib import Path

import lightning_prune

BADGE = """<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" aria-label="{name}: {value}">
<title>{name}: {value}</title>
<rect width="{width}" height="20" rx="3" fill="#555"/>
<path d="M{left} 0h{reach}a3 3 0 0 1 3 3v14a3 3 0 0 1-3 3h-{reach}z" fill="#5e35b1"/>
<g fill="#fff" text-anchor="middle" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">
<text x="{first}" y="14">{name}</text>
<text x="{second}" y="14">{value}</text>
</g>
</svg>
"""


def badge(name: str, value: str) -> str:
    """Return a badge as SVG."""
    left, right = (7 * len(text) + 12 for text in (name, value))
    return BADGE.format(
        name=name,
        value=value,
        left=left,
        width=left + right,
        reach=right - 3,
        first=left / 2,
        second=left + right / 2,
    )


def badges(root: Path) -> dict[str, str]:
    """Return the badges of a project by file name."""
    lines = dict(line.split(" = ", 1) for line in (root / "pyproject.toml").read_text().splitlines() if " = " in line)
    spec = find_spec("lightning_prune")
    assert spec is not None
    assert spec.origin is not None
    assert (Path(spec.origin).with_name("py.typed")).exists()
    return {
        "version": badge("version", lightning_prune.__version__),
        "python": badge("python", lines["requires-python"].strip('">= ') + "+"),
        "licence": badge("licence", lines["license"].strip('"')),
        "typed": badge("types", "mypy strict"),
    }


def main() -> None:
    """Write the badges."""
    root = Path(__file__).parents[2]
    for name, text in badges(root).items():
        (root / "docs" / "badges" / f"{name}.svg").write_text(text)


if __name__ == "__main__":
    main()
