"""Namespaces: base classes that both ``lightning.pytorch`` and ``pytorch_lightning`` take for their own."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
else:
    import lightning.pytorch.callbacks as lightning_callbacks

    def _both(name: str) -> Any:
        """Return a class that inherits from the class of this name in every namespace that is installed."""
        bases = [getattr(lightning_callbacks, name)]
        if find_spec("pytorch_lightning") is not None:
            import pytorch_lightning.callbacks as other_callbacks

            # the second base is there for isinstance checks only: it must not be set up a second time
            bases.append(type(name, (getattr(other_callbacks, name),), {"__init__": lambda self: None}))
        return type(name, tuple(bases), {"__doc__": bases[0].__doc__, "__module__": __name__})

    Callback = _both("Callback")
    EarlyStopping = _both("EarlyStopping")
    ModelCheckpoint = _both("ModelCheckpoint")

__all__ = ["Callback", "EarlyStopping", "ModelCheckpoint"]
