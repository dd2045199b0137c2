"""Exactness on x86 without VNNI: u8 x s8 kernels saturate pairs of products there (docs/numerics.md, section 4).

Files and fused models run under an emulated Haswell. The controls force the unsafe form and are wrong there.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import edgemat.ops.linear
from edgemat.formats import Fixed
from edgemat.lower.graph import Graph
from edgemat.lower.passes.surgery import make_node
from edgemat.lower.reader import read
from edgemat.lower.writer import finish, write
from edgemat.sim import reference
from edgemat.sim.arrays import to_codes
from edgemat.sim.fused import fuse

from .graphs import Builder, batch

# Runs where numpy and onnxruntime are all that is imported: emulated imports are slow.
CHILD = """
import sys
import numpy, onnxruntime
for path in sys.argv[1:]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    numpy.save(path + ".npy", session.run(None, {session.get_inputs()[0].name: numpy.load(path + ".x.npy")})[0])
"""


@pytest.fixture(scope="module")
def haswell() -> list[str]:
    """The argument list that starts Python on an AVX2-only CPU."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the saturating kernels are those of x86")
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("qemu-x86_64 is not installed: make toolchains (Debian: apt-get install qemu-user)")
    return [emulator, "-cpu", "Haswell", sys.executable]


def lowered_file(path: Path, widths: tuple[int, ...]) -> None:
    """A lowered MLP 32-48-48-... of large weights of one sign in pairs, the worst case; unsigned 8-bit activations."""
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", 32]))
    nodes = [make_node("Quantize", [x], {"y_format": "ufixed<8,8,RND,SAT>"}, "quantize")]
    initializers = []
    for number, width in enumerate(widths):
        top = (1 << (width - 1)) - 1
        codes = rng.integers(top // 2, top, (48, 32 if number == 0 else 48), np.int64, endpoint=True)
        codes[:, ::4] *= -1
        codes[:, 1::4] *= -1  # neighbours share a sign: two pairs in turn cancel in the sum, not in the pair
        w = ir.Value(name=f"w{number}", const_value=ir.tensor(codes.astype(np.int8), name=f"w{number}"))
        initializers.append(w)
        attrs = {"w_format": f"fixed<{width},0,RND,SAT>", "requantize": "ufixed<8,9,RND,SAT>"}
        nodes.append(make_node("Linear", [nodes[-1].outputs[0], w], attrs, f"linear{number}"))
    nodes.append(make_node("Dequantize", [nodes[-1].outputs[0]], {}, "dequantize", "y"))
    graph = ir.Graph([x], [nodes[-1].outputs[0]], nodes=nodes, initializers=initializers, name="net")
    nodes[-1].outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model = ir.Model(graph, ir_version=10)
    finish(model)
    write(model, path)


def convolutions(width: int) -> Graph:
    """Dense, depthwise and pointwise convolutions of 16 channels on unsigned bytes, then a Linear."""
    build = Builder()
    x, w_fmt = build.input("ufixed<8,8>", (16, 6, 5)), f"fixed<{width},0>"
    x = build.conv(x, 16, w_fmt, "ufixed<8,9>", 1)
    x = build.conv(x, 16, w_fmt, "ufixed<8,8>", 2, groups=16)
    x = build.conv(x, 17, w_fmt, "fixed<8,8>", 3, kernel=1)
    x = build.pool(x)
    return build.graph(build.linear(build.flatten(x), 5, w_fmt))


def save_fused(graph: Graph, path: Path) -> None:
    path.write_bytes(ir.serde.serialize_model(fuse(graph, False).model).SerializeToString())


def operators(path: Path) -> set[str]:
    """Operators in the file, function bodies included."""
    model = ir.load(path)
    return {node.op_type for function in model.functions.values() for node in function}


@pytest.fixture(scope="module")
def outputs(haswell: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What the emulated CPU computes, and the reference."""
    folder = tmp_path_factory.mktemp("avx2")
    safe, unsafe = folder / "safe.onnx", folder / "unsafe.onnx"
    lowered_file(safe, (6, 6))
    lowered_file(unsafe, (8, 8))
    assert "MatMulInteger" in operators(safe) and "MatMulInteger" not in operators(unsafe)
    graphs = {"safe": read(safe), "unsafe": read(unsafe)}
    for name, graph in graphs.items():
        save_fused(graph, folder / f"{name}_fused.onnx")
    with pytest.MonkeyPatch.context() as patch:
        for module in ("quantize_linear", "quantize_conv"):  # the package hands out the functions of these names
            rewrite = import_module(f"edgemat.sim.rewrites.{module}")
            patch.setattr(rewrite, "pairs_are_safe", lambda weight, largest_byte: True)
        save_fused(graphs["unsafe"], folder / "forced_fused.onnx")
        patch.setattr(edgemat.ops.linear, "integer_kernel_is_safe", lambda call, weights: True)
        lowered_file(folder / "forced.onnx", (8, 8))
        save_fused(convolutions(8), folder / "forced_conv.onnx")
    assert "MatMulInteger" in operators(folder / "forced.onnx")
    for width in (6, 8):
        save_fused(convolutions(width), folder / f"conv{width}.onnx")
    x = batch(Fixed.parse("ufixed<8,8>"), (32,), 64)
    x[:8] = 255
    maps = np.resize(x, (12, 16, 6, 5))
    models = sorted(folder.glob("*.onnx"))
    for path in models:
        np.save(f"{path}.x.npy", maps if "conv" in path.stem else x)
    done = subprocess.run([*haswell, "-c", CHILD, *map(str, models)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {path.stem: np.load(f"{path}.npy") for path in models}
    for width in (6, 8):
        graph = convolutions(width)
        found[f"conv{width}_reference"] = reference.run(graph, to_codes(graph, maps, False))[graph.outputs[0]]
    for name, graph in graphs.items():
        found[f"{name}_reference"] = reference.run(graph, to_codes(graph, x, False))[graph.outputs[0]]
        # Files give values of the format ufixed<8,9>, fused models codes.
        found[f"{name}_values"] = found[f"{name}_reference"].astype(np.float32) * 2
    return found


@pytest.mark.parametrize("name", ["safe", "unsafe"])
def test_the_file_is_exact(outputs: dict[str, np.ndarray], name: str) -> None:
    assert len(np.unique(outputs[f"{name}_values"])) > 20
    assert (outputs[name] == outputs[f"{name}_values"]).all()


@pytest.mark.parametrize("name", ["safe", "unsafe"])
def test_the_fused_graph_is_exact(outputs: dict[str, np.ndarray], name: str) -> None:
    assert (outputs[f"{name}_fused"] == outputs[f"{name}_reference"]).all()


@pytest.mark.parametrize("width", [6, 8])
def test_fused_convolutions_are_exact(outputs: dict[str, np.ndarray], width: int) -> None:
    assert len(np.unique(outputs[f"conv{width}_reference"])) > 40
    assert (outputs[f"conv{width}"] == outputs[f"conv{width}_reference"]).all()


def test_control_the_unsafe_form_is_wrong(outputs: dict[str, np.ndarray]) -> None:
    assert (outputs["forced"] != outputs["unsafe_values"]).mean() > 0.1
    assert (outputs["forced_fused"] != outputs["unsafe_reference"]).mean() > 0.1
    assert (outputs["forced_conv"] != outputs["conv8_reference"]).mean() > 0.1
