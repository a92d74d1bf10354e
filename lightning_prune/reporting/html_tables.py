"""Tables of the report page: sizes, cut channels, metrics and layers."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from lightning_prune.models.summary import Row, Summary, counted_as, scarcity, shape_text

_UNMEASURED = "this report was written without them"


def sizes_table(found: Mapping[str, Any]) -> str:
    """Return the sizes before and after the run, and why there are no FLOPs if there are none."""
    before, after = found["before"], found["after"]
    body = []
    for key, (label, form) in _SIZES.items():
        if key in after:
            change = f"{after[key] / before[key] - 1:+.1%}" if before.get(key) else ""
            body.append((label, form(before[key]) if key in before else "", form(after[key]), change))
    text = _table(("", "before", "after", "change"), body)
    if "flops" not in after:
        text += f"\n<p>FLOPs are not measured: {escape(found.get('no_flops') or _UNMEASURED)}.</p>"
    return text


def channels_table(changed: Mapping[str, Sequence[int]]) -> str:
    """Return the numbers of channels before and after they were cut; nothing if none was."""
    if not changed:
        return ""
    body = [
        (name, f"{before:,}", f"{after:,}", f"{after / before - 1:+.1%}") for name, (before, after) in changed.items()
    ]
    return _table(("channels", "before", "after", "change"), body)


def metrics_table(metrics: Mapping[str, Sequence[Sequence[float | None]]]) -> str:
    """Return the first, lowest, highest and last value of every metric."""
    body = []
    for name, values in metrics.items():
        known = [value for _, value in values if value is not None]
        if known:
            body.append((name, *(f"{value:.4g}" for value in (known[0], min(known), max(known), known[-1]))))
    if not body:
        return "<p>No metric was logged.</p>"
    return _table(("metric", "first", "lowest", "highest", "last"), body)


def layers_table(layers: Sequence[Mapping[str, Any]], shrunk: bool) -> str:
    """Return the layers with a bar for the sparsity of each, and say which are empty or nearly empty."""
    summary = Summary(tuple(Row(row["name"], tuple(row["shape"]), row["weights"], row["zeros"]) for row in layers))
    total = summary.total
    states = [scarcity(row, total) for row in summary.rows]
    columns = 3 if shrunk and not total.zeros else 5  # what was pruned is no longer there
    heads = "".join(f'<th scope="col"><button>{head}</button></th>' for head in _HEADS[:columns])
    lines = [_layer(row, state, columns) for row, state in zip(summary.rows, states, strict=True)]
    foot = _row(("total", "", f"{total.weights:,}", f"{total.zeros:,}", f"{total.sparsity:.2%}")[:columns])
    body = "\n".join(lines)
    return (
        f'{_scarce(states)}<table class="sortable"><thead><tr>{heads}</tr></thead>'
        f"<tbody>\n{body}\n</tbody><tfoot>{foot}</tfoot></table>"
    )


def scaled(value: float, unit: str = "") -> str:
    """Return a number with three digits and the prefix of its unit.

    >>> scaled(1062952, "B"), scaled(999.9, "B"), scaled(12)
    ('1.06 MB', '1.00 kB', '12')
    """
    prefixes = iter("kMGTP")
    prefix = ""
    while value >= 999.5:
        value, prefix = value / 1000, next(prefixes)
    digits = f"{value:.{2 - (value >= 9.995) - (value >= 99.95)}f}" if prefix else f"{value:.0f}"
    return f"{digits} {prefix}{unit}".rstrip()


_HEADS = ("layer", "shape", "weights", "zeros", "sparsity")
_ADVICE = 'With scope="local" or "erk" every layer keeps its share; ignore=[...] leaves a layer dense.'
_SCARCE = {"empty": "empty", "nearly empty": "nearly empty, with at most 2 % of their weights left"}
_SIZES: dict[str, tuple[str, Callable[[float], str]]] = {
    "parameters": ("parameters", "{:,.0f}".format),
    "active_parameters": ("nonzero parameters", "{:,.0f}".format),
    "bytes": ("size", lambda value: scaled(value, "B")),
    "packed_bytes": ("size as a bitmask and nonzero values", lambda value: scaled(value, "B")),
    "flops": ("FLOPs of a forward pass of the example input", lambda value: scaled(value)),
    "active_flops": ("FLOPs without products with zeros", lambda value: scaled(value)),
}


def _layer(row: Row, state: str, columns: int) -> str:
    tag = f" <strong>{state}</strong>" if state else ""
    cells = (
        (shape_text(row.shape), row.weights),
        (f"{row.weights:,}", row.weights),
        (f"{row.zeros:,}", row.zeros),
        (f"{row.sparsity:.2%}", row.sparsity),
    )
    data = "".join(f'<td data-value="{value:.6g}">{text}</td>' for text, value in cells[: columns - 1])
    bar = f' style="--level:{row.sparsity:.2%}"' if columns == len(_HEADS) else ""
    kind = f' class="{state.replace(" ", "-")}"' if state else ""
    return f"<tr{kind}{bar}><td>{escape(row.name)}{tag}</td>{data}</tr>"


def _scarce(states: Sequence[str]) -> str:
    """Return how many layers have no or hardly any weights left, and what to do about it."""
    counts = {what: states.count(state) for state, what in _SCARCE.items() if state in states}
    if not counts:
        return ""
    first, *others = [(f"{count:,}", "is" if count == 1 else "are", what) for what, count in counts.items()]
    said = [f"{first[0]} of {counted_as(len(states), 'layer')} {first[1]} {first[2]}", *map(" ".join, others)]
    return f"<p>{escape(' and '.join(said))}. {escape(_ADVICE)}</p>\n"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    heads = "".join(f'<th scope="col">{escape(each)}</th>' for each in head)
    rows = "\n".join(map(_row, body))
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'


def _row(cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
