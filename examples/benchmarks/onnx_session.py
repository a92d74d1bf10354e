"""ONNX Runtime on one thread, as the benchmarks on one core run it."""

from pathlib import Path

import onnxruntime


def single_threaded(file: str | Path, profile: str = "") -> onnxruntime.InferenceSession:
    """Return a session with one thread for a file, which writes a profile to files that begin so, if asked to."""
    options = onnxruntime.SessionOptions()
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
