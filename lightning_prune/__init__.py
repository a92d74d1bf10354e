"""Neural-network pruning as PyTorch Lightning callbacks."""

from lightning_prune.acdc import ACDC
from lightning_prune.at_init import PruningAtInit
from lightning_prune.compressed import load_compressed, save_compressed
from lightning_prune.constant import ConstantSparsity
from lightning_prune.criteria import (
    FPGM,
    LAMP,
    SNIP,
    APoZ,
    BatchNormScale,
    Criterion,
    Entropy,
    Fisher,
    GraSP,
    Magnitude,
    Movement,
    Random,
    Sensitivity,
    SynFlow,
    Wanda,
)
from lightning_prune.distillation import Distillation
from lightning_prune.erdos_renyi import ERK
from lightning_prune.export import export_onnx
from lightning_prune.gating import SparseEarlyStopping, SparseModelCheckpoint
from lightning_prune.granularities import NM, Block, Channel, Granularity, Head, InputChannel, Weight
from lightning_prune.guarded import GuardedPruning
from lightning_prune.history import History
from lightning_prune.loading import load_shrunk, save_shrunk
from lightning_prune.lottery import LotteryTicket
from lightning_prune.masks import Masks
from lightning_prune.metrics import ActiveFLOPs, ActiveParameters, MaskOverlap, Sparsity
from lightning_prune.plots import plot_history, plot_masks, plot_schedule, plot_sensitivity, plot_sparsity
from lightning_prune.posttraining import prune
from lightning_prune.pruning import Pruning
from lightning_prune.pruning_report import PruningReport
from lightning_prune.recalibration import recalibrate
from lightning_prune.report import sparsity, summary
from lightning_prune.scopes import OWL
from lightning_prune.sensitivity import SensitivityAnalysis, sensitivity
from lightning_prune.shrinking import shrink
from lightning_prune.sparse_layers import to_sparse_csr, to_sparse_semi_structured
from lightning_prune.sparse_training import SET, RigL
from lightning_prune.sparsegpt import sparsegpt
from lightning_prune.straight_through import SRSTE
from lightning_prune.strategies import (
    EntropyPruning,
    MagnitudePruning,
    MovementPruning,
    RandomPruning,
    SensitivityPruning,
    SNIPPruning,
    WandaPruning,
)
from lightning_prune.units import Units

__version__ = "0.1.0"

__all__ = [
    "ACDC",
    "ERK",
    "FPGM",
    "LAMP",
    "NM",
    "OWL",
    "SET",
    "SNIP",
    "SRSTE",
    "APoZ",
    "ActiveFLOPs",
    "ActiveParameters",
    "BatchNormScale",
    "Block",
    "Channel",
    "ConstantSparsity",
    "Criterion",
    "Distillation",
    "Entropy",
    "EntropyPruning",
    "Fisher",
    "GraSP",
    "Granularity",
    "GuardedPruning",
    "Head",
    "History",
    "InputChannel",
    "LotteryTicket",
    "Magnitude",
    "MagnitudePruning",
    "MaskOverlap",
    "Masks",
    "Movement",
    "MovementPruning",
    "Pruning",
    "PruningAtInit",
    "PruningReport",
    "Random",
    "RandomPruning",
    "RigL",
    "SNIPPruning",
    "Sensitivity",
    "SensitivityAnalysis",
    "SensitivityPruning",
    "SparseEarlyStopping",
    "SparseModelCheckpoint",
    "Sparsity",
    "SynFlow",
    "Units",
    "Wanda",
    "WandaPruning",
    "Weight",
    "export_onnx",
    "load_compressed",
    "load_shrunk",
    "plot_history",
    "plot_masks",
    "plot_schedule",
    "plot_sensitivity",
    "plot_sparsity",
    "prune",
    "recalibrate",
    "save_compressed",
    "save_shrunk",
    "sensitivity",
    "shrink",
    "sparsegpt",
    "sparsity",
    "summary",
    "to_sparse_csr",
    "to_sparse_semi_structured",
]
