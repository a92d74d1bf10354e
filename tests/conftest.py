"""Every test starts from the same generators and leaves no thread count or figure behind."""

import gc
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache

import first_import  # noqa: F401 - before anything else imports the package
import pytest
import torch
from lightning.fabric.utilities import registry

with suppress(ImportError):  # each export to ONNX reads the source of all operators: half of what a small model takes
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    ONNXRegistry.from_torchlib = staticmethod(cache(ONNXRegistry.from_torchlib))
# Each Trainer reads what every installed package says of itself, to find callbacks: a sixth of the time of a short run.
registry.entry_points = cache(registry.entry_points)
collect_ignore = ["support/namespace.py"]  # a script: what it inherits from is settled when it is imported


def pytest_configure(config: pytest.Config) -> None:
    """Take what is said of short runs as read: most tests have few steps. ``test_watching.py`` checks it."""
    config.addinivalue_line("filterwarnings", "ignore:.* for its schedule, which prunes a large part in one step")


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what stays anyway: modules and tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")
