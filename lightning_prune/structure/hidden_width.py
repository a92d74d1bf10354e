"""Hidden width: whether the config of a model can say it, so that a model that is made from it outputs the same."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from lightning_prune.models.forward import Inputs, device_of, difference, run
from lightning_prune.structure.configs import made_from_config, pretrained, stated_widths, tell_configs
from lightning_prune.structure.cut_record import CutRecord
from lightning_prune.structure.equivalence import TOLERANCE, precise
from lightning_prune.structure.surgery import Decision, cut


def stated_width(
    model: nn.Module, kept: CutRecord, streams: Sequence[Decision], inputs: Inputs
) -> tuple[int, int] | None:
    """Return the hidden width before and after a cut, if the config of a Hugging Face model can say it.

    It cannot where the class has no other name for the size of a head, where several streams have other widths, or
    where something else is computed from the width, such as a factor of embeddings. The model is left as it is.

    Args:
        model: Any module, before the cut.
        kept: What is kept of it.
        streams: What is kept of its residual streams.
        inputs: Example inputs.
    """
    widths = {(group.size, int(keep.sum())) for group, keep in streams}
    if len(widths) != 1 or not any(True for _ in pretrained(model)):
        return None
    (width,) = widths
    trial, inputs = precise(model, inputs)
    cut(trial, kept)
    expected = run(trial, inputs)
    tell_configs(trial, replace(kept, hidden=width))
    if any(width[0] in stated_widths(owner.config) for owner in pretrained(trial)):
        return None  # it has stayed as it was
    try:
        remade = run(_remade(trial), inputs)
    except Exception:  # the class may need other arguments, or the user's forward another dtype
        return None
    return width if difference(expected, remade) <= TOLERANCE else None


def _remade(model: nn.Module) -> nn.Module:
    """Return a model whose pretrained parts are made from their configs, with the weights that they have."""
    for owner in list(pretrained(model)):
        with torch.random.fork_rng(devices=[]):
            made = made_from_config(owner)
        made.to(device_of(owner), next(owner.parameters()).dtype).load_state_dict(owner.state_dict())
        if owner is model:
            return made  # type: ignore[no-any-return]
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if child is owner:
                    setattr(parent, name, made)
    return model
