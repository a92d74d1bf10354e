"""The callbacks serve ``pytorch_lightning`` like ``lightning.pytorch``, in Trainers and on the command line.

All other tests run under ``lightning.pytorch``. A new interpreter takes seconds to load, so that one answers most
questions that need one.
"""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from first_import import LOADED
from torch import nn

from lightning_prune import Channel, prune, shrink

NAMESPACE = "pytorch_lightning"
SCRIPT = Path(__file__).parents[1] / "support" / "namespace.py"
# the user's own file: nothing in it knows of pruning
NETS = """
from {namespace} import LightningModule, Trainer
from torch import nn

class Net(LightningModule):
    def __init__(self, width: int = 8, depth: int = 1):
        super().__init__()
        self.save_hyperparameters()
        layers = [nn.Conv2d(2, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        for _ in range(depth):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))

    def forward(self, x):
        return self.net(x)

def save(model, path):
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
"""


class Answer(NamedTuple):
    """What an interpreter came to: how it ended, where it wrote, and the model that it was to load."""

    done: Any
    folder: Path
    small: nn.Module


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Answer:
    folder = tmp_path_factory.mktemp("namespace")
    (folder / "nets.py").write_text(NETS.format(namespace=NAMESPACE))
    sys.path.insert(0, str(folder))
    try:
        nets = importlib.import_module("nets")
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("nets", None)
    model, inputs = nets.Net(width=12, depth=2), torch.ones(2, 2, 6, 6)
    prune(model, 0.5, granularity=Channel(coupled=True), scope="local", example_inputs=inputs)
    small = shrink(model, inputs).eval()
    nets.save(small, folder / "small.ckpt")
    command = [sys.executable, SCRIPT, NAMESPACE, folder]
    return Answer(subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=100), folder, small)


def test_the_other_namespace_prunes_and_judges_and_takes_a_command_line(answer: Answer) -> None:
    assert answer.done.returncode == 0, answer.done.stderr


def test_the_import_loads_nothing_but_the_package_itself() -> None:
    """All that needs time to load, and the other namespace, waits until a function needs it."""
    assert "lightning_prune.training.pruning" in LOADED
    assert [name for name in LOADED if name.partition(".")[0] != "lightning_prune"] == []


def test_another_process_loads_a_shrunk_model_by_the_users_class(answer: Answer) -> None:
    found = torch.load(answer.folder / "out.pt", weights_only=True)
    assert found["width"] == answer.small.net[0].out_channels == 6
    assert torch.equal(found["out"], answer.small(torch.ones(1, 2, 6, 6)))
