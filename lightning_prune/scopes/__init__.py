"""Scopes: unit scores and one sparsity to how many units each target keeps."""

from lightning_prune.scopes.erdos_renyi import ERK
from lightning_prune.scopes.owl import OWL
from lightning_prune.scopes.shares import (
    SCOPES,
    Scope,
    ScopeName,
    at_least,
    below,
    erk,
    global_,
    lamp,
    local,
    per_layer,
    resolve,
)

__all__ = [
    "ERK",
    "OWL",
    "SCOPES",
    "Scope",
    "ScopeName",
    "at_least",
    "below",
    "erk",
    "global_",
    "lamp",
    "local",
    "per_layer",
    "resolve",
]
