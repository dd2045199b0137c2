"""The summary says of every node what became of it, and why; copies and files remember."""

from __future__ import annotations

import copy
import io
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import edgemat
from edgemat.errors import LoweringError


class Net(nn.Module):
    """Every treatment once: folded, moved, kept, left, and quantised with and without a rounded result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 4, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.relu = nn.ReLU()
        self.slope = nn.PReLU()
        self.spare = nn.Linear(3, 3)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.pool(self.conv2(x)))
        return self.fc(torch.flatten(torch.sigmoid(self.slope(x)), 1))


def quantised(**fields: object) -> nn.Module:
    torch.manual_seed(0)
    given = {"weights": "fixed<4>", "activations": "fixed<6>", "rules": {"conv2": {"accumulator": 16}}}
    return edgemat.quantize(Net(), edgemat.Recipe(**{**given, **fields}), verbose=False)


def test_every_node_has_its_treatment() -> None:
    found = [(r.name, r.kind, r.action, r.parameters) for r in edgemat.summary(quantised()).rows]
    assert found == [
        ("x", "input", "quantised", 0),
        ("conv1", "Conv2d", "quantised", 80),
        ("bn1", "BatchNorm2d", "folded", 16),
        ("relu", "relu", "quantised", 0),
        ("conv2", "Conv2d", "quantised", 292),
        ("pool", "MaxPool2d", "kept", 0),
        ("relu", "ReLU", "moved", 0),
        ("slope", "PReLU", "quantised", 1),
        ("sigmoid", "sigmoid", "quantised", 0),
        ("flatten", "flatten", "kept", 0),
        ("fc", "Linear", "quantised", 650),
        ("spare", "Linear", "left", 0),
    ]


def test_formats_and_reasons() -> None:
    q = quantised()
    before = {(r.name, r.kind): r for r in edgemat.summary(q).rows}
    assert before["conv1", "Conv2d"].weights == "fixed<4>" and before["x", "input"].activations == "fixed<8>"
    edgemat.calibrate(q, [torch.randn(8, 1, 8, 8)])
    rows = {(r.name, r.kind): r for r in edgemat.summary(q).rows}
    fracs = q.conv1.weight_quantizer.format.int_bits
    expected = f"{min(fracs)}..{max(fracs)}" if min(fracs) < max(fracs) else str(fracs[0])
    assert rows["conv1", "Conv2d"].weights == f"fixed<4,{expected}>"
    assert rows["conv1", "Conv2d"].reason == "exact sum: relu behind it rounds"
    assert rows["conv2", "Conv2d"].constraint == "16-bit accumulator (a2q+)"
    assert rows["fc", "Linear"].activations == "" and "network output" in rows["fc", "Linear"].reason
    assert rows["bn1", "BatchNorm2d"].reason.startswith("into conv1")
    assert rows["spare", "Linear"].reason == "forward never calls it"
    stated = edgemat.summary(quantised(outputs="fixed<8,4>")).rows[-2]
    assert stated.activations == "fixed<8,4>" and stated.reason == ""


def test_constraints_are_named() -> None:
    q = quantised(rules={"conv1": {"khot": 2}, "conv2": {"learn_widths": "weights"}})
    constraints = {row.name: row.constraint for row in edgemat.summary(q).rows}
    assert constraints["conv1"] == "2-hot" and constraints["conv2"] == "width learned"
    edgemat.calibrate(q, [torch.randn(8, 1, 8, 8)])
    learned = {row.name: row.constraint for row in edgemat.summary(q).rows}["conv2"]
    quantizer = q.conv2.weight_quantizer
    pruned = float((quantizer.codes_now() == 0).float().mean())
    assert learned == f"width learned: mean {float(quantizer.bits().detach().mean()):.2f} bits, {pruned:.0%} pruned"


def test_copies_and_files_remember() -> None:
    q = quantised()
    text = str(edgemat.summary(q))
    assert str(edgemat.summary(copy.deepcopy(q))) == text
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    assert str(edgemat.summary(torch.load(file, weights_only=False))) == text


def test_dict_text_and_rich_say_the_same() -> None:
    from rich.console import Console

    found = edgemat.summary(quantised())
    data = found.to_dict()
    assert data["network"] == "QuantizedNet" and data["parameters"] == 80 + 16 + 292 + 1 + 650
    assert [layer["name"] for layer in data["layers"]] == [row.name for row in found.rows]
    text = io.StringIO()
    Console(file=text, width=160, color_system=None).print(found)
    assert text.getvalue().rstrip("\n") == str(found)
    for layer in data["layers"]:
        assert layer["name"] in str(found) and layer["kind"] in str(found)


def test_layers_built_by_hand() -> None:
    net = nn.Sequential(
        edgemat.nn.QuantLinear(4, 3, weights="fixed<5>"), edgemat.nn.QuantReLU("fixed<6>"), nn.Flatten()
    )
    rows = edgemat.summary(net).rows
    assert [(r.name, r.kind, r.weights, r.activations) for r in rows] == [
        ("0", "QuantLinear", "fixed<5>", ""),
        ("1", "QuantReLU", "", "ufixed<6>"),
    ]
    with pytest.raises(LoweringError, match="no layer of edgemat"):
        edgemat.summary(nn.Linear(2, 2))


def test_quantize_prints_where_it_should(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    for verbose, terminal, printed in (
        (None, False, False),
        (None, True, True),
        (False, True, False),
        (True, False, True),
    ):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        edgemat.quantize(model, verbose=verbose)
        out, err = capsys.readouterr()
        assert out == "" and ("QuantizedSequential" in err) == printed
