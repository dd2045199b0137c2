"""The reader believes nothing: a damaged, foreign or hostile file gives one sentence, quickly and without memory."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgemat
from edgemat.errors import EdgematError, LoweringError
from edgemat.lower import read
from edgemat.lower.reader import read_bytes
from edgemat.lower.writer import finish, write
from tests.core.graphs import Sketch, residual, weights

DATA = ir.to_proto(residual().finished()).SerializeToString(deterministic=True)
HOSTILE_NAMES = [
    'a"; system("rm -rf /"); "',
    "../../../etc/passwd",
    "two\nlines",
    "*/ int main(void) { return 1; } /*",
    "while",
    "é\u202e\u0000x",
    "%s%n{{ 7 * 7 }}",
    "[red]x[/]",
    "x" * 5000,
]


def proto() -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.ParseFromString(DATA)
    return made


def sentence(error: EdgematError) -> str:
    """The message is one line of readable length."""
    text = str(error)
    assert text and "\n" not in text and len(text) < 2000
    return text


def refused(change: Callable[[onnx.ModelProto], object], *words: str) -> str:
    """Applies a change to a good file; reading it must fail at once, without memory, with these words."""
    made = proto()
    change(made)
    data = made.SerializeToString()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    with pytest.raises(EdgematError) as caught:
        read_bytes(data)
    assert time.perf_counter() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300_000, "kilobytes"
    text = sentence(caught.value)
    for word in words:
        assert re.search(word, text), text
    return text


def node(model: onnx.ModelProto, op: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == op)


def attr(model: onnx.ModelProto, op: str, name: str) -> onnx.AttributeProto:
    return next(a for a in node(model, op).attribute if a.name == name)


def test_the_untouched_file_is_read() -> None:
    graph = read_bytes(DATA)
    assert [c.op.name for c in graph.nodes] == ["Conv", "Conv", "Add", "MaxPool", "Reshape", "Linear"]
    assert (graph.input_names, graph.output_names) == (["x"], ["y"])
    assert graph.input_type(0).shape == (None, 2, 6, 6) and graph.output_type(0).shape == (None, 3)
    assert set(graph.constants) == {"conv1.weight", "conv2.weight", "fc.weight"}


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
def function(model: onnx.ModelProto, name: str) -> onnx.FunctionProto:
    return next(f for f in model.functions if f.name == name)


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


# -- graphs --------------------------------------------------------------------------------------------------------
def test_a_cycle() -> None:
    refused(lambda m: node(m, "Conv").input.__setitem__(0, m.graph.node[3].output[0]), "cycle|before it is computed")
    refused(lambda m: node(m, "Add").input.__setitem__(0, node(m, "Add").output[0]), "cycle|before")


def test_nodes_out_of_order_and_missing_values() -> None:
    def backwards(m: onnx.ModelProto) -> None:
        nodes = list(m.graph.node)[::-1]
        m.graph.ClearField("node")
        m.graph.node.extend(nodes)

    refused(backwards)
    refused(lambda m: node(m, "Conv").input.__setitem__(0, "nowhere"))
    refused(lambda m: node(m, "Conv").input.__setitem__(1, ""), "missing")
    refused(lambda m: node(m, "Conv").input.append(""), "inputs|missing")
    refused(lambda m: node(m, "Add").output.append("more"), "outputs")


def test_names_that_are_not_unique() -> None:
    refused(lambda m: node(m, "Add").output.__setitem__(0, node(m, "Conv").output[0]), "more than once")
    refused(lambda m: m.graph.initializer.add().CopyFrom(m.graph.initializer[0]), "more than once")
    refused(lambda m: node(m, "Add").output.__setitem__(0, ""), "without a name")


def test_inputs_and_outputs() -> None:
    refused(lambda m: m.graph.ClearField("input"))
    refused(lambda m: m.graph.ClearField("output"), "no output")
    refused(lambda m: setattr(m.graph.output[0], "name", node(m, "Add").output[0]), "Dequantize")
    refused(lambda m: m.graph.output.add().CopyFrom(onnx.helper.make_tensor_value_info("zz", 1, [1])))
    extra = onnx.helper.make_tensor_value_info("unused", 1, ["batch", 3])
    refused(lambda m: m.graph.input.add().CopyFrom(extra), "unused", "0 quantisers")
    refused(lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", onnx.TensorProto.DOUBLE), "float32")


@pytest.mark.parametrize("extent", [1 << 40, 0, -1, 1 << 31])
def test_shapes_nobody_has_memory_for(extent: int) -> None:
    def change(m: onnx.ModelProto) -> None:
        m.graph.input[0].type.tensor_type.shape.dim[2].dim_value = extent

    refused(change)


def test_shapes_whose_product_is_too_large() -> None:
    def change(m: onnx.ModelProto) -> None:
        for dim in list(m.graph.input[0].type.tensor_type.shape.dim)[1:]:
            dim.dim_value = 1 << 20

    refused(change, "elements")


def test_outputs_nobody_has_memory_for() -> None:
    """Padding, kernels and shapes of 2**40 are refused before an array is made."""
    refused(lambda m: attr(m, "Conv", "pads").ints.__setitem__(0, 1 << 40))
    refused(lambda m: attr(m, "MaxPool", "kernel_shape").ints.__setitem__(0, 1 << 40))
    refused(lambda m: attr(m, "MaxPool", "strides").ints.__setitem__(0, 1 << 62))
    refused(lambda m: attr(m, "Conv", "dilations").ints.__setitem__(0, 1 << 40))
    refused(lambda m: attr(m, "Reshape", "shape").ints.__setitem__(0, 1 << 40))
    refused(lambda m: attr(m, "Reshape", "shape").ints.extend([1 << 40, 1 << 40]))


def test_the_largest_shapes_cost_no_memory() -> None:
    """64 million elements a sample are legal; typing them and building the bodies allocates nothing of that size."""
    made = Sketch("large")
    pool = {"kernel_shape": (3, 3), "strides": (1, 1), "pads": (1, 1, 1, 1), "ceil_mode": 0, "count_include_pad": 0}
    x = made.input("x", (1, 8000, 8000))
    made.output(made.add("AveragePool", [x], "pool", requantize="fixed<8,3,RND,SAT>", **pool), "y")
    data = ir.to_proto(made.finished()).SerializeToString()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(read_bytes(data).nodes) == 1 and len(data) < 200_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000, "kilobytes"


def test_initializers_nobody_has_memory_for() -> None:
    def huge(m: onnx.ModelProto) -> None:
        m.graph.initializer[0].dims[:] = [1 << 20, 1 << 20]

    refused(huge, "shape")
    refused(lambda m: m.graph.initializer[0].dims.__setitem__(0, 0), "shape")
    refused(lambda m: m.graph.initializer[0].dims.__setitem__(0, -4))
    refused(lambda m: m.graph.initializer[0].dims.__setitem__(0, 3))
    refused(lambda m: setattr(m.graph.initializer[0], "raw_data", b""))
    refused(lambda m: setattr(m.graph.initializer[0], "data_type", onnx.TensorProto.FLOAT))
    refused(lambda m: setattr(m.graph.initializer[0], "data_type", 99))


@pytest.mark.parametrize("location", ["/etc/passwd", "../secret.bin", "weights.bin"])
def test_external_data_is_not_opened(location: str, tmp_path: Path) -> None:
    """Lowered files carry their weights themselves, so no path in them is ever followed."""

    def change(m: onnx.ModelProto) -> None:
        tensor = m.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    refused(change, "outside the file")

    def inside(m: onnx.ModelProto) -> None:
        tensor = next(n for n in function(m, "Add").node if n.op_type == "Constant").attribute[0].t
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    refused(inside)

    def attribute(m: onnx.ModelProto) -> None:
        tensor = onnx.TensorProto(name="t", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=location)
        node(m, "Add").attribute.append(onnx.helper.make_attribute("extra", tensor))

    refused(attribute)


def test_foreign_operators() -> None:
    refused(lambda m: setattr(node(m, "Add"), "op_type", "Exec"), "Exec", "edgemat ops")
    refused(lambda m: setattr(node(m, "Add"), "domain", "com.evil"), "com.evil::Add")
    refused(lambda m: setattr(node(m, "Add"), "domain", ""), "Add")


def test_subgraphs_sparse_weights_and_training() -> None:
    graph = onnx.helper.make_graph([], "inner", [], [])
    refused(lambda m: node(m, "Add").attribute.append(onnx.helper.make_attribute("body", graph)), "body")
    refused(lambda m: m.graph.sparse_initializer.add(), "sparse")
    refused(lambda m: m.training_info.add(), "training")


def test_deep_nesting_does_not_exhaust_the_stack() -> None:
    def change(m: onnx.ModelProto) -> None:
        graph = onnx.helper.make_graph([], "inner", [], [])
        for _ in range(15):
            inner = onnx.helper.make_node("If", ["c"], [], then_branch=graph)
            graph = onnx.helper.make_graph([inner], "outer", [], [])
        node(m, "Add").attribute.append(onnx.helper.make_attribute("body", graph))

    refused(change)


def test_thousands_of_nodes_are_read_in_time() -> None:
    made = Sketch("long")
    value = made.input("x", (4,))
    for i in range(1500):
        value = made.add("Relu", [value], f"relu{i}")
    made.output(value, "y")
    data = ir.to_proto(made.finished(passes=False)).SerializeToString()
    start = time.perf_counter()
    assert len(read_bytes(data).nodes) == 1500
    assert time.perf_counter() - start < 20


# -- formats that cannot hold --------------------------------------------------------------------------------------
def test_a_constant_that_does_not_fit_its_format() -> None:
    made = Sketch()
    x = made.input("x", (4,))
    codes = made.codes([[100, 2, 3, 4]], "fixed<8,3,RND,SAT>", "k")
    with pytest.raises(EdgematError, match="do not fit"):
        made.add("Literal", [codes], "literal", y_format="fixed<4,3,RND,SAT>")
    with pytest.raises(EdgematError, match="do not fit"):
        made.linear(x, [[40, 0, 0, 0]], "fc", fmt="fixed<6,1,RND,SAT>")


def test_a_bias_of_more_than_32_bits() -> None:
    made = Sketch()
    x = made.input("x", (2,))
    w = made.codes([[1, 2]], "fixed<6,1,RND,SAT>", "w")
    b = made.imp.initializer(np.array([1 << 40]), np.dtype(np.int64), "b")
    with pytest.raises(EdgematError, match="32 bits"):
        made.add("Linear", [x, w, b], "fc", w_format="fixed<6,1,RND,SAT>")


# -- hostile names through every door ------------------------------------------------------------------------------
def hostile(name: str) -> Sketch:
    """A correct file whose every name is `name` with a number."""
    made = Sketch(name)
    x = made.input(f"{name} 0", (2, 4, 4))
    y = made.conv(x, weights((3, 2, 3, 3)), f"{name} 1")
    z = made.requantize(y, "ufixed<6,4,RND,SAT>", f"{name} 2")
    flat = made.add("Reshape", [z], f"{name} 3", shape=(48,))
    made.output(made.linear(flat, weights((2, 48)), f"{name} 4"), f"{name} 5")
    return made


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=range(len(HOSTILE_NAMES)))
@pytest.mark.parametrize("target", ["mcu", "hls"])
def test_hostile_names_stay_inside_the_output_folder(name: str, target: str, tmp_path: Path) -> None:
    model = hostile(name).finished()
    path = tmp_path / "in" / "net.onnx"
    write(model, path)
    graph = read(path)
    assert graph.name == name
    before = sorted(p for p in tmp_path.rglob("*"))
    output = tmp_path / "out"
    edgemat.export(path, target=target, output=output)
    outside = [p for p in sorted(tmp_path.rglob("*")) if output not in (p, *p.parents) and p not in before]
    assert outside == []
    for file in output.rglob("*"):
        assert re.fullmatch(r"[\w.\-]{1,120}", file.name), file.name
        if file.is_file() and file.suffix != ".bin":
            text = file.read_bytes().decode("ascii")
            for harm in ("system(", "../../..", "return 1; } /*", "two\nlines 1", "49", "\u202e"):
                assert harm == "49" or harm not in text, (file, harm)
    x = np.random.default_rng(0).normal(0, 2, (3, 2, 4, 4)).astype(np.float32)
    assert edgemat.Simulator(path)(x).shape == (3, 2)


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while files are written: no folder under the final name, no temporary one beside it."""
    path = residual().write(tmp_path / "in" / "net.onnx")
    whole = Path.write_text

    def interrupt(self: Path, *args: object, **kwargs: object) -> int:
        if "model" in self.name or "top" in self.name or "parameters" in self.name:
            raise KeyboardInterrupt
        return whole(self, *args, **kwargs)  # type: ignore[arg-type]

    def interrupt_bytes(self: Path, *args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupt)
    monkeypatch.setattr(Path, "write_bytes", interrupt_bytes)
    for target in ("mcu", "hls"):
        with pytest.raises(KeyboardInterrupt):
            edgemat.export(path, target=target, output=tmp_path / target / "out")
        assert list((tmp_path / target).iterdir()) == []


@pytest.mark.parametrize("target", ["mcu", "hls"])
def test_an_export_to_a_full_disk_leaves_nothing(target: str, tmp_path: Path) -> None:
    """The kernel refuses files of more than 1,000 bytes, in a process of its own."""
    path = residual().write(tmp_path / "in" / "net.onnx")
    program = (
        "import resource, signal, sys\n"
        "import edgemat\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    edgemat.export(sys.argv[1], target=sys.argv[2], output=sys.argv[3])\n"
        "except edgemat.EdgematError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", program, str(path), target, str(tmp_path / "out" / "project")]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "cannot be written" in done.stdout and len(done.stdout.splitlines()) == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_a_second_reading_of_what_was_read_is_the_same() -> None:
    """Writing what the reader gave back gives the same bytes."""
    graph = read_bytes(DATA)
    again = ir.from_proto(ir.to_proto(graph.model))
    finish(again)
    assert ir.to_proto(again).SerializeToString(deterministic=True) == DATA
