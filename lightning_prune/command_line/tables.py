"""Tables: the summary of a file and the comparison of two, as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_prune.command_line.files import Contents, Method
from lightning_prune.models.summary import counted_as, ruled, shape_text


def summary_text(path: str, contents: Contents) -> str:
    """Return the zeros of every weight, the masks, and where each schedule stands.

    >>> import torch
    >>> print(summary_text("a.pt", Contents("a state_dict", {"weight": torch.eye(2)})))
    a.pt: a state_dict, 4 values in 1 tensor
    name    shape  weights  zeros  sparsity
    ---------------------------------------
    weight  2 x 2        4      2    50.00%
    ---------------------------------------
    total                4      2    50.00%
    no masks of a pruning callback
    """
    weights, masks = contents.weights(), contents.masks
    head = ("name", "shape", "weights", "zeros", "sparsity", *(["masked"] if masks else []))
    cells = []
    totals = [0, 0, 0]
    for name, weight in weights.items():
        zeros, pruned = _zeros(weight), _pruned(masks[name]) if name in masks else 0
        totals = [total + count for total, count in zip(totals, (weight.numel(), zeros, pruned), strict=True)]
        masked = [_part(pruned, weight.numel()) if name in masks else ""]
        cells.append((name, shape_text(weight.shape), *_counts(weight.numel(), zeros), *(masked if masks else [])))
    end = ("total", "", *_counts(*totals[:2]), *([_part(totals[2], totals[0])] if masks else []))
    size = counted_as(sum(tensor.numel() for tensor in contents.tensors.values()), "value")
    where = [f"{name.replace('global_', '')} {value:,}" for name, value in contents.where.items()]
    title = ", ".join([f"{path}: {contents.kind}", *where, f"{size} in {counted_as(len(contents.tensors), 'tensor')}"])
    methods = [line for method in contents.methods for line in _method(method, contents.tensors)]
    return "\n".join([title, *ruled([head, *cells, end]), *(methods or ["no masks of a pruning callback"])])


def diff_text(first: Contents, second: Contents) -> str:
    """Return how the masks of two files differ, weight by weight; without masks, nonzero weights count as kept.

    >>> import torch
    >>> a, b = (Contents("a state_dict", {"weight": torch.tensor([row])}) for row in ([1.0, 0.0], [1.0, 2.0]))
    >>> print(diff_text(a, b))
    name    shape  pruned in a  pruned in b  in a alone  in b alone  overlap
    ------------------------------------------------------------------------
    weight  1 x 2       50.00%        0.00%           1           0   50.00%
    ------------------------------------------------------------------------
    total               50.00%        0.00%           1           0   50.00%
    overlap: the weights that both keep, of those that either keeps
    """
    kept, others = first.kept(), second.kept()
    cells: list[tuple[str, ...]] = [
        ("name", "shape", "pruned in a", "pruned in b", "in a alone", "in b alone", "overlap")
    ]
    totals = [0] * 5
    notes = []
    for name in kept.keys() & others.keys():
        if kept[name].shape != others[name].shape:
            notes.append(f"{name}: {shape_text(kept[name].shape)} in a, {shape_text(others[name].shape)} in b")
    for name in kept:
        if name in others and kept[name].shape == others[name].shape:
            counts = _compared(kept[name], others[name])
            totals = [total + count for total, count in zip(totals, counts, strict=True)]
            cells.append((name, shape_text(kept[name].shape), *_overlap(*counts)))
    for label, one, other in (("a", kept, others), ("b", others, kept)):
        if alone := [name for name in one if name not in other]:
            notes.append(f"only in {label}: {', '.join(alone[:5])}{', ...' * (len(alone) > 5)}")
    if len(cells) == 1:
        raise ValueError("; ".join(["a and b must have weights of the same names and shapes, got none", *notes[:3]]))
    lines = ruled([*cells, ("total", "", *_overlap(*totals))])
    return "\n".join([*lines, "overlap: the weights that both keep, of those that either keeps", *sorted(notes)])


def report_text(found: Mapping[str, Any]) -> str:
    """Return the tables of a report as text, from the data that ``PruningReport`` writes as JSON."""
    cells = [("name", "shape", "weights", "zeros", "sparsity")]
    for row in found["layers"]:
        cells.append((row["name"], shape_text(row["shape"]), *_counts(row["weights"], row["zeros"])))
    totals = [sum(row[key] for row in found["layers"]) for key in ("weights", "zeros")]
    plans = [callback["plan"] for callback in found["callbacks"]]
    return "\n".join(
        [
            f"Pruning of {found['model']}: {found['sparsity']:.2%} of the targets are pruned after {found['steps']:,} "
            f"optimizer steps",
            *plans,
            *ruled([*cells, ("total", "", *_counts(*totals))]),
            *(_metric(name, points) for name, points in found["history"]["metrics"].items()),
        ]
    )


def _metric(name: str, points: Sequence[Sequence[Any]]) -> str:
    known = [value for _, value in points if value is not None]
    if not known:
        return f"{name}: no finite value"
    return f"{name}: first {known[0]:.4g}, lowest {min(known):.4g}, highest {max(known):.4g}, last {known[-1]:.4g}"


def _method(method: Method, tensors: Mapping[str, Tensor]) -> list[str]:
    sizes = sum(mask.numel() for mask in method.masks.values())
    pruned = sum(map(_pruned, method.masks.values()))
    lines = [f"{method.name}: {counted_as(len(method.masks), 'mask')}, {_part(pruned, sizes)} pruned"]
    lines += [f"  {text}" for text in (_position(method.state), _trials(method.state)) if text]
    alive = sum(
        int((tensors[name].to_dense()[~mask] != 0).sum())
        for name, mask in method.masks.items()
        if name in tensors and tensors[name].shape == mask.shape
    )
    if alive:
        lines.append(f"  {counted_as(alive, 'pruned weight')} not zero: the weights were changed after the masks")
    if missing := sorted(name for name in method.masks if name not in tensors):
        lines.append(f"  masks without a weight: {', '.join(missing[:5])}")
    return lines


def _position(state: Mapping[str, Any]) -> str:
    """Return where a schedule stands: its window, the last update, and whether it has come to its end."""
    steps, window, applied = state.get("steps"), state.get("window"), state.get("applied", -1)
    arguments = state.get("arguments") or {}
    interval = str(arguments.get("interval", "'step'")).strip("'")
    ran = f"after {counted_as(steps, 'optimizer step')}" if isinstance(steps, int) else ""
    if not window:
        return ran
    first, last = window
    made = f"last update at {interval} {applied}" if applied >= 0 else "no update yet"
    stands = "complete" if applied >= last else f"{counted_as(last - max(applied, first, 0), interval)} to go"
    goal = f"to sparsity {arguments['sparsity']}, " if "sparsity" in arguments else ""
    return f"{ran}: {goal}{interval} {first} to {last}, {made}, {stands}"


def _trials(state: Mapping[str, Any]) -> str:
    trials = state.get("trials")
    if not trials:
        return ""
    best = max((level for _, level, _, kept in trials if kept), default=None)
    held = "none held" if best is None else f"the highest sparsity held is {best:.1%}"
    return f"{counted_as(len(trials), 'validation')} judged: {held}"


def _compared(a: Tensor, b: Tensor) -> tuple[int, int, int, int, int]:
    return a.numel(), _pruned(a), _pruned(b), int((a & b).sum()), int((a | b).sum())


def _overlap(size: int, pruned_a: int, pruned_b: int, both: int, either: int) -> tuple[str, ...]:
    only_a, only_b = size - pruned_b - both, size - pruned_a - both  # pruned in one, and kept in the other
    parts = _part(pruned_a, size), _part(pruned_b, size), f"{only_a:,}", f"{only_b:,}"
    return *parts, _part(both, either) if either else "100.00%"


def _counts(weights: int, zeros: int) -> tuple[str, str, str]:
    return f"{weights:,}", f"{zeros:,}", _part(zeros, weights)


def _part(part: int, whole: int) -> str:
    return f"{part / max(1, whole):.2%}"


def _zeros(tensor: Tensor) -> int:
    dense = tensor.to_dense()
    return dense.numel() - int(dense.count_nonzero())


def _pruned(mask: Tensor) -> int:
    return mask.numel() - int(mask.count_nonzero())
