"""Namespaces: base classes that both ``lightning.pytorch`` and ``pytorch_lightning`` take for their own.

The second one counts where it has been imported before this package. It is not imported for nothing: that costs time,
and redirects Lightning's log.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
else:
    import lightning.pytorch.callbacks as lightning_callbacks

    def _both(name: str) -> Any:
        """Return a class that inherits from the class of this name in every namespace that is in use."""
        first = getattr(lightning_callbacks, name)
        if "pytorch_lightning" not in sys.modules:
            return first
        import pytorch_lightning.callbacks as other_callbacks

        # there for isinstance checks only: it must not be set up a second time
        second = type(f"_Other{name}", (getattr(other_callbacks, name),), {"__init__": lambda self: None})
        # names of their own, since the command line finds callbacks by names
        return type(f"_Both{name}", (first, second), {"__doc__": first.__doc__, "__module__": __name__})

    Callback = _both("Callback")
    EarlyStopping = _both("EarlyStopping")
    ModelCheckpoint = _both("ModelCheckpoint")

__all__ = ["Callback", "EarlyStopping", "ModelCheckpoint"]
