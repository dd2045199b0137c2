"""QONNX files run by the executor of the ``qonnx`` package, node by node."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx


@contextmanager
def _readable_models() -> Iterator[None]:
    """qonnx wraps each standard operator into a model of onnx's newest IR version, which is ahead of onnxruntime's."""
    from qonnx.core import onnx_exec

    make = onnx_exec.qonnx_make_model

    def made(*arguments: Any, **options: Any) -> onnx.ModelProto:
        model = make(*arguments, **options)
        model.ir_version = 8
        return model

    onnx_exec.qonnx_make_model = made
    try:
        yield
    finally:
        onnx_exec.qonnx_make_model = make


def execute(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs by name.

    Args:
        model: A QONNX model of as many samples as the feeds have.
        feeds: float32 inputs by name.
    """
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx

    with _readable_models(), warnings.catch_warnings(), np.errstate(over="ignore", invalid="ignore"):
        warnings.simplefilter("ignore")
        return execute_onnx(ModelWrapper(model), feeds)
