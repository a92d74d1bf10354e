"""Models on their way out: ONNX, compressed files, sparse layers."""

from lightning_prune.export.onnx import export_onnx

__all__ = ["export_onnx"]
