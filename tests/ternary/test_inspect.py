"""`inspect` says what accumulator a ternary layer needs and why; folding the scale into the weights needs more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from rich.console import Console

import edgemat
from edgemat.nn import TernaryLinear
from edgemat.op import Call
from edgemat.ops import BY_NAME
from edgemat.ops.cases import constant, tensor
from edgemat.report.inspection import inspect, two_complement_bits


def test_the_width_follows_from_nonzero_weights_and_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = TernaryLinear(96, 24, input="fixed<8,3>").eval()
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-2, 2, 24)[:, None])  # scales far apart, as trained layers have
    x = torch.randn(2, 96)
    layer(x)
    edgemat.to_onnx(layer, (x,), tmp_path / "net.onnx")
    node = next(n for n in inspect(tmp_path / "net.onnx").nodes if n.operator == "Linear")
    assert node.ternary is not None and node.multiplies == 0
    codes = layer.weight_quantizer.codes(layer.weight_quantizer(layer.weight)).sign().numpy()
    counts = np.abs(codes).sum(1)
    assert (node.ternary.nonzeros, node.ternary.fan_in) == (counts.max(), 96)
    assert node.additions == counts.sum()
    low, high = node.ternary.input
    assert (low, high) == (-128, 127)
    worst = max(int((codes > 0).sum(1)[o]) * high - int((codes < 0).sum(1)[o]) * low for o in range(24))
    least = min(int((codes > 0).sum(1)[o]) * low - int((codes < 0).sum(1)[o]) * high for o in range(24))
    assert node.hls_bits == two_complement_bits(least, worst)

    # The naive way: the scale of 16 bits folded into the weights' codes, one binary point for all.
    s = layer.weight.detach().double().abs().mean(1, keepdim=True).numpy()
    folded = np.round(codes * s / s.max() * 32767).astype(np.int64)
    w = constant("fixed<16,0>", folded)
    naive = Call(
        BY_NAME["Linear"], "naive", [tensor("fixed<8,3>", (None, 96)), w[0]], {"w_format": "fixed<16,0>"}, {1: w[1]}
    )
    assert two_complement_bits(*naive.bounds.final) >= node.hls_bits + 14

    console = Console(record=True, width=200)
    console.print(inspect(tmp_path / "net.onnx").render())
    text = console.export_text()
    assert "ternary layers" in text and f"{counts.max()} of 96" in text and "-128" in text
