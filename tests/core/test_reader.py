"""The reader believes nothing: a damaged, foreign or untrue file gives one sentence."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgemat
from edgemat.errors import EdgematError, LoweringError
from edgemat.lower import read
from edgemat.lower.reader import read_bytes
from tests.core.tampering import DATA, attr, function, node, proto, refused, sentence


def test_the_untouched_file_is_read() -> None:
    graph = read_bytes(DATA)
    assert [c.op.name for c in graph.nodes] == ["Conv", "Conv", "Add", "MaxPool", "Reshape", "Linear"]
    assert (graph.input_names, graph.output_names) == (["x"], ["y"])
    assert graph.input_type(0).shape == (None, 2, 6, 6) and graph.output_type(0).shape == (None, 3)
    assert set(graph.constants) == {"conv1.weight", "conv2.weight", "fc.weight"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", "format 'nonsense' cannot be read"),
        ("fixed<8>", "has a learned binary point"),
        ("fixed<0,1>", "width is 0"),
        ("fixed<70,1>", "width is 70"),
        ("fixed<8,-300,RND,SAT>", "int_bits is -300"),
    ],
)
@pytest.mark.parametrize(("op", "key"), [("Quantize", "y_format"), ("Conv", "w_format"), ("Conv", "requantize")])
def test_a_malformed_format_names_its_node_and_attribute(op: str, key: str, text: str, words: str) -> None:
    def change(model: onnx.ModelProto) -> None:
        attr(model, op, key).s = text.encode()

    name = node(proto(), op).name
    refused(change, rf"^node '{name}' \({op}\): attribute '{key}': .*{words}")


# -- bytes ---------------------------------------------------------------------------------------------------------
def readable(data: bytes) -> None:
    """Either the very same model or one sentence."""
    try:
        graph = read_bytes(data)
    except EdgematError as error:
        sentence(error)
    else:
        assert len(graph.nodes) == 6


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, len(DATA) - 1), st.binary(min_size=0, max_size=8))
def test_overwritten_bytes(at: int, patch: bytes) -> None:
    readable(DATA[:at] + patch + DATA[at + len(patch) :])


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, len(DATA) - 1), st.integers(0, 200), st.binary(max_size=20))
def test_removed_and_inserted_bytes(at: int, removed: int, inserted: bytes) -> None:
    readable(DATA[:at] + inserted + DATA[at + removed :])


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    with pytest.raises(EdgematError) as caught:
        read_bytes(data)
    sentence(caught.value)


@pytest.mark.parametrize("size", [0, 1, 100, len(DATA) // 2, len(DATA) - 1])
def test_truncated_files(size: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(DATA[:size])
    for act in (read, edgemat.Simulator):
        with pytest.raises(LoweringError) as caught:
            act(path)
        assert "cut.onnx" in sentence(caught.value) or "the file" in sentence(caught.value)


@pytest.mark.parametrize("name", ["missing.onnx", ".", "missing/net.onnx"])
def test_files_that_are_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="cannot be read"):
        read(tmp_path / name)


# -- versions ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", ["2", "0", "", "1.0", "x" * 100_000])
def test_an_unknown_format_version(version: str) -> None:
    refused(lambda m: setattr(m.metadata_props[0], "value", version), "format version", "reads 1")


def test_an_onnx_file_of_someone_else() -> None:
    refused(lambda m: m.ClearField("metadata_props"), "not a lowered edgemat file", "to_onnx")


@pytest.mark.parametrize(("domain", "version"), [("", 21), ("", 19), ("edgemat", 2), ("com.microsoft", 1)])
def test_an_unknown_opset(domain: str, version: int) -> None:
    def change(m: onnx.ModelProto) -> None:
        kept = {o.domain: o.version for o in m.opset_import} | {domain: version}
        m.ClearField("opset_import")
        for key, value in kept.items():
            m.opset_import.append(onnx.OperatorSetIdProto(domain=key, version=value))

    refused(change, "opsets", "expected")


def test_a_repeated_opset_and_another_ir() -> None:
    refused(lambda m: m.opset_import.append(m.opset_import[0]), "opsets")
    refused(lambda m: setattr(m, "ir_version", 99), "IR 99")


# -- statements ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", ["x_formats", "y_formats"])
def test_formats_that_do_not_follow(key: str) -> None:
    refused(lambda m: attr(m, "Conv", key).strings.__setitem__(0, b"fixed<4,3,RND,SAT>"), key, "implies")


def test_ranges_that_do_not_follow() -> None:
    refused(lambda m: attr(m, "Linear", "y_ranges").ints.__setitem__(0, -1), "y_ranges", "implies")


@pytest.mark.parametrize("key", ["x_formats", "y_formats", "y_ranges"])
def test_missing_statements(key: str) -> None:
    refused(lambda m: node(m, "Add").attribute.remove(attr(m, "Add", key)), key, "implies")


def test_attributes_that_change_the_meaning() -> None:
    """Each is a legal value, so that only the statements and the body can show it."""
    refused(lambda m: setattr(attr(m, "Add", "requantize"), "s", b"fixed<7,5,TRN,SAT>"), "add", "implie")
    refused(lambda m: setattr(attr(m, "Linear", "w_format"), "s", b"fixed<6,2,RND,SAT>"), "fc", "implie")
    refused(lambda m: attr(m, "Conv", "pads").ints.__setitem__(0, 0), "conv1|reads|implie|flatten|must broadcast")


@pytest.mark.parametrize(
    ("op", "key", "text"),
    [
        ("Conv", "w_format", b"fixed<999,1>"),
        ("Conv", "w_format", b"fixed<2,1,RND,SAT>"),
        ("Conv", "w_format", b"fixed<6,[1,1],RND,SAT>"),
        ("Add", "requantize", b"fixed<7,[1,2],RND,SAT>"),
        ("Add", "requantize", b"\xff\xfe"),
        ("Quantize", "y_format", b"fixed<8>"),
        ("Quantize", "y_format", b"float"),
    ],
)
def test_formats_that_cannot_be(op: str, key: str, text: bytes) -> None:
    refused(lambda m: setattr(attr(m, op, key), "s", text))


def test_unknown_missing_and_mistyped_attributes() -> None:
    refused(lambda m: node(m, "Conv").attribute.append(onnx.helper.make_attribute("speed", 3)), "speed")
    refused(lambda m: node(m, "Conv").attribute.remove(attr(m, "Conv", "strides")), "strides")
    refused(lambda m: attr(m, "Conv", "strides").CopyFrom(onnx.helper.make_attribute("strides", "two")), "strides")
    refused(lambda m: attr(m, "Conv", "strides").CopyFrom(onnx.helper.make_attribute("strides", 0.5)), "strides")
    refused(lambda m: attr(m, "Conv", "strides").ints.__setitem__(0, 0), "strides")
    refused(lambda m: attr(m, "Conv", "pads").ints.__setitem__(0, -1), "pads")
    refused(lambda m: attr(m, "Conv", "dilations").ints.append(1), "dilations")
    refused(lambda m: setattr(attr(m, "Conv", "groups"), "i", 0), "groups|channels")


def test_weights_that_were_changed() -> None:
    """Other weights have other ranges, so the statements no longer follow."""

    def change(m: onnx.ModelProto) -> None:
        tensor = next(t for t in m.graph.initializer if t.name == "fc.weight")
        raw = bytearray(tensor.raw_data)
        raw[0] = (raw[0] + 5) % 256
        tensor.raw_data = bytes(raw)

    refused(change, "fc")


# -- functions -----------------------------------------------------------------------------------------------------
def test_a_body_that_lies() -> None:
    """onnxruntime would run it; the attributes say otherwise."""

    def swap(m: onnx.ModelProto) -> None:
        next(n for n in function(m, "Add").node if n.op_type == "Add").op_type = "Sub"

    refused(swap, "Add", "differs|changed after")
    refused(lambda m: function(m, "Linear").node.pop(), "differs|deserialize_function")
    refused(lambda m: setattr(function(m, "Linear"), "doc_string", "hello"), "differs")
    refused(lambda m: function(m, "Conv").input.append("more"), "differs")


def test_a_constant_in_a_body_that_lies() -> None:
    def change(m: onnx.ModelProto) -> None:
        constant = next(n for n in function(m, "Add").node if n.op_type == "Constant")
        tensor = constant.attribute[0].t
        raw = bytearray(tensor.raw_data)
        raw[-1] ^= 0x40
        tensor.raw_data = bytes(raw)

    refused(change, "differs")


def test_functions_nobody_asked_for() -> None:
    def extra(m: onnx.ModelProto) -> None:
        m.functions.add().CopyFrom(function(m, "Add"))
        m.functions[-1].overload = "other"

    refused(extra, "no node calls")
    refused(lambda m: m.functions.add().CopyFrom(function(m, "Add")), "no node calls|more than once")
    refused(lambda m: m.functions.remove(function(m, "Add")), "overload")
    refused(lambda m: m.ClearField("functions"), "overload")


def test_another_overload() -> None:
    refused(lambda m: setattr(node(m, "Add"), "overload", "0" * 16), "overload", "changed after")
