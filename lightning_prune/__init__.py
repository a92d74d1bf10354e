"""Neural-network pruning as PyTorch Lightning callbacks."""

from lightning_prune._moved import keep_former_paths
from lightning_prune._version import __version__ as __version__
from lightning_prune.criteria import (
    FPGM,
    LAMP,
    REAP,
    SNIP,
    ActivationNorm,
    APoZ,
    BatchNormScale,
    BlockInfluence,
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
from lightning_prune.export.compressed import load_compressed, save_compressed
from lightning_prune.export.fast import to_fast
from lightning_prune.export.fast_files import load_fast, save_fast
from lightning_prune.export.onnx import export_onnx
from lightning_prune.export.sparse_layers import to_sparse_csr, to_sparse_semi_structured
from lightning_prune.granularities import (
    NM,
    Block,
    Channel,
    Expert,
    Granularity,
    Head,
    InputChannel,
    Layer,
    ResidualChannel,
    SharedFanIn,
    Weight,
)
from lightning_prune.masks import Masks
from lightning_prune.methods.acdc import ACDC
from lightning_prune.methods.adapters import MaskedAdapters
from lightning_prune.methods.admm import ADMM
from lightning_prune.methods.at_init import PruningAtInit
from lightning_prune.methods.distillation import Distillation
from lightning_prune.methods.dynamic_sparse import SET
from lightning_prune.methods.gating import SparseEarlyStopping, SparseModelCheckpoint
from lightning_prune.methods.group_lasso import GroupLasso
from lightning_prune.methods.guarded import GuardedPruning
from lightning_prune.methods.learned_masks import LearnedMasks
from lightning_prune.methods.lottery import LotteryTicket
from lightning_prune.methods.rigl import RigL
from lightning_prune.methods.straight_through import SRSTE
from lightning_prune.models.summary import sparsity, summary
from lightning_prune.posttraining.batch_norms import recalibrate
from lightning_prune.posttraining.fitting import Reconstruction
from lightning_prune.posttraining.permutation import permute_rows
from lightning_prune.posttraining.prune import prune
from lightning_prune.posttraining.sensitivity import SensitivityAnalysis, sensitivity
from lightning_prune.posttraining.sparsegpt import sparsegpt
from lightning_prune.reporting.history import History
from lightning_prune.reporting.metrics import ActiveFLOPs, ActiveParameters, MaskOverlap, Sparsity
from lightning_prune.reporting.plots import plot_history, plot_masks, plot_schedule, plot_sensitivity, plot_sparsity
from lightning_prune.reporting.run_report import PruningReport
from lightning_prune.scopes import OWL, Evolve
from lightning_prune.scopes.erdos_renyi import ERK
from lightning_prune.scopes.knapsack import Knapsack
from lightning_prune.structure.checkpoints import load_shrunk, save_shrunk
from lightning_prune.structure.shrinking import shrink
from lightning_prune.training.constant import ConstantSparsity
from lightning_prune.training.presets import (
    EntropyPruning,
    MagnitudePruning,
    MovementPruning,
    RandomPruning,
    SensitivityPruning,
    SNIPPruning,
    WandaPruning,
)
from lightning_prune.training.pruning import Pruning
from lightning_prune.units.units import Units
from lightning_prune.updates.latency import LatencyTable
from lightning_prune.updates.latency_measuring import measure_latency

keep_former_paths()
del keep_former_paths

__all__ = [
    "ACDC",
    "ADMM",
    "ERK",
    "FPGM",
    "LAMP",
    "NM",
    "OWL",
    "REAP",
    "SET",
    "SNIP",
    "SRSTE",
    "APoZ",
    "ActivationNorm",
    "ActiveFLOPs",
    "ActiveParameters",
    "BatchNormScale",
    "Block",
    "BlockInfluence",
    "Channel",
    "ConstantSparsity",
    "Criterion",
    "Distillation",
    "Entropy",
    "EntropyPruning",
    "Evolve",
    "Expert",
    "Fisher",
    "GraSP",
    "Granularity",
    "GroupLasso",
    "GuardedPruning",
    "Head",
    "History",
    "InputChannel",
    "Knapsack",
    "LatencyTable",
    "Layer",
    "LearnedMasks",
    "LotteryTicket",
    "Magnitude",
    "MagnitudePruning",
    "MaskOverlap",
    "MaskedAdapters",
    "Masks",
    "Movement",
    "MovementPruning",
    "Pruning",
    "PruningAtInit",
    "PruningReport",
    "Random",
    "RandomPruning",
    "Reconstruction",
    "ResidualChannel",
    "RigL",
    "SNIPPruning",
    "Sensitivity",
    "SensitivityAnalysis",
    "SensitivityPruning",
    "SharedFanIn",
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
    "load_fast",
    "load_shrunk",
    "measure_latency",
    "permute_rows",
    "plot_history",
    "plot_masks",
    "plot_schedule",
    "plot_sensitivity",
    "plot_sparsity",
    "prune",
    "recalibrate",
    "save_compressed",
    "save_fast",
    "save_shrunk",
    "sensitivity",
    "shrink",
    "sparsegpt",
    "sparsity",
    "summary",
    "to_fast",
    "to_sparse_csr",
    "to_sparse_semi_structured",
]
