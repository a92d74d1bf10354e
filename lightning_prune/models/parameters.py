"""Targets: which parameters of a model are pruned, found by name."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_prune.models import layer_kinds as kinds
from lightning_prune.models.orientation import is_transposed
from lightning_prune.models.patterns import check_match, matches
from lightning_prune.validation.arguments import patterns

# whole parts of a name only: a layer may be called feed_forward_module
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_forward_module)\.")
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_PLAIN_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm),
    *(nn.modules.batchnorm._NormBase,),  # batch and instance norms, lazy ones too
)


@dataclass(frozen=True)
class Target:
    """A parameter with all its names.

    Args:
        name: Its qualified name in the plain model, without the prefixes of wrappers.
        parameter: The parameter itself.
        modules: The modules that own it; tied weights have more than one.
        aliases: All its names.
    """

    name: str
    parameter: nn.Parameter
    modules: tuple[nn.Module, ...]
    aliases: tuple[str, ...] = ()

    @property
    def is_weight(self) -> bool:
        """Whether it is a weight that can be pruned: floating-point, two or more dimensions, no bias, no norm."""
        return (
            self.parameter.is_floating_point()
            and (is_lazy(self.parameter) or self.parameter.ndim >= 2)
            and "bias" not in self.name.rpartition(".")[2]
            and not self._is_of(_NORMS)
        )

    @property
    def why_never(self) -> str | None:
        """Why this weight must not be pruned even if it is named; None if it may be."""
        return kinds.loses_zeros(self.name, self.modules)

    @property
    def why_named_only(self) -> str | None:
        """Why it is pruned only if it is named; None for weights of known kinds of layers."""
        return kinds.unknown_kind(self.name, self.parameter, self.modules)

    @property
    def is_embedding(self) -> bool:
        """Whether it is the table of an embedding."""
        return self._is_of(_EMBEDDINGS)

    @property
    def is_plain_layers(self) -> bool:
        """Whether it is the weight of an ordinary linear layer or convolution, which needs no closer look."""
        module = self.modules[0]
        plain = type(module) in _PLAIN_LAYERS and not module._forward_pre_hooks and len(self.modules) == 1
        return plain and self.parameter is module.weight and "lora_" not in self.name

    def _is_of(self, kinds: tuple[type, ...]) -> bool:
        return any(isinstance(module, kinds) for module in self.modules)


def plain_name(name: str) -> str:
    """Return a qualified name without the prefixes that wrappers add.

    >>> plain_name("_orig_mod.fc._orig_mod.weight")
    'fc.weight'
    """
    return _WRAPPERS.sub("", name)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter once, by its plain name.

    >>> list(named_parameters(nn.Linear(2, 2)))
    ['weight', 'bias']
    """
    return {_WRAPPERS.sub("", name): parameter for name, parameter in model.named_parameters()}


def find(
    model: nn.Module,
    targets: Sequence[str] = (),
    ignore: Sequence[str] = (),
    frozen: bool = False,
    later: bool = False,
) -> list[Target]:
    """Return the parameters to prune, in the order of the model; tied ones once, by their first name.

    Without ``targets`` these are the trainable floating-point weights with two or more dimensions of known kinds of
    layers, except embeddings. Biases, norms, uninitialised parameters and weights that would lose their zeros are
    never pruned.

    Args:
        model: The model.
        targets: Globs (or "re:" and a regular expression) on parameter names.
        ignore: Names to leave out.
        frozen: Whether to include frozen parameters.
        later: Whether frozen parameters may be unfrozen later, so that it is not an error if all are frozen.

    Raises:
        ValueError: If a pattern matches nothing, or nothing is left to prune.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    >>> [target.name for target in find(model, ignore=["2.*"])]
    ['0.weight']
    """
    targets, ignore = patterns("targets", targets), patterns("ignore", ignore)
    entries = _entries(model)
    weights = [entry for entry in entries if entry.is_weight]
    if targets or ignore:
        check_match("targets", targets, [name for entry in weights for name in entry.aliases])
        check_match("ignore", ignore, [name for entry in entries for name in entry.aliases])
    found, waits = [], False
    for entry in weights:
        wanted = (entry.is_plain_layers and not (targets or ignore)) or _wanted(entry, targets, ignore)
        waits = waits or is_lazy(entry.parameter) or (later and wanted)
        ready = (frozen or entry.parameter.requires_grad) and not is_lazy(entry.parameter) and entry.parameter.numel()
        if wanted and ready:
            found.append(entry)
    if not found and not waits:
        raise ValueError(
            f"the model must have a prunable parameter (trainable, floating-point, two or more dimensions, matched by "
            f"targets and not by ignore), got none ({_why(entries, weights, targets)})"
        )
    return found


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    """Return all weights, of any kind of layer, except embeddings.

    >>> [tuple(weight.shape) for weight in weights_of(nn.Sequential(nn.Linear(4, 3), nn.Embedding(5, 4)))]
    [(3, 4)]
    """
    return [entry.parameter for entry in _entries(model) if entry.is_weight and not entry.is_embedding]


def left_out(model: nn.Module, targets: Sequence[str] = (), ignore: Sequence[str] = ()) -> dict[str, str]:
    """Return the trainable weights that are not pruned although not ignored: the reasons by name.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ParameterList([nn.Linear(2, 2).weight]))
    >>> left_out(model)
    {'1.0': 'it is not the weight of a known kind of layer'}
    """
    found = {}
    for entry in _entries(model):
        named = any(matches(pattern, entry.aliases) for pattern in targets)
        ignored = any(matches(pattern, entry.aliases) for pattern in ignore)
        if entry.is_weight and entry.parameter.requires_grad and not ignored and not entry.is_embedding:
            why = entry.why_never if named or not targets else None
            why = why or (entry.why_named_only if not targets else None)
            found.update({entry.name: why} if why else {})
    return found


def _wanted(entry: Target, targets: Sequence[str], ignore: Sequence[str]) -> bool:
    """Return whether a weight is to be pruned, now or once it is unfrozen or initialised."""
    if any(matches(pattern, entry.aliases) for pattern in ignore) or entry.why_never:
        return False
    if targets:
        return any(matches(pattern, entry.aliases) for pattern in targets)
    return not entry.is_embedding and not entry.why_named_only


def _why(entries: Sequence[Target], weights: Sequence[Target], targets: Sequence[str]) -> str:
    """Return why there is nothing to prune."""
    frozen = [entry.name for entry in weights if not entry.parameter.requires_grad]
    trained = [entry for entry in weights if entry.parameter.requires_grad and not entry.is_embedding]
    reasons = {entry.name: entry.why_never or ("" if targets else entry.why_named_only) for entry in trained}
    listed = [f"{name}: {reason}" for name, reason in reasons.items() if reason]
    if listed:
        return "; ".join(listed[:5])
    return f"frozen: {frozen[:5]}" if frozen else f"its parameters: {[entry.name for entry in entries[:5]]}"


def _entries(model: nn.Module) -> list[Target]:
    names: dict[nn.Parameter, list[str]] = {}
    owners: dict[nn.Parameter, dict[int, nn.Module]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            names.setdefault(parameter, []).append(plain_name(f"{prefix}.{name}" if prefix else name))
            owners.setdefault(parameter, {})[id(module)] = module
    return [Target(known[0], p, tuple(owners[p].values()), tuple(known)) for p, known in names.items()]


def channel_dim(target: Target) -> int:
    """Return the dimension of the output channels: 1 for transposed convolutions and weights, else 0.

    >>> up = nn.ConvTranspose1d(2, 3, 1)
    >>> channel_dim(Target("up.weight", up.weight, (up,)))
    1
    """
    module = target.modules[0]
    if type(module) in _PLAIN_LAYERS and "fan_in_fan_out" not in vars(module):
        return 0
    transposed = is_transposed(module) and target.parameter is module.weight
    return int(transposed or isinstance(module, nn.modules.conv._ConvTransposeNd))


def fractions(per_layer: Mapping[str, float], found: Sequence[Target]) -> dict[str, float]:
    """Return the sparsity of each target by name, from ``{pattern: sparsity}``; the first pattern that matches decides.

    Raises:
        ValueError: If a pattern decides for no target.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    >>> fractions({"0.*": 0.9, "*": 0.5}, find(model))
    {'0.weight': 0.9, '1.weight': 0.5}
    """
    decided = {t.name: next((p for p in per_layer if matches(p, t.aliases)), None) for t in found}
    for pattern in per_layer:
        if pattern not in decided.values():
            raise ValueError(
                f"sparsity must map patterns that each match a target, got {pattern!r}, which matches none that an "
                f"earlier pattern does not match already: {list(decided)}"
            )
    return {name: per_layer[pattern] for name, pattern in decided.items() if pattern is not None}
