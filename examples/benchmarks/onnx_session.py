"""ONNX Runtime on one thread, as the benchmarks on one core run it."""

from pathlib import Path

import onnxruntime


def single_threaded(file: str | Path) -> onnxruntime.InferenceSession:
    """Return a session with one thread for a file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
