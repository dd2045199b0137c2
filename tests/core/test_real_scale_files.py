"""Files whose boundaries have real scales: Simulator, verify, reports and generated code keep their values."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import edgemat
from edgemat.lower.graph import Graph
from edgemat.lower.reader import read
from edgemat.report import inspect
from edgemat.report.values import distributions
from edgemat.sim import reference, session
from edgemat.sim.arrays import input_codes, input_values, output_values
from edgemat.targets import apheaders, destination, hls, toolchain
from edgemat.targets.mcu.generator import project
from edgemat.verification import shown
from tests.core.graphs import Sketch, weights

X_SCALE, Y_SCALE = np.float32(0.0173), np.float32(0.00037)
ROWS = {"u8": ("ufixed<8,8,RND_CONV,SAT>", None, None), "s9": ("fixed<9,9,RND_CONV,SAT>", -3, 252)}


class Scaled(Sketch):
    """Boundaries with real scales."""

    def scaled_input(self, name: str, shape: tuple[int, ...], scale: np.float32, **attrs: object) -> ir.Value:
        kind = ir.TensorType(ir.DataType.FLOAT)
        source = ir.Value(name=name, type=kind, shape=ir.Shape(["batch", *shape]))
        self.imp.input(source)
        stated = {"scale": float(scale).hex(), **{k: v for k, v in attrs.items() if v is not None}}
        return self.add("Quantize", [self.imp.mapped(source)], f"{name}_quantizer", **stated)

    def scaled_output(self, value: ir.Value, name: str, scale: np.float32) -> None:
        source = ir.Value(name=name)
        self.imp.alias(source, value)
        self.imp.output(source, name, {"scale": float(scale).hex()})


@pytest.fixture(params=ROWS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """x, a Linear, its sums; two outputs of one tensor with different scales would be legal, too."""
    fmt, low, high = ROWS[request.param]
    made = Scaled("scaled")
    x = made.scaled_input("x", (6,), X_SCALE, y_format=fmt, low=low, high=high)
    made.scaled_output(made.linear(x, weights((3, 6)), "fc", "fixed<6,6,RND,SAT>"), "y", Y_SCALE)
    return made.write(tmp_path / "scaled.onnx")


def values(graph: Graph, rows: int = 200) -> np.ndarray:
    """Ties, their neighbours, rails, infinities and random values: float32 [N, 6]."""
    low, high = graph.input_type(0).lo, graph.input_type(0).hi
    ties = ((np.arange(low - 2, high + 2) + 0.5) * np.float64(X_SCALE)).astype(np.float32)
    near = [np.nextafter(ties, np.float32(end)) for end in (-np.inf, np.inf)]
    odd = np.array([np.inf, -np.inf, 0.0, -0.0, 1e-45, 3e38, -3e38], np.float32)
    random = np.random.default_rng(0).normal(0, 2, rows).astype(np.float32)
    found = np.concatenate([ties, *near, odd, random])
    return np.resize(found, (-(-len(found) // 6), 6))


def test_the_simulator_takes_and_gives_the_values_of_the_file(path: Path) -> None:
    graph = read(path)
    x = values(graph)
    with np.errstate(over="ignore"):
        ratio = x / X_SCALE
    fixed = np.clip(np.rint(ratio), graph.input_type(0).lo, graph.input_type(0).hi).astype(np.int64)
    assert (input_codes(graph, 0, x) == fixed).all()
    expected = reference.run(graph, {graph.inputs[0]: fixed})[graph.outputs[0]]
    simulator = edgemat.Simulator(path)
    assert (simulator.codes(x) == expected).all()
    found = simulator(x)
    assert found.dtype == np.float32 and (found == expected.astype(np.float32) * Y_SCALE).all()
    stock = session.open_session(session.copy(graph.model)).run(["y"], {"x": x})[0]
    assert stock.dtype == np.float32 and (stock == found).all()
    # What a caller may give is every value; x below the stated low is no index and saturates.
    assert (fixed.min(), fixed.max()) == (graph.input_type(0).lo, graph.input_type(0).hi)
    with pytest.raises(edgemat.EdgematError, match="codes"):
        simulator(np.full((1, 6), graph.input_type(0).hi + 1), codes=True)
    every = np.arange(graph.input_type(0).lo, graph.input_type(0).hi + 1)
    assert (input_codes(graph, 0, input_values(graph, 0, every)) == every).all()


def test_verify_runs_on_values_and_sees_another_scale(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = values(read(path))
    for given in (x, None):
        report = edgemat.verify(path, given, backends=("onnx",), samples=None if given is not None else 20)
        assert report.ok, report.to_dict()
    # A value that its code does not have is no code: the product in float64, or the scale one ulp away.
    graph = read(path)
    codes = np.arange(-900, 900).reshape(-1, 3)
    right = output_values(graph, 0, codes)
    assert (shown.output_codes(graph, 0, right) == codes).all()
    assert (shown.output_codes(graph, 0, np.nextafter(right, np.float32(9))) == shown.NO_CODE).mean() > 0.9
    honest = shown.output_values
    monkeypatch.setattr(shown, "output_values", lambda *a: honest(*a) * np.float32(1 + 2**-23))
    assert not edgemat.verify(path, x, backends=("onnx",)).ok


def test_a_changed_scale_is_another_function(path: Path) -> None:
    """The body carries the scale: a file whose attribute and body differ is refused."""
    import onnx

    model = onnx.load(path)
    for node in model.graph.node:
        for attr in node.attribute:
            if attr.name == "scale":
                attr.s = float(np.float32(0.5)).hex().encode()
    onnx.save(model, path)
    with pytest.raises(edgemat.EdgematError):
        read(path)


def test_reports_say_what_a_code_is_worth(path: Path) -> None:
    graph = read(path)
    seen, _ = distributions(graph, values(graph))
    low, high = graph.input_type(0).lo, graph.input_type(0).hi
    assert (seen[0].low, seen[0].high) == (low * float(X_SCALE), high * float(X_SCALE))
    made = inspect(path).to_dict()
    assert (made["inputs"][0]["scale"], made["outputs"][0]["scale"]) == (float(X_SCALE), float(Y_SCALE))


C_PORTS = """
#include <math.h>
#include <stdio.h>
#include "model.h"
int main(void) {
    static float values[EM_SCALED_INPUT_SIZE], back[EM_SCALED_OUTPUT_SIZE];
    static em_scaled_input_t codes[EM_SCALED_INPUT_SIZE];
    static em_scaled_output_t sums[EM_SCALED_OUTPUT_SIZE];
    static int64_t arena[EM_SCALED_ARENA_BYTES / 8 + 1];
    em_scaled model;
    if (em_scaled_init(&model, arena, sizeof arena) != EM_OK) return 1;
    while (fread(values, sizeof values, 1, stdin) == 1) {
        if (em_scaled_quantize_input(values, codes) != EM_OK) return 2;
        if (em_scaled_run(&model, codes, sums) != EM_OK) return 3;
        if (em_scaled_dequantize_output(sums, back) != EM_OK) return 4;
        for (int i = 0; i < EM_SCALED_INPUT_SIZE; ++i) printf("%d ", (int)codes[i]);
        for (int i = 0; i < EM_SCALED_OUTPUT_SIZE; ++i) printf("%.9g ", (double)back[i]);
    }
    values[2] = NAN;
    return em_scaled_quantize_input(values, codes) == EM_ERROR_NAN ? 0 : 5;
}
"""
CPP_PORTS = """
#include <cstdio>
#include "em_scaled.hpp"
#include "em_scaled_host.hpp"
int main() {
    float values[6];
    double back[3];
    INPUT codes[6];
    OUTPUT sums[3];
    while (std::fread(values, sizeof values, 1, stdin) == 1) {
        if (!em_scaled_quantize_input(values, codes)) return 2;
        em_scaled(codes, sums);
        em_scaled_dequantize_output(sums, back);
        for (int i = 0; i < 6; ++i) std::printf("%d ", (int)codes[i].to_int64());
        for (int i = 0; i < 3; ++i) std::printf("%.9g ", back[i]);
    }
    return 0;
}
"""


def check_program(program: Path, graph: Graph, mutated: bool = False) -> None:
    x = values(graph)
    done = subprocess.run([str(program)], input=x.tobytes(), capture_output=True, check=not mutated)
    found = np.array(done.stdout.split(), np.float64).reshape(len(x), 9)
    codes = input_codes(graph, 0, x)
    sums = reference.run(graph, {graph.inputs[0]: codes})[graph.outputs[0]]
    right = bool(
        (found[:, :6] == codes).all() and (found[:, 6:].astype(np.float32) == output_values(graph, 0, sums)).all()
    )
    assert right != mutated


@pytest.mark.parametrize("change", ["", "scale", "quotient", "ties"])
def test_generated_c_converts_as_the_file_does(path: Path, change: str, tmp_path: Path, cc: toolchain.Compiler) -> None:
    graph = read(path)
    folder = tmp_path / "c"
    destination.write_files(project(graph).files(example=False), folder)
    header, arithmetic = folder / "model.h", folder / "kernels" / "edgemat_float.h"
    assert f"_INPUT_SCALE {float(X_SCALE):.9g}F" in header.read_text() and "FRAC_BITS" not in header.read_text()
    if change == "scale":
        up = float(np.nextafter(X_SCALE, np.float32(1)))
        header.write_text(header.read_text().replace(f"{float(X_SCALE):.9g}F", f"{up:.9g}F"))
    changes = {"quotient": ("(q + ((uint64_t)1 << (drop - 1)))", "q"), "ties": ("EM_RND_CONV", "EM_RND")}
    if change in changes:
        old, new = changes[change]
        assert arithmetic.read_text().count(old) == 1
        arithmetic.write_text(arithmetic.read_text().replace(old, new))
    (folder / "ports.c").write_text(C_PORTS)
    sources = [folder / file for file in ("ports.c", "model.c", "kernels.c", "weights.c")]
    flags = ["-Wall", "-Wextra", "-Werror", "-Wconversion", "-Wdouble-promotion"]
    program = toolchain.compile(cc, sources, folder / "ports", standard="c99", optimize="1", flags=flags)
    check_program(program, graph, bool(change))


def test_generated_cpp_converts_as_the_file_does(path: Path, tmp_path: Path) -> None:
    try:
        compiler, headers = toolchain.find_cxx(), apheaders.require_ap_headers()
    except edgemat.EdgematError as error:
        pytest.skip(str(error))
    graph = read(path)
    made = hls.project(graph, hls.Plan(io="parallel"))
    destination.write_files(made.files(vectors=False), tmp_path / "hls")
    folder = tmp_path / "hls"
    assert f"value = code * {float(X_SCALE):.9g}F" in (folder / "em_scaled.hpp").read_text()
    text = CPP_PORTS.replace("INPUT", made.inputs[0].element).replace("OUTPUT", made.outputs[0].element)
    (folder / "ports.cpp").write_text(f'#include "em_scaled.cpp"\n{text}')
    program = toolchain.compile(
        compiler, [folder / "ports.cpp"], folder / "ports", standard="c++14", optimize="0",
        include=[folder, folder / "include", folder / "sim"], system_include=[headers],
        flags=[*compiler.ap_flags, "-Wno-unknown-pragmas", "-Wall", "-Wextra", "-Werror"],
    )  # fmt: skip
    check_program(program, graph)
