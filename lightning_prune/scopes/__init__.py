"""Scopes: unit scores and one sparsity to how many units each target keeps."""

from lightning_prune.scopes.erdos_renyi import ERK
from lightning_prune.scopes.evolve import Evolve
from lightning_prune.scopes.owl import OWL
from lightning_prune.scopes.searching import Search, without_search
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
    "Evolve",
    "Scope",
    "ScopeName",
    "Search",
    "at_least",
    "below",
    "erk",
    "global_",
    "lamp",
    "local",
    "per_layer",
    "resolve",
    "without_search",
]
