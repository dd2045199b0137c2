"""onnxruntime, as the import uses it: small models, one thread, no message on stderr."""

from __future__ import annotations

from typing import Any


def open_session(model: bytes, optimised: bool = False) -> Any:
    """An onnxruntime session on the CPU.

    Args:
        model: A serialised model.
        optimised: Whether onnxruntime may fuse nodes, as it does for its users; otherwise it runs node by node.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    # Without it, x86 processors without VNNI add u8 * s8 products in saturating 16-bit pairs.
    options.add_session_config_entry("session.x64quantprecision", "1")
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimised else level.ORT_DISABLE_ALL
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
