"""`inspect` and `ops_table`: figures recomputed by hand, the proof and its control, JSON and tables."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from rich.console import Console

from edgemat import report
from edgemat.errors import EdgematError
from edgemat.lower.reader import read_bytes
from edgemat.op import Bounds
from edgemat.ops import OPS
from edgemat.ops.linear import Linear
from edgemat.report.inspection import two_complement_bits
from tests.core.graphs import Sketch, residual, weights


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return residual().write(tmp_path_factory.mktemp("report") / "net.onnx")


def printed(shown: report.Inspection | report.OpsTable) -> str:
    stream = io.StringIO()
    Console(file=stream, width=400).print(shown.render())
    return stream.getvalue()


def by_name(found: dict) -> dict:
    return {node["name"]: node for node in found["nodes"]}


def test_inspect_counts_and_formats(path: Path) -> None:
    found = report.inspect(path).to_dict()
    assert json.loads(json.dumps(found)) == found
    nodes = by_name(found)
    assert list(nodes) == ["conv1", "conv2", "add", "pool", "flatten", "fc"]
    assert nodes["conv1"]["multiplies"] == 4 * 2 * 9 * 36 and nodes["conv1"]["weight_bits"] == 4 * 2 * 9 * 6
    assert nodes["fc"]["multiplies"] == nodes["fc"]["additions"] == 3 * 36
    assert nodes["conv1"]["requantize"] == "ufixed<6,4,RND,SAT>" and nodes["fc"]["requantize"] == ""
    assert nodes["conv1"]["outputs"][0] == {
        "name": nodes["conv1"]["outputs"][0]["name"],
        "shape": [None, 4, 6, 6],
        "format": "ufixed<6,4,RND,SAT>",
        "range": [0, 63],
    }
    totals = found["totals"]
    assert totals["nodes"] == 6
    assert totals["multiplies"] == sum(node["multiplies"] for node in nodes.values())
    assert found["inputs"][0]["format"] == "fixed<8,3,RND,SAT>" and found["target"] is None


def test_inspect_bounds_are_those_of_the_weights(path: Path) -> None:
    """Recomputed from the weights with Python integers."""
    node = by_name(report.inspect(path).to_dict())["fc"]
    w = weights((3, 36), 2).tolist()
    lo, hi = next(edge["range"] for edge in node["inputs"] if edge["shape"] == [None, 36])
    finals = [(sum(min(c * lo, c * hi) for c in row), sum(max(c * lo, c * hi) for c in row)) for row in w]
    partials = [(sum(min(c * lo, c * hi, 0) for c in row), sum(max(c * lo, c * hi, 0) for c in row)) for row in w]
    assert node["final"] == [min(a for a, _ in finals), max(b for _, b in finals)]
    assert node["partial"] == [min(a for a, _ in partials), max(b for _, b in partials)]
    assert node["hls_bits"] == two_complement_bits(*node["final"])


def test_inspect_partial_sums_can_exceed_the_result() -> None:
    """The example of docs/numerics.md: the final sum is within 196, a prefix reaches 420."""
    made = Sketch()
    x = made.requantize(made.add("Clip", [made.input("x", (8,))], "clip", low=8, high=15), "fixed<8,3,RND,SAT>", "rq")
    made.output(made.linear(x, [[7] * 4 + [-7] * 4], "fc"), "y")
    node = by_name(report.inspect(read_bytes(ir.to_proto(made.finished()).SerializeToString())).to_dict())["fc"]
    assert node["final"] == [-196, 196] and node["partial"] == [-420, 420]


def test_the_proof_and_its_control(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert report.inspect(path).to_dict()["overflow"] == {
        "proved": True,
        "nodes": 6,
        "widest_hls_bits": max(node.hls_bits for node in report.inspect(path).nodes),
        "widest_c_bits": 32,
        "unproved": [],
    }
    graph = report.inspection.read(path)
    honest = Linear.bounds
    for wide in (1 << 24, 1 << 70):  # beyond what its float32 carrier, and any C integer, holds
        monkeypatch.setattr(Linear, "bounds", lambda self, call, wide=wide: Bounds(honest(self, call).final, (0, wide)))
        for call in graph.nodes:
            call.__dict__.pop("bounds", None)
        found = report.inspect(graph)
        if wide == 1 << 70 or "MatMulInteger" not in found.nodes[-1].carriers[0]:
            assert not found.proved and found.overflow["unproved"] == ["fc"] and "not proved for fc" in printed(found)


@pytest.mark.parametrize(
    ("x", "w", "carrier"),
    [
        ("fixed<8,3,RND,SAT>", "fixed<6,1,RND,SAT>", "float32"),
        ("ufixed<6,3,RND,SAT>", "fixed<6,1,RND,SAT>", "MatMulInteger(u8 x s8)"),
        ("ufixed<8,3,RND,SAT>", "fixed<8,1,RND,SAT>", "float32"),
        ("fixed<16,3,RND,SAT>", "fixed<16,1,RND,SAT>", "float64"),
        ("fixed<32,3,RND,SAT>", "fixed<27,1,RND,SAT>", "int64"),
    ],
)
def test_carriers(x: str, w: str, carrier: str) -> None:
    """u8 x s8 kernels only where no pair of products can saturate 16 bits; then by the bound of every partial sum."""
    made = Sketch()
    width = int(w[6:].split(",")[0].rstrip(">"))
    codes = np.full((2, 16), (1 << (width - 1)) - 1)
    made.output(made.linear(made.input("x", (16,), x), codes, "fc", fmt=w), "y")
    found = report.inspect(read_bytes(ir.to_proto(made.finished()).SerializeToString()))
    assert found.nodes[0].carriers[0] == carrier and found.proved


def test_inspect_for_the_mcu(path: Path) -> None:
    target = report.inspect(path, target="mcu").to_dict()["target"]
    totals = target["totals"]
    assert totals["arena_bytes"] >= totals["arena_lower_bound_bytes"] > 0
    assert totals["weight_bytes"] >= 4 * 2 * 9 + 4 * 4 * 9 + 3 * 36
    assert not target["modelled"]
    layers = {layer["node"]: layer for layer in target["layers"]}
    assert set(layers) == {"conv1", "conv2", "add", "pool", "fc"}
    assert layers["conv1"]["accumulator"] == "int32_t" and layers["fc"]["weight_bytes"] >= 3 * 36


def test_inspect_for_hls(path: Path) -> None:
    shown = report.inspect(path, target="hls")
    target = shown.to_dict()["target"]
    assert target["modelled"] and "modelled" in printed(shown)
    assert set(target["totals"]) == {"clock_ns", "reuse", "parallel", "stream"}
    for io_mode in ("parallel", "stream"):
        totals = target["totals"][io_mode]
        assert totals["latency_cycles"] >= totals["ii_cycles"] >= 36
        layers = {layer["node"]: layer for layer in target["layers"] if layer["io"] == io_mode}
        assert layers["conv1"]["multipliers"] == 72 and layers["fc"]["multipliers"] == 108
        assert totals["multipliers"] == sum(layer["multipliers"] for layer in layers.values())
        assert layers["fc"]["memory_bits"] > 0
    depths = [d for layer in target["layers"] for d in layer["fifo_depths"].values()]
    assert depths and min(depths) >= 2 and max(depths) > 2, "the shortcut needs a deeper FIFO"


def test_inspect_refuses_an_unknown_target(path: Path) -> None:
    with pytest.raises(EdgematError, match="tpu"):
        report.inspect(path, target="tpu")


def test_names_are_shown_as_text_not_as_markup() -> None:
    made = Sketch("[red]model[/red]")
    made.output(made.add("Relu", [made.input("[bold]x", (4,))], "[link=x]relu"), "y")
    text = printed(report.inspect(read_bytes(ir.to_proto(made.finished()).SerializeToString())))
    assert "[link=x]relu" in text and "[red]model[/red]" in text and "[bold]x" in text


def test_ops_table_follows_the_operators() -> None:
    table = report.ops_table()
    rows = {row.operator: row for row in table.rows}
    assert [row.operator for row in table.rows][: len(OPS)] == [op.name for op in OPS]
    assert rows["Conv"].hls == "conv.hpp" and rows["Conv"].mcu == "conv.c"
    assert rows["Reshape"].hls == rows["Reshape"].mcu == "alias"
    assert rows["Split"].note == "lowered to Slice" and not rows["Split"].hls
    assert json.loads(json.dumps(table.to_dict())) == table.to_dict()
    assert "Conv" in printed(table)


def test_ops_table_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator without native files has no entry there."""
    monkeypatch.setattr(Linear, "stem", "no_such_stem")
    row = next(row for row in report.ops_table().rows if row.operator == "Linear")
    assert row.hls == "" and row.mcu == "" and row.reference == "yes"
    assert "| Linear | yes | body | yes | none | none |" in report.ops_table().markdown()
