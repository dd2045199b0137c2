"""`edgemat.quantize` on float networks that hold ready layers of edgemat: mixers, ternary layers, embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import edgemat
from edgemat.errors import LoweringError
from edgemat.lower.reader import read
from edgemat.nn import GLU, MLGRU, QuantEmbedding, TernaryLinear, reset_states
from edgemat.nn.layer import QuantLayer

RECIPE = edgemat.Recipe(input="fixed<8>", weights="fixed<8>", activations="fixed<8>")
READY = {
    "TernaryLinear": lambda output: TernaryLinear(4, 4, output=output),
    "GLU": lambda output: GLU(4, 8, output=output),
    "GLU without a format of its own in front": lambda output: GLU(4, 8, input=None, output=output),
    "MLGRU": lambda output: MLGRU(4, output=output),
}


@pytest.mark.parametrize("name", READY)
def test_a_ready_layer_between_float_ones_keeps_its_codes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    part = READY[name]("fixed<8>")
    quantised = edgemat.quantize(nn.Sequential(nn.Linear(4, 4), part, nn.Linear(4, 4)), RECIPE)
    x = torch.randn(6, 5, 4)
    edgemat.calibrate(quantised, [x if name == "MLGRU" else x[:, 0]]).eval()
    reset_states(quantised)
    edgemat.to_onnx(quantised, (x[:, 0],), tmp_path / "net.onnx")
    graph = read(tmp_path / "net.onnx")
    assert [state.name for state in graph.states] == (["1.state"] if name == "MLGRU" else [])
    assert {"0", "2"} <= {call.name for call in graph.nodes}
    given = x.transpose(0, 1) if name == "MLGRU" else x[:, 0]
    report = edgemat.verify(tmp_path / "net.onnx", given.numpy(), module=quantised, backends=["torch", "onnx"])
    assert report.ok and report.backends["torch"].compared > 0, report.first_mismatch
    with torch.no_grad():  # control: another weight inside the ready layer
        first = next(module for module in quantised.modules() if isinstance(module, TernaryLinear))
        first.weight.neg_()
    report = edgemat.verify(tmp_path / "net.onnx", given.numpy(), module=quantised, backends=["torch"])
    assert not report.ok


@pytest.mark.parametrize("name", READY)
def test_exact_sums_of_a_ready_layer_are_refused_with_what_to_change(name: str) -> None:
    part: QuantLayer = READY[name](None)
    kind = type(part).__name__
    words = rf"layer '1', a ready {kind} in the network, .* build it with one: {kind}\(\.\.\., output='fixed<8>'\)"
    with pytest.raises(LoweringError, match=words):
        edgemat.quantize(nn.Sequential(nn.Linear(4, 4), part, nn.Linear(4, 4)), RECIPE)


def test_a_ready_embedding_hands_on_its_table_s_format(tmp_path: Path) -> None:
    torch.manual_seed(0)
    quantised = edgemat.quantize(nn.Sequential(QuantEmbedding(5, 4), nn.Linear(4, 3)), RECIPE)
    x = torch.tensor([0, 1, 2, 3, 4])
    edgemat.calibrate(quantised, [x]).eval()
    edgemat.to_onnx(quantised, (x,), tmp_path / "net.onnx")
    report = edgemat.verify(tmp_path / "net.onnx", x.numpy(), module=quantised, backends=["torch", "onnx"])
    assert report.ok, report.first_mismatch
