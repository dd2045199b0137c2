"""Writing symbolic ``edgemat::*`` nodes while torch exports to ONNX (docs/internals.md, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

exporting = torch.onnx.is_in_onnx_export


def emit(op: str, tensors: Sequence[Tensor], shape: Sequence[Any], **attrs: Any) -> Tensor:
    """One node of the domain ``edgemat``; float32 values to the tracer, whatever the codes are.

    Args:
        op: Name of the operator.
        tensors: Inputs; constants are integer codes.
        shape: Shape of the output, symbolic sizes included.
        attrs: Attributes; formats as text.
    """
    return torch.onnx.ops.symbolic(
        f"edgemat::{op}", tuple(tensors), attrs, dtype=torch.float32, shape=list(shape), version=1
    )
