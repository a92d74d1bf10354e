"""Write what the pages say of the results: `python examples/benchmarks/refresh.py`."""

from pathlib import Path
from typing import Any

from front_page import resnet, why
from marked import replace
from timing import describe, load

MODELS = {
    "mlp": "MLP of 5.8 M weights, batch of 64",
    "cnn": "CNN the size of ResNet-18, 11.3 M weights, 16 images of 64 x 64",
    "transformer": "transformer of 3.7 M weights, 512 tokens",
}
TORCH = "prune.global_unstructured"
MASK = "one comparison into new masks"
FLOOR = "floor: weights times 1"
STEPS = {
    "lightning_prune, weights": "90 % of weights masked",
    "lightning_prune, channels": "90 % of channels masked",
    "ModelPruning, weights": "90 % of weights, `ModelPruning`",
    "ModelPruning, channels": "90 % of channels, `ModelPruning`",
    FLOOR: "floor: multiply all weights by 1 in place after the step",
    "sensitivity, in its window": "inside the window of `SensitivityPruning`",
    "entropy, in its window": "inside the window of `EntropyPruning`",
    "movement, in its window": "inside the window of `MovementPruning`",
    "wanda, in its window": "inside the window of `WandaPruning`",
    "sensitivity, outside its window": "outside the window of `SensitivityPruning`",
    "inference, weights": "inference, 90 % of weights masked",
}


def steps() -> list[str]:
    """Return a table of training steps, with a column for each model and number of threads."""
    rows = [row for row in load("step_overhead")["rows"] if "variant" in row]
    columns = list(dict.fromkeys((row["model"], row["threads"], row["clock"]) for row in rows))
    found = {(row["variant"], row["model"], row["threads"]): row["ratio"] for row in rows}
    names = [f"{_run(model, threads)}, {clock} time" for model, threads, clock in columns]
    lines = [
        f"| time per training step, dense = 1 | {' | '.join(names)} |",
        f"|---{'|---' * len(columns)}|",
    ]
    for variant, what in STEPS.items():
        cells = [f"{found[variant, model, threads]:.2f}" for model, threads, _ in columns]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    models = dict.fromkeys(model for model, _, _ in columns)
    return [*lines, "", f"{'; '.join(f'{model}: {MODELS[model]}' for model in models)}."]


def _run(model: str, threads: int) -> str:
    return f"{model}, {threads} thread{'s' * (threads > 1)}"


def updates() -> list[str]:
    """Return rows on mask updates, and on the peak memory of the largest."""
    content = load("mask_update")["rows"]
    found = {(row["size"], row["update"]): row for row in content}
    rows = []
    for size in dict.fromkeys(row["size"] for row in content):
        ours, theirs = found[size, "global"], found.get((size, TORCH))
        times = f"{_seconds(theirs['seconds'])}, {theirs['ratio_to_global']:.0f} times as long" if theirs else ""
        rows.append(f"| global mask update, {size} weights | {_seconds(ours['seconds'])} | {times} |")
    rows = [row.replace("as long |", f"as long (`{TORCH}`) |") for row in rows]
    peaks = {row["update"]: row for row in content if row["peak_memory_by_weights"] is not None}  # the largest of each
    if "global" in peaks:
        rows.append(f"| its peak extra memory | {_peak(peaks['global'])} | {_peak(peaks.get(TORCH))} |")
    return rows


def _peak(row: dict[str, Any] | None) -> str:
    return f"{row['peak_memory_by_weights']:.2g} x the bytes of the {row['size']} weights" if row else ""


def rest() -> list[str]:
    """Return rows on checkpoints and on import time."""
    masks = next(row for row in load("checkpoint")["rows"] if row["callback"] == "weights")
    imports = {row["code"]: row["seconds"] for row in load("import_time")["rows"]}
    return [
        f"| masks in a checkpoint of the MLP | {masks['bytes_added'] / 1e6:.2f} MB, "
        f"{masks['share_of_weights']:.3f} of the weights' bytes | {masks['bytes'] / 1e6:.0f} MB with masks |",
        f"| saving them; loading them | {_seconds(masks['save_seconds_added'])}; "
        f"{_seconds(masks['load_seconds_added'])} | {_seconds(masks['save_seconds'])}; "
        f"{_seconds(masks['load_seconds'])} with masks |",
        f"| `import lightning_prune` after Lightning | {_seconds(imports['import lightning_prune after it'])} | "
        f"{_seconds(imports['import lightning.pytorch'])} (`import lightning.pytorch`) |",
    ]


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{1e3 * seconds:.1f} ms" if seconds < 0.01 else f"{1e3 * seconds:.0f} ms"


def make_table() -> str:
    """Return the tables, and a line on the machine."""
    contents = [load(name) for name in ("step_overhead", "mask_update", "checkpoint", "import_time")]
    machines = dict.fromkeys(describe(content["machine"]) for content in contents)
    loads = [content["machine"]["load"] for content in contents]
    others = f"medians of alternating runs; other processes were running, load average up to {max(loads):g}"
    rows = [*steps(), "", "| | lightning_prune | compared with |", "|---|---|---|", *updates(), *rest()]
    return "\n".join(
        [
            *rows,
            "",
            f"Measured on {'; '.join(machines)}; one thread and CPU time unless stated otherwise; {others}.",
        ]
    )


def make_scale() -> str:
    """Return how the time of an update grows: two fitted numbers, their predictions, and the measurements."""
    content = load("mask_update")["rows"]
    rows = [row for row in content if row["update"] == "global"]
    mask = [row for row in content if row["update"] == MASK][-1]
    first, last = rows[0], next(row for row in rows if row["size"] == "100 M")
    # fit the cost of a weight and of a target to two sizes; the other sizes test the fit
    n, t, s = first["weights"], first["targets"], first["seconds"]
    m, u, r = last["weights"], last["targets"], last["seconds"]
    per_weight = (r * t - s * u) / (m * t - n * u)
    per_target = max(0.0, (s - n * per_weight) / t)
    lines = [
        f"{1e9 * per_weight:.2f} ns per weight and {1e3 * per_target:.2f} ms per target. Each weight is scored "
        f"{rows[-1]['passes']:.2f} times. A pass that only reads a weight and takes its absolute value takes 1/"
        f"{rows[-1]['ratio_to_pass']:.0f} of the time; comparing every weight and writing new masks takes "
        f"{mask['ratio_to_pass']:.1f} such passes.",
        "",
        "| weights | targets | model | measured | measured / model |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        model = row["weights"] * per_weight + row["targets"] * per_target
        lines.append(
            f"| {row['size']} | {row['targets']} | {_seconds(model)} | {_seconds(row['seconds'])} | "
            f"{row['seconds'] / model:.2f} |"
        )
    lines += [
        "",
        "| predicted, one core per rank | weights per rank | targets | update |",
        "|---|---|---|---|",
    ]
    for name, held, matrices in (
        ("7 B, one process", 7e9, 224),
        ("7 B on 8 ranks", 7e9 / 8, 224),
        ("70 B on 64 ranks", 70e9 / 64, 560),
    ):
        lines.append(
            f"| {name} | {held / 1e9:.2f} G | {matrices} | {_seconds(held * per_weight + matrices * per_target)} |"
        )
    return "\n".join(lines)


def make_step() -> str:
    """Return what a step with masks consists of, and what masks add to a dense step, next to the floor."""
    rows = load("step_overhead")["rows"]
    parts = [row for row in rows if "operation" in row]
    found = {(row["variant"], row["model"], row["threads"]): row for row in rows if "variant" in row}
    lines = [f"| operation in a step of the {parts[0]['model']} with masks on weights | share |", "|---|---|"]
    lines += [f"| {row['operation']} | {row['share']:.1%} |" for row in parts]
    lines += ["", "| overhead over a dense step | floor | masks on weights | masks on channels |", "|---|---|---|---|"]
    for (variant, model, threads), dense in found.items():
        if variant == "dense":
            what = (FLOOR, "lightning_prune, weights", "lightning_prune, channels")
            added = [f"{found[name, model, threads]['ratio'] - 1:+.1%}" for name in what]
            name = f"{_run(model, threads)}: {dense['milliseconds']:g} ms of {dense['clock']} time"
            lines.append(f"| {name} | {' | '.join(added)} |")
    return "\n".join(lines)


def main() -> None:
    """Rewrite the tables of the README, of docs/overhead.md and of scale.md."""
    scale, root = Path(__file__).with_name("scale.md"), Path(__file__).parents[2]
    replace(scale, "bench", make_scale())
    replace(scale, "step", make_step())
    replace(root / "docs" / "overhead.md", "bench", make_table())
    replace(root / "README.md", "why", why())
    replace(root / "README.md", "resnet", resnet())


if __name__ == "__main__":
    main()
