"""What the first import of the package loads, in a process that has loaded Lightning."""

import sys

import lightning.pytorch  # noqa: F401

_known = set(sys.modules)
import lightning_prune  # noqa: E402, F401

LOADED = sorted(set(sys.modules) - _known)
