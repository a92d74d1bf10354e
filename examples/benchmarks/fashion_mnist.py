"""Fashion-MNIST from Debian's package, for the benchmarks that train on images."""

import gzip
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist installs it


@cache
def read_fashion(part: str) -> tuple[Tensor, Tensor]:
    """Return images (n x 1 x 28 x 28, in [0, 1]) and labels of "train" or "t10k"."""
    found = []
    for kind in ("images-idx3", "labels-idx1"):
        path = FOLDER / f"{part}-{kind}-ubyte.gz"
        if not path.exists():
            raise SystemExit(f"{path} must exist: apt-get install dataset-fashion-mnist")
        content = gzip.decompress(path.read_bytes())
        dimensions = content[3]
        shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
        found.append(
            torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy())
        )
    return found[0].unsqueeze(1).float().div(255), found[1].long()
