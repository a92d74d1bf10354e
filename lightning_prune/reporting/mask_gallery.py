"""Mask gallery: the masks on the report page, as small pictures in a grid."""

import io
from base64 import b64encode
from collections.abc import Mapping
from html import escape
from typing import Any

from torch import Tensor

from lightning_prune.reporting.mask_plots import PICTURES, picture

_CELLS, _CROWD = 128, 12  # cells a side in the picture of a mask; half of them if there are more pictures than that


def gallery(masks: Mapping[str, Tensor]) -> str:
    """Return the masks of two or more dimensions as HTML: dark is kept, light is pruned; nothing if there is none.

    Of more than 80 masks it shows the first 80. Cells of large masks are averages, in one of 16 shades of grey, so
    that a page of many masks stays small.

    >>> import torch
    >>> gallery({"weight": torch.eye(4).bool()})[:66]
    '<p>Dark is kept, light is pruned; cells of large masks are average'
    """
    shown = {name: mask for name, mask in masks.items() if mask.ndim >= 2}
    if not shown:
        return ""
    cells = _CELLS if len(shown) <= _CROWD else _CELLS // 2
    figures = "\n".join(_figure(name, *picture(mask, cells)) for name, mask in [*shown.items()][:PICTURES])
    only = f" These are the first {PICTURES} of {len(shown)}." if len(shown) > PICTURES else ""
    note = "Dark is kept, light is pruned; cells of large masks are averages. Rows are output channels."
    return f'<p>{note}{only}</p>\n<div class="masks">{figures}</div>'


def _figure(name: str, image: Any, density: float) -> str:
    source = f"data:image/png;base64,{b64encode(png(image)).decode()}"
    caption = f"{escape(name)}<br>{1 - density:.1%} pruned"
    return f'<figure><img alt="mask of {escape(name)}" src="{source}"><figcaption>{caption}</figcaption></figure>'


def png(image: Any) -> bytes:
    """Return an array of fractions as a PNG file of 16 shades, from white for 0 to black for 1."""
    from PIL import Image  # comes with matplotlib

    height, width = image.shape
    shades = Image.frombytes("P", (width, height), (image * 15).round().astype("uint8").tobytes())
    shades.putpalette([level for shade in range(16) for level in [255 - 17 * shade] * 3])
    file = io.BytesIO()
    shades.save(file, format="png", bits=4, optimize=True)
    return file.getvalue()
