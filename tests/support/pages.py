"""The code blocks of a page run as a module, one after the other."""

import re
import sys
from types import ModuleType


def new_module(name: str) -> ModuleType:
    """Return an empty module that can be imported as long as the process lasts.

    A callback that a block defines outlives its test, and jsonargparse imports every subclass of Callback that it sees.
    """
    module = ModuleType(re.sub(r"\W", "_", name))
    sys.modules[module.__name__] = module
    return module


def run_block(code: str, module: ModuleType) -> None:
    exec(compile(code, module.__name__, "exec"), vars(module))
