"""The shapes of zeros that are compared against measured time, by the names of their methods in `evidence`."""

from lightning_prune import NM, Block, Channel, Granularity, SharedFanIn, Weight

DENSE, MASKED, NEURONS, PAIRS, BLOCKS = "dense", "weights", "neurons, L2", "2:4, gradual", "blocks of 16 x 16"
ROWS = {f"groups of {rows} rows": rows for rows in (4, 8, 16, 32)}
PERMUTED = {f"{name}, permuted": name for name in ROWS}  # the rows of a trained network, before it is pruned
SHAPES: dict[str, Granularity] = {
    MASKED: Weight(),
    NEURONS: Channel(),
    **{name: SharedFanIn(rows) for name, rows in ROWS.items()},
    BLOCKS: Block(16, 16),
    PAIRS: NM(2, 4),
}
SHAPED, SHAPED_LEVELS = (MASKED, *ROWS, BLOCKS), (0.8, 0.9, 0.95)
LEVELS: dict[str, tuple[float, ...]] = dict.fromkeys(SHAPED, SHAPED_LEVELS)
LEVELS |= {PAIRS: (0.5,), NEURONS: (0.5, 0.75, 0.8, 0.9, 0.95)}
TRAINED = {  # what a trained network can have
    form: levels
    for name, levels in LEVELS.items()
    for form in (name, f"{name}, permuted")
    if form in (*LEVELS, *PERMUTED)
}
