"""The report page: a pruning run as a self-contained HTML page."""

import io
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any

from lightning_prune.models.summary import shape_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#010203"  # the colour of lines and text in figures; the page replaces it by its text colour
STYLE: dict[Any, Any] = {
    **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], INK),
    **dict.fromkeys(["figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"], "none"),
    "legend.edgecolor": INK,
}


def render(
    found: Mapping[str, Any], figures: "Mapping[str, Figure]", without_masks: str = "There are no masks."
) -> str:
    """Return the page.

    Args:
        found: The data that ``PruningReport`` writes as JSON.
        figures: Figures drawn in ``STYLE``: "sparsity" and "masks" for the layers, all others for the history.
        without_masks: What is said where there is no figure "masks".
    """
    svg = {name: f'<figure aria-label="{escape(name)}">{as_svg(figure)}</figure>' for name, figure in figures.items()}
    history = "\n".join(svg[name] for name in svg if name not in ("sparsity", "masks"))
    no_masks = "What was pruned is cut." if found["shrunk"] else without_masks
    template = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"Pruning of {found['model']}"),
        subtitle=escape(_subtitle(found)),
        sizes=_sizes(found["before"], found["after"]) + _channels(found["shrunk"]),
        plans="\n".join(f"<pre>{escape(callback['plan'])}</pre>" for callback in found["callbacks"]),
        history=f'<div class="figures">{history}</div>{_metrics(found["history"]["metrics"])}',
        layers=_layers(found["layers"], bool(found["shrunk"])) + svg.get("sparsity", ""),
        masks=svg.get("masks", f"<p>{no_masks}</p>"),
        config=escape(found["config"]),
        made_by=escape(found["made_by"]),
    )


def _subtitle(found: Mapping[str, Any]) -> str:
    cut = " and cut out of the model" if found["shrunk"] else ""
    return f"{found['sparsity']:.2%} of the targets are pruned{cut} after {found['steps']:,} optimizer steps"


def _channels(changed: Mapping[str, Sequence[int]]) -> str:
    if not changed:
        return ""
    body = [
        (name, f"{before:,}", f"{after:,}", f"{after / before - 1:+.1%}") for name, (before, after) in changed.items()
    ]
    return _table(("channels", "before", "after", "change"), body)


def as_svg(figure: "Figure") -> str:
    """Return a figure as an SVG element in the colour of the surrounding text."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.hashsalt": "lightning_prune"}):  # reproducible ids
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def _table(head: Sequence[str], body: Sequence[Sequence[Any]], foot: Sequence[Any] = (), sortable: bool = False) -> str:
    """Return a table; a cell is a string, or a pair of a string and a number to sort by."""
    heads = [f'<th scope="col">{f"<button>{escape(h)}</button>" if sortable else escape(h)}</th>' for h in head]
    rows = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in body)
    last = f"<tfoot><tr>{''.join(map(_cell, foot))}</tr></tfoot>" if foot else ""
    kind = ' class="sortable"' if sortable else ""
    return f"<table{kind}><thead><tr>{''.join(heads)}</tr></thead><tbody>\n{rows}\n</tbody>{last}</table>"


def _cell(cell: Any) -> str:
    text, value = cell if isinstance(cell, tuple) else (cell, None)
    data = f' data-value="{value}"' if value is not None else ""
    return f"<td{data}>{escape(str(text))}</td>"


def _layers(layers: Sequence[Mapping[str, Any]], shrunk: bool) -> str:
    body = [
        (
            row["name"],
            (shape_text(row["shape"]), row["weights"]),
            (f"{row['weights']:,}", row["weights"]),
            (f"{row['zeros']:,}", row["zeros"]),
            (f"{row['sparsity']:.2%}", row["sparsity"]),
        )
        for row in layers
    ]
    weights, zeros = sum(row["weights"] for row in layers), sum(row["zeros"] for row in layers)
    foot = ("total", "", f"{weights:,}", f"{zeros:,}", f"{zeros / max(1, weights):.2%}")
    columns = 3 if shrunk and not zeros else 5  # what was pruned is no longer there
    head = ("layer", "shape", "weights", "zeros", "sparsity")[:columns]
    return _table(head, [row[:columns] for row in body], foot[:columns], sortable=True)


_SIZES = {
    "parameters": ("parameters", "{:,.0f}"),
    "active_parameters": ("nonzero parameters", "{:,.0f}"),
    "bytes": ("size", "{:,.0f} bytes"),
    "packed_bytes": ("size as a bitmask and nonzero values", "{:,.0f} bytes"),
    "flops": ("FLOPs of a forward pass of the example input", "{:,.0f}"),
    "active_flops": ("FLOPs without products with zeros", "{:,.0f}"),
}


def _sizes(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    body = []
    for key, (label, form) in _SIZES.items():
        if key in after:
            change = f"{after[key] / before[key] - 1:+.1%}" if before.get(key) else ""
            body.append((label, form.format(before[key]) if key in before else "", form.format(after[key]), change))
    return _table(("", "before", "after", "change"), body)


def _metrics(metrics: Mapping[str, Sequence[Sequence[float | None]]]) -> str:
    body = []
    for name, values in metrics.items():
        known = [value for _, value in values if value is not None]
        if known:
            body.append((name, *(f"{value:.4g}" for value in (known[0], min(known), max(known), known[-1]))))
    if not body:
        return "<p>No metric was logged.</p>"
    return f'<div class="wide">{_table(("metric", "first", "lowest", "highest", "last"), body)}</div>'
