"""Export of pruned models: ONNX, compressed files, sparse layers."""

from lightning_prune.export.onnx import export_onnx

__all__ = ["export_onnx"]
