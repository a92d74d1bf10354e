"""The report page: a pruning run as a self-contained HTML page."""

import io
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any

from lightning_prune.reporting.html_tables import channels_table, layers_table, metrics_table, sizes_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#010203"  # the colour of lines and text in figures; the page replaces it by its text colour
_SIZE = (4.6, 2.8)  # inches, so that letters are large enough on a phone
STYLE: dict[Any, Any] = {
    **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], INK),
    **dict.fromkeys(["figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"], "none"),
    "legend.edgecolor": INK,
}


def render(
    found: Mapping[str, Any],
    figures: "Mapping[str, Figure]",
    masks: str = "",
    without_masks: str = "There are no masks.",
) -> str:
    """Return the page.

    Args:
        found: The data that ``PruningReport`` writes as JSON.
        figures: The figures of the history, drawn in ``STYLE``.
        masks: The masks as HTML, from ``gallery``.
        without_masks: What is said where there are none.
    """
    svg = (f'<figure aria-label="{escape(name)}">{as_svg(figure)}</figure>' for name, figure in figures.items())
    history = "\n".join(svg)
    no_masks = "What was pruned is cut." if found["shrunk"] else without_masks
    template = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"Pruning of {found['model']}"),
        subtitle=escape(_subtitle(found)),
        sizes=sizes_table(found) + channels_table(found["shrunk"]),
        plans="\n".join(f"<pre>{escape(callback['plan'])}</pre>" for callback in found["callbacks"]),
        history=f'<div class="figures">{history}</div>{metrics_table(found["history"]["metrics"])}',
        layers=layers_table(found["layers"], bool(found["shrunk"])),
        masks=masks or f"<p>{no_masks}</p>",
        config=escape(found["config"]),
        made_by=escape(found["made_by"]),
    )


def _subtitle(found: Mapping[str, Any]) -> str:
    cut = " and cut out of the model" if found["shrunk"] else ""
    return f"{found['sparsity']:.2%} of the targets are pruned{cut} after {found['steps']:,} optimizer steps"


def as_svg(figure: "Figure") -> str:
    """Return a figure as an SVG element in the colour of the surrounding text."""
    from matplotlib import rc_context

    file = io.StringIO()
    figure.set_size_inches(*_SIZE)
    # reproducible ids, and letters as text: as shapes they are most of the file
    with rc_context({"svg.hashsalt": "lightning_prune", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
