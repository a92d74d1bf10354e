"""Configs of Hugging Face models: what they say of the sizes of a model that was cut, where they can say it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_prune.models.experts import COUNTS
from lightning_prune.models.parameters import plain_name
from lightning_prune.structure.block_names import is_inside
from lightning_prune.structure.cut_record import CutRecord
from lightning_prune.structure.depth import own_configs
from lightning_prune.structure.groups import HEADS, QUERIES

_WIDTHS = (
    *("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "d_ff", "ffn_hidden_size"),
    *("hidden_dim", "moe_intermediate_size"),
    *COUNTS,
)
_HIDDEN = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "word_embed_proj_dim")


def tell_configs(model: nn.Module, kept: CutRecord) -> None:
    """Let the configs in a model say its new widths and numbers of heads, where a model made from them is like it.

    That is so where all layers have been cut alike, and the class has a name for each size. Otherwise configs stay as
    they are, and the model has to be saved with ``save_shrunk``.

    Args:
        model: A model that has been cut.
        kept: What was kept of it in this cut.
    """
    for owner in list(pretrained(model)) if kept.places else []:
        own_configs(owner)
        # attentions may have got copies of their own, with the heads that they have now
        cut = {*kept.heads, *kept.queries}
        attentions = [m for n, m in model.named_modules() if plain_name(n) in cut and "config" in vars(m)]
        others = set(owner.modules()).difference(attentions)
        found = [part for module in others for part in _parts(vars(module).get("config"))]
        configs = list({id(config): config for config in found}.values())
        former = [dict(vars(config)) for config in configs]
        for config in configs:
            _state(config, kept)
        if _makes(owner):
            for attention in attentions:
                attention.config = _config_around(owner, attention)
        else:
            for config, values in zip(configs, former, strict=True):
                vars(config).clear()
                vars(config).update(values)


def _config_around(owner: nn.Module, inner: nn.Module) -> Any:
    """Return the config of the innermost module around another one that has a config."""
    around = [module for module in owner.modules() if module is not inner and inner in set(module.modules())]
    return next(vars(module)["config"] for module in reversed(around) if "config" in vars(module))


def pretrained(model: nn.Module) -> Iterator[Any]:
    """Yield the outermost models that know how to save themselves with a config."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        if (
            module not in inside
            and hasattr(module, "save_pretrained")
            and hasattr(vars(module).get("config"), "to_dict")
        ):
            inside.update(module.modules())
            yield module


def _parts(config: Any) -> Iterator[Any]:
    """Yield a config and those of its parts."""
    if hasattr(config, "to_dict") and not isinstance(config, type):
        yield config
        for part in vars(config).values():
            yield from _parts(part)


def _state(config: Any, kept: CutRecord) -> None:
    """Let a config state the widths and numbers of heads that all of its layers have in common."""
    lengths = _lengths(kept)
    for name in _WIDTHS:
        before = getattr(config, name, None)
        if before is None and hasattr(config, name):
            before = 4 * config.hidden_size  # what None stands for in GPT-2
        if type(before) is int and len(lengths.get(before, ())) == 1:
            setattr(config, name, next(iter(lengths[before])))
    for counts, names in ((kept.heads, HEADS), (kept.queries, QUERIES)):
        if len(set(counts.values())) == 1:
            _state_heads(config, *next(iter(counts.values())), names)
    if kept.hidden is not None:
        _state_hidden(config, *kept.hidden)


def _lengths(kept: CutRecord) -> dict[int, set[int]]:
    """Return what is left of dimensions, by their length before, but for those of heads, which may be as long."""
    lengths: dict[int, set[int]] = {}
    attentions = (*kept.heads, *kept.queries)
    for (name, _), places in kept.places.items():
        if not is_inside(name, attentions):
            lengths.setdefault(len(places), set()).add(int(places.sum()))
    return lengths


def _state_heads(config: Any, before: int, now: int, names: Sequence[str]) -> None:
    stated = {name: getattr(config, name, None) for name in names}
    numbers = {n: count for n, count in stated.items() if type(count) is int and count % before == 0}
    if "num_attention_heads" in numbers:
        _state_head_dim(config, numbers["num_attention_heads"])
    for name, count in numbers.items():
        setattr(config, name, count // before * now)


def _state_head_dim(config: Any, heads: int) -> None:
    if getattr(config, "head_dim", None) is None:
        config.head_dim = config.hidden_size // heads  # no longer the quotient of the two


def _state_hidden(config: Any, before: int, now: int) -> None:
    heads = getattr(config, "num_attention_heads", None)
    if type(heads) is int and getattr(config, "hidden_size", None) == before:
        _state_head_dim(config, heads)
    for name in _HIDDEN:
        if getattr(config, name, None) == before:
            setattr(config, name, now)


def _makes(owner: Any) -> bool:
    """Return whether a model that is made from the config has the shapes of this one."""
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            made = made_from_config(owner)
    except Exception:  # a config may have no such combination of sizes
        return False
    return _shapes(made) == _shapes(owner)


def stated_widths(config: Any) -> set[int]:
    """Return the hidden widths that a config and its parts state."""
    found = [getattr(part, name, None) for part in _parts(config) for name in _HIDDEN]
    return {width for width in found if type(width) is int}


def made_from_config(owner: Any) -> Any:
    """Return a model that is made from the config of another one, as if that had been read from a file."""
    config = type(owner.config).from_dict(owner.config.to_dict())  # which some check only then
    return type(owner)(config)


def _shapes(model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
