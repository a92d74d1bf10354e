"""The numbers of the README that come from the speed benchmarks: what ModelPruning does, and what shrinking gains."""

from marked import table
from timing import load

WHY = [  # what both do, in tests/integration/test_model_pruning.py, and the test that says so
    (
        "resume",
        "the zeros are gone after an epoch",
        "masks are in the checkpoint; bit for bit the uninterrupted run",
        "test_a_resumed_run_keeps_its_masks",
    ),
    ("second `fit`", "the zeros are gone", "they stay", "test_a_second_fit_keeps_the_zeros"),
    ("ranks", "random masks can differ", "the same on all", "test_ranks_have_the_same_random_masks"),
    ("averages", "`WeightAveraging` fails", "as sparse as the model", "test_averaged_weights_are_sparse"),
    (
        "exact counts",
        "0.5 is 50, 75, 88 % after 1, 2, 3 epochs",
        "`round(0.5 * n)` zeros",
        "test_half_of_the_weights_stays_half",
    ),
    ("biases, norms", "pruned by default", "never on their own", "test_biases_and_norms_are_left_alone"),
    ("N:M", "no", "2:4 and any other", "test_two_of_four"),
]


def why() -> str:
    """Return the table of what ModelPruning does, with the recorded times in its last row."""
    steps = {
        (row["variant"], row["model"], row["threads"]): row for row in load("step_overhead")["rows"] if "ratio" in row
    }
    theirs, ours = (steps[f"{name}, weights", "mlp", 1]["ratio"] for name in ("ModelPruning", "lightning_prune"))
    rows = [[what, peer, here, f"`{test}`"] for what, peer, here, test in WHY]
    rows.append(
        ["time of a step, dense = 1", f"{theirs:.2f}", f"{ours:.2f}", "`test_the_readme_has_what_was_measured`"],
    )
    return table(["", "`ModelPruning`", "lightning_prune", "test"], rows)


def resnet() -> str:
    """Return what half of the FLOPs of a network like ResNet-18 save."""
    rows = {row["variant"]: row for row in load("shrink")["rows"] if row["model"] == "resnet18"}
    half = rows["50%"]
    return (
        f"With half of its FLOPs, such a network takes {half['onnx_ratio_1']:.2f} of the time in ONNX Runtime on one "
        f"core, and\n{half['onnx_ratio_32']:.2f} in batches of 32 ([measured](docs/speed.md#shrunk-networks), "
        f"64 x 64 pixels)."
    )
