"""The zoos: the names of their models, and how one is made."""

from collections.abc import Callable
from typing import Any

import torch
from hugging_face import MODELS, transformer
from torch import nn
from vision import timm_model, timm_names, torchvision_model, torchvision_names

Build = Callable[[str], tuple[nn.Module, Any]]

ZOOS: dict[str, tuple[Callable[[], list[str]], Build]] = {
    "transformers": (lambda: list(MODELS), transformer),
    "torchvision": (torchvision_names, torchvision_model),
    "timm": (timm_names, timm_model),
}


def build(zoo: str, name: str) -> tuple[nn.Module, Any]:
    """Return a model in double precision as if it were trained, and its inputs."""
    torch.manual_seed(0)
    model, inputs = ZOOS[zoo][1](name)
    return trained(model.double().eval()), inputs


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    """Give biases, norms and their statistics values of their own: zeros and ones would hide that one is forgotten."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0.0, 0.1)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model
