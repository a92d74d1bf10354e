"""Mask plots: masks as pictures, at most a page of them."""

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_prune.reporting.drawing import axes_for, pyplot
from lightning_prune.validation.instances import by_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURES = 80  # at most on a page
_CELLS = 128  # maximum cells a side in the picture of a mask


def plot_masks(
    masks: Mapping[str, Tensor], ax: "Axes | Sequence[Axes] | None" = None
) -> "tuple[Figure, Sequence[Axes]]":
    r"""Plot masks as images: dark is kept, light is pruned, grey cells of large masks are averages.

    Without ``ax``, the figure has a scale and fits a page; of more than 80 masks it shows the first 80.

    Args:
        masks: Bool masks by name, such as those of a callback; rows are output channels.
        ax: Where to draw, one for each mask of two or more dimensions.

    Raises:
        ValueError: If there is no such mask, or the number of axes differs.

    >>> fig, axes = plot_masks({"weight": nn.Linear(4, 4).weight.new_tensor([[1, 0, 0, 0]]).bool()})
    >>> axes[0].get_title()
    'weight\n75.0% pruned'
    """
    pictures = {name: picture(mask) for name, mask in by_name("masks", masks, Tensor).items() if mask.ndim >= 2}
    if not pictures:
        raise ValueError(f"masks must contain one of two or more dimensions, got {list(masks)}")
    given = [] if ax is None else [*ax] if isinstance(ax, Sequence) and not isinstance(ax, str | bytes) else [ax]
    hidden = 0
    if ax is None:
        hidden = max(0, len(pictures) - PICTURES)
        pictures = dict([*pictures.items()][:PICTURES])
    axes = _grid(len(pictures)) if ax is None else [axes_for(each, 0, 0)[1] for each in given]
    if len(axes) != len(pictures):
        raise ValueError(f"ax must be one for each of {len(pictures)} masks, got {len(axes)}")
    small = len(pictures) > 12
    for place, (name, (cells, density)) in zip(axes, pictures.items(), strict=True):
        image = place.imshow(cells, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        # wrapped, since layers often differ in the middle of long names
        title = "\n".join([*wrap(name, 20 if small else 30), f"{1 - density:.1%} pruned"])
        place.set_title(title, fontsize=5 if small else 6, parse_math=False)
        place.set_xticks([])
        place.set_yticks([])
    fig: Any = axes[0].get_figure()
    if ax is None:
        title = "Masks" + f": the first {len(pictures)} of {len(pictures) + hidden}" * bool(hidden)
        fig.suptitle(title, fontsize=9)
        scale = fig.colorbar(image, ax=axes, location="bottom", fraction=0.03, aspect=40, shrink=0.6)
        scale.set_ticks([0, 0.5, 1], labels=["pruned", "half kept", "kept"], fontsize=7)
    return fig, axes


def picture(mask: Tensor, cells: int = _CELLS) -> tuple[Any, float]:
    """Return a mask as an image of at most so many cells a side, the fractions of kept weights, and its density."""
    rows = mask.detach().cpu().flatten(1)
    size = (min(cells, rows.shape[0]), min(cells, rows.shape[1]))
    image = nn.functional.adaptive_avg_pool2d(rows[None].float(), size)[0]
    return image.numpy(), float(rows.float().mean())


def _grid(count: int) -> "list[Axes]":
    """Return axes for so many pictures, on a page of at most 8 by 10.5 inches."""
    columns = min(count, 3 if count <= 12 else 6 if count <= 30 else 8)
    lines = -(-count // columns)
    size = (max(3.0, min(2.4, 8.0 / columns) * columns), min(10.5, 0.9 + 2.6 * lines))
    _, axes = pyplot().subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    flat = [*axes.flat]
    for left in flat[count:]:
        left.remove()
    return flat[:count]
